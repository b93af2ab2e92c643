"""Mllama's images: canvases, sizes, tiles, aspect ratios, values and options."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite import mllama_rules as rules
from vlmqual_conformance.suite.library_objects import array, image, keys, picture
from vlmqual_conformance.suite.mllama_objects import MllamaObjects, mllama_objects
from vlmqual_contract.subject import Handle, Image, RemoteLibrary, Tuple

TILE = 28
RANDOM_SIZES = 300


@pytest.fixture
def mllama(library: RemoteLibrary) -> MllamaObjects:
    """Objects of the library under test."""
    return mllama_objects(library)


def processed(processor: Handle, images: Any, **options: Any) -> Handle:
    """What preprocess returns, as arrays."""
    made = processor.call("preprocess", images, return_tensors="np", **options)
    assert isinstance(made, Handle)
    return made


def plain(height: int, width: int, value: int = 90) -> Image:
    """A picture of one colour."""
    return Image(np.full((height, width, 3), value, np.uint8))


# canvas and size --------------------------------------------------------------------------------------------------


@requirement("MLLAMA-IMG-045", "MLLAMA-IMG-019")
@pytest.mark.parametrize(
    ("width", "height", "ratio", "tiles"),
    [(50, 50, 1, 1), (300, 100, 2, 2), (100, 300, 5, 2), (500, 500, 6, 4), (1000, 100, 4, 4), (10, 2000, 8, 4)],
)
def test_the_canvas_of_tiles_of_224_pixels(
    mllama: MllamaObjects, width: int, height: int, ratio: int, tiles: int
) -> None:
    made = processed(mllama.default_images, plain(height, width))
    assert array(made, "aspect_ratio_ids").tolist() == [[ratio]], f"{width}x{height}"
    assert made.get("num_tiles") == [[tiles]]


@requirement("MLLAMA-IMG-020")
@pytest.mark.parametrize(("width", "height", "ratio"), [(50, 50, 1), (300, 100, 2), (100, 300, 3)])
def test_ids_with_two_tiles_at_most(mllama: MllamaObjects, width: int, height: int, ratio: int) -> None:
    made = processed(mllama.default_images, plain(height, width), max_image_tiles=2)
    assert array(made, "aspect_ratio_ids").tolist() == [[ratio]]


@requirement("MLLAMA-IMG-045", "MLLAMA-IMG-019", "MLLAMA-IMG-024", "MLLAMA-IMG-046")
@pytest.mark.parametrize("most", range(1, 7))
def test_images_of_random_sizes_become_the_tiles_of_the_rules(mllama: MllamaObjects, most: int) -> None:
    seed = secrets.randbits(32)
    generator = np.random.Generator(np.random.PCG64(seed))
    processor = mllama.new_image_processor(TILE, most)
    for _ in range(RANDOM_SIZES // 6):
        # Lengths and ratios over orders of magnitude, but no side of 1 or 3 pixels and none that would vanish.
        height = float(np.exp(generator.uniform(np.log(4), np.log(300))))
        width = min(max(height * float(np.exp(generator.uniform(-3.2, 3.2))), 4.0), 600.0)
        height, width = int(height), int(width)
        pixels = picture(height, width, int(generator.integers(1 << 30)))
        made = processed(processor, Image(pixels))
        tiles, ratio = rules.tiles_of(pixels, TILE, most)
        about = f"seed {seed}, {width}x{height}, {most} tiles at most"
        assert array(made, "aspect_ratio_ids").tolist() == [[ratio]], about
        assert made.get("num_tiles")[0][0] <= most, about
        np.testing.assert_array_equal(array(made, "pixel_values")[0, 0], tiles, err_msg=about)


@requirement("MLLAMA-IMG-047")
@pytest.mark.parametrize(("width", "height"), [(1, 2000), (2000, 1), (2000, 7), (4, 5000), (900, 2)])
@pytest.mark.parametrize("most", [1, 4])
def test_extremely_long_images_keep_a_pixel(mllama: MllamaObjects, width: int, height: int, most: int) -> None:
    pixels = picture(height, width, 5)
    made = processed(mllama.new_image_processor(TILE, most), Image(pixels))
    tiles, ratio = rules.tiles_of(pixels, TILE, most)
    assert array(made, "aspect_ratio_ids").tolist() == [[ratio]]
    np.testing.assert_array_equal(array(made, "pixel_values")[0, 0], tiles)


@requirement("MLLAMA-IMG-024")
@pytest.mark.parametrize("most", range(1, 7))
def test_no_image_gets_more_tiles_than_allowed(mllama: MllamaObjects, most: int) -> None:
    sizes = [(10, 10), (400, 400), (400, 30), (30, 400), (200, 90), (90, 200)]
    made = processed(mllama.new_image_processor(TILE, most), [plain(*size) for size in sizes])
    counts = made.get("num_tiles")[0]
    assert max(counts) <= most
    assert array(made, "pixel_values").shape[2] == most


@requirement("MLLAMA-IMG-027", "MLLAMA-IMG-028")
@pytest.mark.parametrize(("height", "width"), [(20, 30), (100, 33), (31, 240), (300, 300), (57, 56), (240, 31)])
def test_resize_keeps_the_ratio_within_the_canvas(mllama: MllamaObjects, height: int, width: int) -> None:
    size = {"height": TILE, "width": TILE}
    pixels = picture(height, width).transpose(2, 0, 1)
    resized, grid = mllama.images.call("resize", pixels, size, 4)
    grid = tuple(int(count) for count in grid)
    after = resized.shape[1:]
    assert grid == rules.arrangement((height, width), TILE, 4)
    assert after[0] <= grid[0] * TILE, f"{after} does not fit {grid}"
    assert after[1] <= grid[1] * TILE, f"{after} does not fit {grid}"
    assert rules.distortion((height, width), after) < 1, f"{height}x{width} became {after}"


@requirement("MLLAMA-IMG-025")
def test_pad_puts_zeros_at_the_bottom_and_right_up_to_the_canvas(mllama: MllamaObjects) -> None:
    pixels = np.full((3, 100, 300), 9, np.uint8)
    padded = mllama.default_images.call("pad", pixels, {"height": 224, "width": 224}, Tuple((1, 2)))
    assert padded.shape == (3, 224, 448)
    np.testing.assert_array_equal(padded[:, :100, :300], 9)
    assert not padded[:, 100:].any()
    assert not padded[:, :, 300:].any()


# packing ----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-IMG-016", "MLLAMA-IMG-017")
def test_preprocess_returns_four_entries(mllama: MllamaObjects) -> None:
    made = processed(mllama.images, [[image(20, 25)], [image(28, 50), image(28, 28)]])
    assert keys(made) == {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "num_tiles"}
    assert made.get("num_tiles") == [[1], [2, 1]], "nested lists, one number for each image"


@requirement("MLLAMA-IMG-018", "MLLAMA-PROC-005")
def test_pixel_values_have_a_place_for_every_image_and_tile(mllama: MllamaObjects) -> None:
    made = processed(mllama.images, [[image(20, 20)], [image(28, 28), image(12, 20)]])
    found = array(made, "pixel_values")
    assert found.shape == (2, 2, 4, 3, TILE, TILE), "four places although every image has one tile"
    assert found.dtype == np.float32
    assert not found[:, :, 1:].any(), "places without a tile are 0"
    assert not found[0, 1].any(), "places without an image are 0"


@requirement("MLLAMA-IMG-019", "MLLAMA-IMG-021", "MLLAMA-IMG-022", "MLLAMA-IMG-023")
def test_ratios_and_masks_of_a_batch(mllama: MllamaObjects) -> None:
    made = processed(mllama.images, [[image(28, 56)], [image(56, 28), image(56, 56)]])
    assert array(made, "aspect_ratio_ids").tolist() == [[2, 0], [5, 6]]
    wanted = [[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 1]]]
    assert array(made, "aspect_ratio_mask").tolist() == wanted
    assert array(made, "aspect_ratio_ids").dtype == np.int64


@requirement("MLLAMA-IMG-033")
def test_every_image_is_padded_to_its_own_canvas(mllama: MllamaObjects) -> None:
    alone = [array(processed(mllama.images, [[each]]), "pixel_values")[0, 0] for each in (image(20, 90), image(28, 28))]
    both = array(processed(mllama.images, [[image(20, 90), image(28, 28)]]), "pixel_values")[0]
    for found, wanted in zip(both, alone, strict=True):
        np.testing.assert_array_equal(found, wanted)


@requirement("MLLAMA-IMG-046")
def test_tiles_are_cut_row_by_row(mllama: MllamaObjects) -> None:
    quarters = np.repeat(np.repeat(np.array([[10, 20], [30, 40]], np.uint8), TILE, 0), TILE, 1)
    made = processed(mllama.images, Image(np.stack([quarters] * 3, axis=-1)))
    tiles = array(made, "pixel_values")[0, 0]
    assert [sorted(set(tile.reshape(-1).tolist())) for tile in tiles] == [[10], [20], [30], [40]]


@requirement("MLLAMA-IMG-042")
def test_an_image_a_list_and_a_list_of_lists_are_accepted(mllama: MllamaObjects) -> None:
    one, two = image(20, 30), image(30, 20)
    leading = [
        array(processed(mllama.images, each), "pixel_values").shape[:2] for each in (one, [one, two], [[one], [two]])
    ]
    assert leading == [(1, 1), (1, 2), (2, 1)]


# values -----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-IMG-034")
def test_values_are_rescaled_and_normalised_and_padding_as_zeros_are(mllama: MllamaObjects) -> None:
    mean, deviation = [0.2, 0.4, 0.6], [0.5, 0.25, 0.125]
    processor = mllama.new_image_processor(
        TILE, do_rescale=True, do_normalize=True, image_mean=mean, image_std=deviation
    )
    made = array(processed(processor, plain(14, 28, 255)), "pixel_values")[0, 0, 0]
    for channel in range(3):
        white = (1 - mean[channel]) / deviation[channel]
        black = (0 - mean[channel]) / deviation[channel]
        np.testing.assert_allclose(made[channel, :14], white, rtol=1e-6)
        np.testing.assert_allclose(made[channel, 14:], black, rtol=1e-6, err_msg="padding is 0 before normalising")


@requirement("MLLAMA-IMG-036")
def test_transparency_becomes_white(mllama: MllamaObjects) -> None:
    pixels = np.full((28, 28, 4), 40, np.uint8)
    pixels[:14, :, 3] = 0
    pixels[14:, :, 3] = 255
    made = array(processed(mllama.images, Image(pixels, "RGBA")), "pixel_values")[0, 0, 0]
    assert made.shape == (3, 28, 28)
    assert set(made[:, :14].reshape(-1).tolist()) == {255}
    assert set(made[:, 14:].reshape(-1).tolist()) == {40}


@requirement("MLLAMA-IMG-037")
def test_four_channels_stay_four_when_a_call_asks_for_that(mllama: MllamaObjects) -> None:
    pixels = np.full((28, 28, 4), 200, np.uint8)
    made = processed(mllama.images, Image(pixels, "RGBA"), do_convert_rgb=False)
    assert array(made, "pixel_values").shape == (1, 1, 4, 4, 28, 28)


@requirement("MLLAMA-IMG-038")
def test_channels_may_come_first_or_last(mllama: MllamaObjects) -> None:
    pixels = picture(20, 45)
    last = array(processed(mllama.images, pixels), "pixel_values")
    first = array(processed(mllama.images, np.ascontiguousarray(pixels.transpose(2, 0, 1))), "pixel_values")
    np.testing.assert_array_equal(first, last)
    np.testing.assert_array_equal(last, array(processed(mllama.images, Image(pixels)), "pixel_values"))


# options ----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-IMG-039", "MLLAMA-IMG-040")
def test_arrays_without_return_tensors_and_tensors_with_pt(mllama: MllamaObjects) -> None:
    kinds = []
    for options in ({}, {"return_tensors": "pt"}):
        made = mllama.images.call("preprocess", image(20, 30), **options)
        kinds.append(made.type_of("pixel_values")[0])
        assert array(made, "pixel_values").shape == (1, 1, 4, 3, TILE, TILE)
    assert kinds == ["ndarray", "Tensor"]


@requirement("MLLAMA-IMG-041")
def test_size_and_tiles_may_be_given_for_a_call(mllama: MllamaObjects) -> None:
    made = processed(mllama.images, image(60, 60), size={"height": 56, "width": 56}, max_image_tiles=2)
    assert array(made, "pixel_values").shape == (1, 1, 2, 3, 56, 56)
    assert mllama.images.get("size.height") == TILE, "the call changed the processor"
