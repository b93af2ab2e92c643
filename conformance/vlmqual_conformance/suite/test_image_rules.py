"""Geometry of Idefics3's images: sizes, grids, tiles, order of frames."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite import idefics3_rules as rules
from vlmqual_conformance.suite.library_objects import (
    Idefics3Objects,
    array,
    error_of,
    idefics3_objects,
    image,
    picture,
)
from vlmqual_contract.subject import Handle, Image, RemoteLibrary
from vlmqual_contract.target import Array

TILE = 28
EDGE = 4 * TILE


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


def processed(processor: Handle, images: Any, **options: Any) -> tuple[Array, Any, Any]:
    """Pixel values, rows and columns."""
    made = processor.call("preprocess", images, return_tensors="np", return_row_col_info=True, **options)
    return array(made, "pixel_values"), made.get("rows"), made.get("cols")


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [(800, 600, 3, 4), (1920, 1080, 3, 4), (37, 900, 4, 1), (900, 37, 1, 4), (100, 50, 2, 4)],
)
@requirement("IDEFICS3-IMG-015", "IDEFICS3-IMG-016", "IDEFICS3-CARD-006", "IDEFICS3-CARD-007")
def test_default_geometry_is_1456_pixels_in_tiles_of_364(
    idefics3: Idefics3Objects, width: int, height: int, rows: int, columns: int
) -> None:
    plain = Image(np.full((height, width, 3), 90, np.uint8))
    made = idefics3.default_images.call("preprocess", plain, return_tensors="np", return_row_col_info=True)
    assert (made.get("rows"), made.get("cols")) == ([[rows]], [[columns]]), f"{width}x{height} is {rows} by {columns}"
    assert tuple(made.get("pixel_values.shape")) == (1, rows * columns + 1, 3, 364, 364)


@requirement("IDEFICS3-IMG-016", "IDEFICS3-IMG-022", "IDEFICS3-IMG-023")
@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [
        (80, 60, (30, 40)),
        (60, 80, (40, 30)),
        (20, 10, (20, 40)),
        (40, 40, (40, 40)),
        (37, 90, (40, 16)),
        (100, 33, (14, 40)),
        (7, 7, (40, 40)),
    ],
)
def test_the_longest_edge_is_met_exactly_and_the_other_keeps_the_ratio(
    idefics3: Idefics3Objects, width: int, height: int, wanted: tuple[int, int]
) -> None:
    processor = idefics3.new_image_processor(2, 20)  # tiles of 2 pixels: the grid is half the resized size
    _, rows, columns = processed(processor, image(height, width))
    assert (2 * rows[0][0], 2 * columns[0][0]) == wanted, f"{width}x{height} with longest edge 40, height first"


@requirement("IDEFICS3-IMG-022")
@pytest.mark.parametrize(("width", "height"), [(40, 1), (50, 3), (143, 4), (1, 1), (3, 3), (600, 5)])
def test_images_a_few_pixels_high_are_not_taken_for_channels_first(
    idefics3: Idefics3Objects, width: int, height: int
) -> None:
    pixels = picture(height, width)
    values, rows, columns = processed(idefics3.images, Image(pixels, "RGB"))
    assert (rows[0][0], columns[0][0]) == rules.grid((height, width), TILE, EDGE)
    np.testing.assert_array_equal(values[0], rules.frames(pixels, TILE, EDGE))


@requirement("IDEFICS3-IMG-022")
@pytest.mark.parametrize(("width", "height"), [(1, 40), (2, 60), (3, 50), (5, 600)])
def test_extremely_narrow_images_keep_at_least_one_pixel(idefics3: Idefics3Objects, width: int, height: int) -> None:
    pixels = picture(height, width)
    values, rows, columns = processed(idefics3.images, Image(pixels))
    assert (rows[0][0], columns[0][0]) == rules.grid((height, width), TILE, EDGE)
    np.testing.assert_array_equal(values[0], rules.frames(pixels, TILE, EDGE))


@requirement("IDEFICS3-IMG-015", "IDEFICS3-IMG-022", "IDEFICS3-IMG-024", "IDEFICS3-IMG-025", "IDEFICS3-IMG-047")
def test_grids_and_pixels_of_300_random_images_follow_the_rules(idefics3: Idefics3Objects) -> None:
    seed = secrets.randbits(32)
    sizes = np.random.Generator(np.random.PCG64(seed)).integers(5, 220, (15, 20, 2)).tolist()
    for sample in sizes:
        pixels = [picture(height, width, seed=height * 1000 + width) for height, width in sample]
        values, rows, columns = processed(idefics3.images, [[Image(item)] for item in pixels])
        for index, item in enumerate(pixels):
            where = f"image {item.shape[1]}x{item.shape[0]} (width x height) of seed {seed}"
            found = rows[index][0], columns[index][0]
            assert found == rules.grid(item.shape[:2], TILE, EDGE), f"{where}: grid {found}"
            wanted = rules.frames(item, TILE, EDGE)
            np.testing.assert_array_equal(values[index, : len(wanted)], wanted, err_msg=where)
            assert not values[index, len(wanted) :].any(), f"{where}: slots after its frames are not zero"


@requirement("IDEFICS3-IMG-018", "IDEFICS3-IMG-044")
@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_size_sets_the_resolution(idefics3: Idefics3Objects, tiles: int) -> None:
    edge = tiles * TILE
    wanted = rules.grid((60, 80), TILE, edge)
    pixels = picture(60, 80)
    made = processed(idefics3.new_image_processor(TILE, tiles, do_rescale=False, do_normalize=False), Image(pixels))
    assert (made[1][0][0], made[2][0][0]) == wanted
    np.testing.assert_array_equal(made[0][0], rules.frames(pixels, TILE, edge))
    called = processed(idefics3.images, Image(pixels), size={"longest_edge": edge})
    np.testing.assert_array_equal(called[0], made[0], err_msg="size at the call is not size at the constructor")


@requirement("IDEFICS3-IMG-018")
def test_two_tiles_of_364_split_800_by_600_into_2_by_2(idefics3: Idefics3Objects) -> None:
    processor = idefics3.new_image_processor(364, 2)
    made = processor.call("preprocess", image(600, 800), return_tensors="np", return_row_col_info=True)
    assert (made.get("rows"), made.get("cols")) == ([[2]], [[2]])
    assert tuple(made.get("pixel_values.shape")) == (1, 5, 3, 364, 364)


@requirement("IDEFICS3-IMG-019")
@pytest.mark.parametrize("tile", [8, 14, 28, 56])
def test_max_image_size_is_the_side_of_every_frame(idefics3: Idefics3Objects, tile: int) -> None:
    pixels = picture(60, 80)
    values, rows, columns = processed(idefics3.images, Image(pixels), max_image_size={"longest_edge": tile})
    assert values.shape[-2:] == (tile, tile)
    assert (rows[0][0], columns[0][0]) == rules.grid((60, 80), tile, EDGE)
    np.testing.assert_array_equal(values[0], rules.frames(pixels, tile, EDGE))


@requirement("IDEFICS3-IMG-020", "IDEFICS3-IMG-021")
@pytest.mark.parametrize(("height", "width"), [(20, 25), (28, 28), (50, 100), (57, 29), (29, 28), (56, 84)])
def test_without_resizing_the_original_size_decides_the_grid_and_frames_stay_tiles(
    idefics3: Idefics3Objects, height: int, width: int
) -> None:
    pixels = picture(height, width)
    values, rows, columns = processed(idefics3.images, Image(pixels), do_resize=False)
    assert (rows[0][0], columns[0][0]) == rules.grid((height, width), TILE)
    np.testing.assert_array_equal(values[0], rules.frames(pixels, TILE))


@requirement("IDEFICS3-IMG-021")
@pytest.mark.parametrize(("width", "height", "rows", "columns"), [(100, 50, 0, 0), (800, 600, 3, 3)])
def test_without_resizing_tiles_of_364_count_the_original_size(
    idefics3: Idefics3Objects, width: int, height: int, rows: int, columns: int
) -> None:
    made = idefics3.default_images.call(
        "preprocess", image(height, width), do_resize=False, return_tensors="np", return_row_col_info=True
    )
    assert (made.get("rows"), made.get("cols")) == ([[rows]], [[columns]])
    assert tuple(made.get("pixel_values.shape")) == (1, rows * columns + 1, 3, 364, 364)


@requirement("IDEFICS3-IMG-017", "IDEFICS3-IMG-027")
@pytest.mark.parametrize("size", [28, {"height": 28, "width": 28}])
def test_max_image_size_is_a_mapping_with_longest_edge(idefics3: Idefics3Objects, size: Any) -> None:
    def use() -> None:
        idefics3.new_image_processor(max_image_size=size).call("preprocess", image(30, 40), return_tensors="np")

    assert error_of(use) is not None, f"max_image_size={size!r} is taken, although only longest_edge is defined"


@requirement("IDEFICS3-IMG-024")
def test_the_last_frame_is_the_whole_image_in_one_tile(idefics3: Idefics3Objects) -> None:
    pixels = picture(75, 110)
    values, rows, columns = processed(idefics3.images, Image(pixels))
    assert len(values[0]) == rows[0][0] * columns[0][0] + 1 > 2
    np.testing.assert_array_equal(values[0, -1], rules.frames(pixels, TILE, EDGE)[-1])


@requirement("IDEFICS3-IMG-025")
def test_tiles_are_the_crops_of_the_resized_image_row_by_row(idefics3: Idefics3Objects) -> None:
    pixels = picture(EDGE, EDGE)  # stays as it is, so that tiles can be cut from the input itself
    values, _, _ = processed(idefics3.images, Image(pixels))
    for index in range(16):
        top, left = TILE * (index // 4), TILE * (index % 4)
        wanted = pixels[top : top + TILE, left : left + TILE].transpose(2, 0, 1)
        np.testing.assert_array_equal(values[0, index], wanted, err_msg=f"frame {index}")


@requirement("IDEFICS3-IMG-026")
@pytest.mark.parametrize(("height", "width"), [(60, 80), (112, 28), (5, 7)])
def test_without_splitting_an_image_is_one_frame(idefics3: Idefics3Objects, height: int, width: int) -> None:
    pixels = picture(height, width)
    values, rows, columns = processed(idefics3.images, Image(pixels), do_image_splitting=False)
    assert (rows, columns) == ([[0]], [[0]])
    np.testing.assert_array_equal(values[0], rules.frames(pixels, TILE, EDGE, split=False))


@requirement("IDEFICS3-IMG-045")
@pytest.mark.parametrize(("height", "width", "edge"), [(100, 90, TILE), (28, 28, TILE), (40, 40, TILE - 4)])
def test_an_image_that_fits_into_a_tile_is_not_split(
    idefics3: Idefics3Objects, height: int, width: int, edge: int
) -> None:
    pixels = picture(height, width)
    values, rows, columns = processed(idefics3.images, Image(pixels), size={"longest_edge": edge})
    assert (rows, columns) == ([[0]], [[0]])
    np.testing.assert_array_equal(values[0], rules.frames(pixels, TILE, edge))


@requirement("IDEFICS3-CARD-008", "IDEFICS3-CARD-009", "IDEFICS3-CARD-010", "IDEFICS3-CARD-006")
@pytest.mark.parametrize("tiles", [2, 3, 5])
def test_a_processor_can_be_loaded_with_another_resolution(idefics3: Idefics3Objects, tiles: int) -> None:
    name = "AutoProcessor" if idefics3.library.exists("AutoProcessor") else "Idefics3Processor"
    processor = idefics3.call(
        f"{name}.from_pretrained", str(idefics3.checkpoint), size={"longest_edge": tiles * 112}
    ).get("image_processor")
    made = processor.call("preprocess", image(200, 200), return_tensors="np", return_row_col_info=True)
    assert (made.get("rows"), made.get("cols")) == ([[tiles]], [[tiles]])
    assert tuple(made.get("pixel_values.shape")) == (1, tiles**2 + 1, 3, 112, 112)


@requirement("IDEFICS3-CARD-012")
@pytest.mark.parametrize(
    ("edge", "tile", "height", "width"), [(2184, 364, 40, 1000), (4096, 512, 24, 1024), (5000, 512, 40, 5000)]
)
def test_resolutions_beyond_five_tiles_work_up_to_4096_pixels(
    idefics3: Idefics3Objects, edge: int, tile: int, height: int, width: int
) -> None:
    processor = idefics3.new_image_processor(tile, size={"longest_edge": edge}, do_rescale=False, do_normalize=False)
    made = processor.call("preprocess", image(height, width), return_tensors="np", return_row_col_info=True)
    wanted = rules.grid((height, width), tile, edge)
    assert (made.get("rows"), made.get("cols")) == ([[wanted[0]]], [[wanted[1]]])
    assert wanted[1] == min(edge, 4096) // tile
