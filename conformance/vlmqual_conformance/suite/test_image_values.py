"""Values and layout of Idefics3's pixel tensors: scaling, colour, padding, formats, and the goldens."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite import idefics3_rules as rules
from vlmqual_conformance.suite.library_objects import (
    Idefics3Objects,
    array,
    error_of,
    idefics3_objects,
    image,
    keys,
    picture,
)
from vlmqual_contract import fixtures
from vlmqual_contract.subject import Handle, Image, RemoteLibrary, Tensor
from vlmqual_contract.target import Array

TILE = 28
EDGE = 4 * TILE
RELEASED = ("astronaut.png", "china.png", "page-invoice.png", "edge-5000x40.png", "edge-40x5000.png", "edge-1x40.png")


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


def values(processor: Handle, images: Any, **options: Any) -> Array:
    """Pixel values of a call."""
    return array(processor.call("preprocess", images, return_tensors="np", **options), "pixel_values")


def solid(level: int) -> Image:
    """An image of one grey level."""
    return Image(np.full((40, 60, 3), level, np.uint8))


# goldens ----------------------------------------------------------------------------------------------------------


@cache
def goldens() -> dict[str, Any]:
    """Entries of the pixel goldens."""
    entries: dict[str, Any] = json.loads(fixtures.file("goldens/idefics3/pixels.json").read_text("utf-8"))["entries"]
    return entries


def file_mode(name: str) -> tuple[str, bool]:
    """PIL mode of a fixture image, and whether its EXIF data turn it."""
    with PIL.Image.open(fixtures.image(name)) as opened:
        return opened.mode, opened.getexif().get(0x0112, 1) != 1


def names(kind: str) -> list[str]:
    """Fixture images of a kind: upright, turned, other-mode, low."""
    found: dict[str, list[str]] = {"upright": [], "turned": [], "other-mode": [], "low": []}
    for path in fixtures.names("images/"):
        name = path.removeprefix("images/")
        if name.endswith(".md"):
            continue
        mode, turned = file_mode(name)
        with PIL.Image.open(fixtures.image(name)) as opened:
            low = opened.height in (1, 3)
        found["turned" if turned else "other-mode" if mode != "RGB" else "low" if low else "upright"].append(name)
    return found[kind]


def compare(processor: Handle, name: str, key: str) -> None:
    """The tensors of one image, in memory as its file has it, have the digests of a golden entry."""
    entry = goldens()[key]
    made = processor.call("preprocess", [[Image(fixtures.image(name))]], return_tensors="np", return_row_col_info=True)
    assert (made.get("rows"), made.get("cols")) == ([[entry["rows"]]], [[entry["cols"]]])
    for tensor in ("pixel_values", "pixel_attention_mask"):
        found, wanted = array(made, tensor), entry[tensor]
        assert list(found.shape) == wanted["shape"], f"{name}: shape of {tensor}"
        found = np.ascontiguousarray(found, np.dtype(wanted["dtype"]))
        sample = found.reshape(-1)[wanted["sample"]["index"]].tolist()
        assert sample == wanted["sample"]["value"], f"{name}: {tensor} differs at sampled places"
        digest = hashlib.sha256(found.tobytes()).hexdigest()
        assert digest == wanted["sha256"], f"{name}: {tensor} is equal at sampled places, but not everywhere"


@requirement("IDEFICS3-IMG-015", "IDEFICS3-IMG-028", "IDEFICS3-IMG-047")
@pytest.mark.parametrize("name", names("upright"))
def test_pixels_of_every_rgb_image_are_those_of_the_golden(idefics3: Idefics3Objects, name: str) -> None:
    compare(idefics3.processor.get("image_processor"), name, f"{name}|idefics3-tiny|path")


@requirement("IDEFICS3-IMG-015", "IDEFICS3-IMG-028", "IDEFICS3-IMG-047", "IDEFICS3-CARD-006")
@pytest.mark.parametrize("name", RELEASED)
def test_pixels_with_the_released_geometry_are_those_of_the_golden(idefics3: Idefics3Objects, name: str) -> None:
    compare(idefics3.default_images, name, f"{name}|idefics3-8b-processor|path")


@requirement("IDEFICS3-IMG-022", "IDEFICS3-IMG-047")
@pytest.mark.parametrize("name", names("low"))
def test_pixels_of_images_a_few_pixels_high_are_those_of_the_golden(idefics3: Idefics3Objects, name: str) -> None:
    compare(idefics3.processor.get("image_processor"), name, f"{name}|idefics3-tiny|path")


@requirement("IDEFICS3-IMG-015", "IDEFICS3-IMG-047")
@pytest.mark.parametrize("name", names("turned"))
def test_an_image_in_memory_is_not_turned_by_its_exif_data(idefics3: Idefics3Objects, name: str) -> None:
    compare(idefics3.processor.get("image_processor"), name, f"{name}|idefics3-tiny|pil")


@requirement("IDEFICS3-IMG-032", "IDEFICS3-IMG-033")
@pytest.mark.parametrize("name", names("other-mode"))
def test_pixels_of_images_of_other_modes_are_those_of_the_golden(idefics3: Idefics3Objects, name: str) -> None:
    compare(idefics3.processor.get("image_processor"), name, f"{name}|idefics3-tiny|pil")


# values -----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-IMG-028")
@pytest.mark.parametrize("level", [0, 1, 127, 128, 255])
def test_values_are_scaled_then_normalized(idefics3: Idefics3Objects, level: int) -> None:
    mean, deviation = [0.1, 0.4, 0.7], [0.2, 0.5, 1.5]
    processor = idefics3.new_image_processor(image_mean=mean, image_std=deviation)
    found = values(processor, solid(level))
    for channel in range(3):
        wanted = (level / 255 - mean[channel]) / deviation[channel]
        np.testing.assert_allclose(found[:, :, channel], wanted, atol=2e-6)


@requirement("IDEFICS3-IMG-028")
def test_the_rescale_factor_is_the_given_one(idefics3: Idefics3Objects) -> None:
    found = values(idefics3.new_image_processor(), solid(100), rescale_factor=1 / 50)
    np.testing.assert_allclose(found, (2.0 - 0.5) / 0.5, atol=2e-6)


@requirement("IDEFICS3-IMG-029")
def test_without_normalization_values_are_between_0_and_1(idefics3: Idefics3Objects) -> None:
    pixels = picture(60, 80)
    found = values(idefics3.new_image_processor(do_normalize=False), Image(pixels))
    np.testing.assert_allclose(found[0], rules.frames(pixels, TILE, EDGE) / 255, atol=1e-6)
    assert found.max() > 0.99


@requirement("IDEFICS3-IMG-030")
def test_without_rescaling_and_normalization_values_are_grey_levels(idefics3: Idefics3Objects) -> None:
    found = values(idefics3.images, solid(255))
    assert found.min() == found.max() == 255


@requirement("IDEFICS3-IMG-031")
def test_mean_and_deviation_may_be_single_numbers(idefics3: Idefics3Objects) -> None:
    single = idefics3.new_image_processor(image_mean=0.25, image_std=0.5)
    np.testing.assert_allclose(values(single, solid(255)), (1 - 0.25) / 0.5, atol=2e-6)


@requirement("IDEFICS3-IMG-047")
@pytest.mark.parametrize(("height", "width"), [(37, 90), (300, 200), (13, 13)])
def test_resizing_is_pil_lanczos_on_8_bit_values(idefics3: Idefics3Objects, height: int, width: int) -> None:
    pixels = picture(height, width)
    found = values(idefics3.images, Image(pixels), do_image_splitting=False, size={"longest_edge": 96})
    first = PIL.Image.fromarray(pixels).resize(rules.resized((height, width), 96)[::-1], PIL.Image.Resampling.LANCZOS)
    wanted = np.asarray(first.resize((TILE, TILE), PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    np.testing.assert_array_equal(found[0, 0], wanted)


@requirement("IDEFICS3-IMG-044")
def test_every_option_can_be_given_for_one_call(idefics3: Idefics3Objects) -> None:
    options: dict[str, Any] = {
        "do_image_splitting": False,
        "max_image_size": {"longest_edge": 20},
        "size": {"longest_edge": 50},
        "resample": 3,
        "do_normalize": False,
        "rescale_factor": 0.5,
    }
    found = values(idefics3.new_image_processor(), image(30, 40), **options)
    made = values(idefics3.new_image_processor(**options), image(30, 40))
    assert found.shape == (1, 1, 3, 20, 20)
    np.testing.assert_array_equal(found, made)
    shifted = values(idefics3.images, solid(10), do_normalize=True, image_mean=[4.0] * 3, image_std=[2.0] * 3)
    np.testing.assert_allclose(shifted, 3.0)
    assert values(idefics3.images, image(56, 56), do_resize=False).shape[1] == 5


# colour -----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-IMG-032")
def test_an_rgba_image_is_put_on_white(idefics3: Idefics3Objects) -> None:
    pixels = np.concatenate([picture(60, 80), picture(60, 80, seed=1)[..., :1]], axis=-1)
    found = values(idefics3.images, Image(pixels, "RGBA"))
    white = PIL.Image.new("RGBA", (80, 60), (255, 255, 255))
    white.alpha_composite(PIL.Image.fromarray(pixels))
    np.testing.assert_array_equal(found[0], rules.frames(np.asarray(white.convert("RGB")), TILE, EDGE))


@requirement("IDEFICS3-IMG-033")
@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK"])
def test_images_of_other_modes_become_rgb(idefics3: Idefics3Objects, mode: str) -> None:
    converted = PIL.Image.fromarray(picture(60, 80)).convert(mode)
    found = values(idefics3.images, Image(picture(60, 80), mode))
    np.testing.assert_array_equal(found[0], rules.frames(np.asarray(converted.convert("RGB")), TILE, EDGE))


@requirement("IDEFICS3-IMG-034")
def test_an_array_with_four_channels_becomes_rgb(idefics3: Idefics3Objects) -> None:
    pixels = picture(60, 80)
    opaque = np.concatenate([pixels, np.full((60, 80, 1), 255, np.uint8)], axis=-1)
    np.testing.assert_array_equal(values(idefics3.images, [opaque])[0], rules.frames(pixels, TILE, EDGE))


# batches ----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-IMG-035", "IDEFICS3-IMG-036")
def test_batches_are_padded_with_zero_frames_that_the_mask_marks(idefics3: Idefics3Objects) -> None:
    first, second, third = solid(200), image(56, 112), image(30, 30)
    made = idefics3.new_image_processor().call("preprocess", [[first, third], [second]], return_tensors="np")
    pixels, mask = array(made, "pixel_values"), array(made, "pixel_attention_mask")
    counts = [3 * 4 + 1 + 4 * 4 + 1, 2 * 4 + 1]
    assert pixels.shape == (2, counts[0], 3, TILE, TILE)
    assert mask.shape == (2, counts[0], TILE, TILE)
    for row, count in enumerate(counts):
        assert (mask[row, :count] == 1).all(), "a real frame is masked"
        assert (mask[row, count:] == 0).all(), "a padding frame is not masked"
        assert (pixels[row, count:] == 0).all(), "a padding frame is not zero"
    alone = values(idefics3.new_image_processor(), [[second]])
    np.testing.assert_array_equal(pixels[1, : counts[1]], alone[0])


@requirement("IDEFICS3-IMG-035")
def test_without_splitting_a_batch_has_one_slot_for_each_image(idefics3: Idefics3Objects) -> None:
    images = [[image(30, 40)], [image(50, 20), image(28, 28)]]
    made = idefics3.new_image_processor().call("preprocess", images, return_tensors="np", do_image_splitting=False)
    pixels = array(made, "pixel_values")
    assert pixels.shape == (2, 2, 3, TILE, TILE)
    assert not pixels[0, 1].any()
    assert pixels[1].any(axis=(1, 2, 3)).all()


@requirement("IDEFICS3-IMG-037")
def test_without_padding_there_are_nested_lists_and_no_mask(idefics3: Idefics3Objects) -> None:
    made = idefics3.images.call("preprocess", [[image(60, 80)], [image(28, 112)]], do_pad=False)
    assert "pixel_attention_mask" not in keys(made)
    pixels = made.get("pixel_values")
    assert isinstance(pixels, list)
    assert [len(sample) for sample in pixels] == [13, 5]
    assert all(np.shape(frame) == (3, TILE, TILE) for sample in pixels for frame in sample)


@requirement("IDEFICS3-IMG-038")
def test_without_return_tensors_there_are_nested_lists_of_arrays(idefics3: Idefics3Objects) -> None:
    pixels = idefics3.images.call("preprocess", image(60, 80)).get("pixel_values")
    assert isinstance(pixels, list), "pixel_values is no list"
    assert isinstance(pixels[0], list), "pixel_values[0] is no list"
    assert isinstance(pixels[0][0], np.ndarray)


@requirement("IDEFICS3-IMG-039")
def test_return_tensors_selects_the_framework(idefics3: Idefics3Objects) -> None:
    kinds = {}
    for name in ("np", "pt"):
        made = idefics3.images.call("preprocess", image(30, 40), return_tensors=name)
        for key in ("pixel_values", "pixel_attention_mask"):
            kinds[name, key] = made.type_of(key)[0]
    assert {kind for (name, _), kind in kinds.items() if name == "np"} == {"ndarray"}
    assert {kind for (name, _), kind in kinds.items() if name == "pt"} == {"Tensor"}


@requirement("IDEFICS3-IMG-040")
def test_rows_and_columns_are_returned_only_when_asked_for(idefics3: Idefics3Objects) -> None:
    images = [[image(60, 80), image(28, 28)], [image(28, 112)]]
    plain = idefics3.images.call("preprocess", images, return_tensors="np")
    assert keys(plain) == {"pixel_values", "pixel_attention_mask"}
    asked = idefics3.images.call("preprocess", images, return_tensors="np", return_row_col_info=True)
    assert keys(asked) == {"pixel_values", "pixel_attention_mask", "rows", "cols"}
    assert (asked.get("rows"), asked.get("cols")) == ([[3, 4], [1]], [[4, 4], [4]])


# formats ----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-IMG-041")
def test_channels_come_first_unless_data_format_says_otherwise(idefics3: Idefics3Objects) -> None:
    first = values(idefics3.images, image(60, 80))
    named = values(idefics3.images, image(60, 80), data_format="channels_first")
    assert first.shape == named.shape == (1, 13, 3, TILE, TILE)
    last = values(idefics3.images, image(60, 80), data_format="channels_last")
    assert last.shape == (1, 13, TILE, TILE, 3)
    np.testing.assert_array_equal(last, first.transpose(0, 1, 3, 4, 2))


@requirement("IDEFICS3-IMG-051")
def test_an_unset_data_format_keeps_the_format_of_the_input(idefics3: Idefics3Objects) -> None:
    found = values(idefics3.images, [picture(60, 80)], data_format=None)
    assert found.shape == (1, 13, TILE, TILE, 3)


@requirement("IDEFICS3-IMG-042")
@pytest.mark.parametrize("options", [{}, {"input_data_format": "channels_first"}])
def test_arrays_with_channels_first_are_taken(idefics3: Idefics3Objects, options: dict[str, Any]) -> None:
    pixels = picture(60, 80)
    found = values(idefics3.images, [np.ascontiguousarray(pixels.transpose(2, 0, 1))], **options)
    np.testing.assert_array_equal(found[0], rules.frames(pixels, TILE, EDGE))


@requirement("IDEFICS3-IMG-048")
def test_tensors_are_taken_as_images(idefics3: Idefics3Objects) -> None:
    pixels = picture(60, 80)
    found = values(idefics3.images, [Tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))])
    np.testing.assert_array_equal(found[0], rules.frames(pixels, TILE, EDGE))


@requirement("IDEFICS3-IMG-050")
def test_images_without_channels_have_no_input_data_format(idefics3: Idefics3Objects) -> None:
    def use() -> None:
        idefics3.images.call("preprocess", [picture(30, 40)[..., 0]], input_data_format="none", return_tensors="np")

    assert error_of(use) is not None, "input_data_format='none' is taken, although no such format is defined"


@requirement("IDEFICS3-IMG-043")
@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (image(28, 28), (1, 17)),
        ([image(28, 28), image(28, 56)], (1, 26)),
        ([[image(28, 28)], [image(28, 56)]], (2, 17)),
        ([[image(28, 28)], [image(28, 56), image(28, 28)]], (2, 26)),
    ],
    ids=["one image", "a list", "a list of lists", "lists of different lengths"],
)
def test_images_may_be_single_a_list_or_a_list_of_lists(
    idefics3: Idefics3Objects, images: Any, shape: tuple[int, int]
) -> None:
    assert values(idefics3.images, images).shape[:2] == shape
