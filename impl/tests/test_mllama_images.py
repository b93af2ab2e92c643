"""The image rules of Mllama, each against the documented rule, exact arithmetic, numpy or Pillow."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmqual_impl import images_mllama as images

SIDES = st.integers(1, 4000)
TILES = st.sampled_from([14, 28, 56, 224, 448, 560])
COUNTS = st.integers(1, 8)


def _noise(height: int, width: int, channels: int = 3, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_images_can_be_imported_without_torch_and_transformers() -> None:
    code = (
        "import sys, vlmqual_impl.images_mllama, vlmqual_impl.processors_mllama, vlmqual_impl.api.mllama_processing\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]", "preprocessing has to run where torch is not installed"


# what was passed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "given_", "wanted"),
    [
        ((20, 30, 3), None, "channels_last"),
        ((3, 20, 30), None, "channels_first"),
        ((20, 30, 1), None, "channels_last"),
        ((4, 30, 3), None, "channels_last"),
        ((4, 30, 1), None, "channels_last"),
        ((3, 30, 4), None, "channels_first"),
        ((3, 30, 3), None, "channels_first"),
        ((20, 30, 4), None, "channels_last"),
        ((4, 20, 30), None, "channels_first"),
        ((4, 30, 3), "channels_first", "channels_first"),
        ((3, 20, 30), "channels_last", "channels_last"),
    ],
)
def test_four_rows_are_no_channels_where_three_others_are(
    shape: tuple[int, ...], given_: str | None, wanted: str
) -> None:
    assert images.channel_format(np.zeros(shape, np.uint8), given_) == wanted


def test_channels_that_cannot_be_found_are_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(20, 30, 2\) stand cannot be inferred"):
        images.channel_format(np.zeros((20, 30, 2), np.uint8))


def test_transparent_pixels_are_laid_on_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    made = np.asarray(images.to_rgb(Image.fromarray(pixels)))
    share = pixels[..., 3:].astype(float) / 255
    wanted = pixels[..., :3] * share + 255 * (1 - share)
    assert np.abs(made - wanted).max() <= 1, "composited on white: 8-bit rounding allowed"
    assert made[0, 1].tolist() == [255, 255, 255]
    assert made[0, 0].tolist() == [10, 20, 30]


def test_a_transparent_colour_is_white_in_a_palette_and_grey_but_kept_in_rgb() -> None:
    # 4.45.2 leaves every picture of mode RGB as it is and lays all others on white.
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([1, 2, 3, 40, 50, 60])
    indexed.putpixel((1, 0), 1)
    assert np.asarray(images.to_rgb(indexed)).tolist() == [[[1, 2, 3], [40, 50, 60]]]
    indexed.info["transparency"] = 0
    assert np.asarray(images.to_rgb(indexed)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    grey.info["transparency"] = 9
    assert np.asarray(images.to_rgb(grey)).tolist() == [[[7, 7, 7], [255, 255, 255]]]
    coloured = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    coloured.info["transparency"] = (4, 5, 6)
    assert np.asarray(images.to_rgb(coloured)).tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "I", "F", "RGBA", "RGBa", "PA", "RGBX", "I;16"]
)
def test_every_mode_of_pillow_becomes_rgb(mode: str) -> None:
    through = {"PA": "P", "RGBa": "RGBA", "I;16": "I"}.get(mode, "RGB")
    source = Image.fromarray(_noise(4, 5)).convert(through).convert(mode)
    assert images.to_rgb(source).mode == "RGB"


def test_unconverted_pictures_keep_their_stored_values() -> None:
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([1, 2, 3, 40, 50, 60])
    indexed.putpixel((1, 0), 1)
    assert np.asarray(images.unconverted(indexed)).tolist() == [[0, 1]]
    inks = Image.frombytes("CMYK", (5, 4), bytes(range(80)))
    assert np.asarray(images.unconverted(inks)).tolist() == np.asarray(inks).tolist()
    rgb = Image.fromarray(_noise(3, 3))
    assert np.array_equal(np.asarray(images.unconverted(rgb)), np.asarray(rgb)), "a side of 3 is no channel axis"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("LA", (5, 4)), "has 2 channels; valid are 1, 3 and 4"),
        (Image.fromarray(np.full((4, 5), 700, np.int32)), "from 700 to 700; whole numbers have to lie in 0..255"),
    ],
)
def test_stored_values_that_are_no_pixels_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images.unconverted(image)


# canvas --------------------------------------------------------------------------------------------------------------


def test_the_supported_arrangements_stand_in_the_documented_order() -> None:
    # MLLAMA-IMG-020
    assert images.arrangements(1) == [(1, 1)]
    assert images.arrangements(2) == [(1, 1), (1, 2), (2, 1)]
    assert images.arrangements(4) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert images.arrangements(6)[4:] == [
        *((1, 5), (1, 6), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (5, 1), (6, 1)),
    ]


@given(st.integers(1, 40))
def test_there_is_an_arrangement_for_every_product_that_fits(tiles: int) -> None:
    made = images.arrangements(tiles)
    assert len(made) == sum(tiles // high for high in range(1, tiles + 1))
    assert made == sorted(set(made)), "each once, by height and then width"
    assert all(high * wide <= tiles for high, wide in made)


@pytest.mark.parametrize("tiles", [0, -1, None, 2.5, True, "4"])
def test_a_number_of_tiles_that_is_not_positive_is_refused(tiles: Any) -> None:
    with pytest.raises(ValueError, match=f"max_image_tiles is {tiles!r}; it has to be a positive integer"):
        images.arrangements(tiles)


@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [
        (50, 50, (1, 1)),
        (300, 100, (1, 2)),
        (100, 300, (2, 1)),
        (500, 500, (2, 2)),
        (1000, 100, (1, 4)),
        (10, 2000, (4, 1)),
        (224, 224, (1, 1)),
        (225, 224, (1, 2)),
        (224, 225, (2, 1)),
        (448, 448, (2, 2)),
        (449, 449, (2, 2)),  # shrunk by 448 / 449
        (448, 224, (1, 2)),
        (672, 1, (1, 3)),
        (10, 10, (1, 1)),  # enlarged 22.4 times on (1, 1), (1, 2) and others: the smallest area
        (900, 300, (1, 3)),  # shrunk by 0.7467 on (1, 3) and (1, 4): the smallest area
    ],
)
def test_the_canvas_of_an_image_is_the_documented_one(width: int, height: int, wanted: tuple[int, int]) -> None:
    # MLLAMA-IMG-045
    assert images.canvas((height, width), 224, 4) == wanted


def _exact_canvas(size: tuple[int, int], tile: int, tiles: int) -> tuple[int, int]:
    """The rule read once more in exact arithmetic, by sorting."""
    height, width = size

    def rank(arrangement: tuple[int, int]) -> tuple[Any, ...]:
        high, wide = arrangement
        scale = min(Fraction(high * tile, height), Fraction(wide * tile, width))
        enlarges = scale >= 1
        return (not enlarges, scale if enlarges else -scale, high * wide, high, wide)

    return min(((a, b) for a in range(1, tiles + 1) for b in range(1, tiles // a + 1)), key=rank)


@given(SIDES, SIDES, TILES, COUNTS)
def test_the_canvas_follows_the_rule_in_exact_arithmetic(height: int, width: int, tile: int, tiles: int) -> None:
    assert images.canvas((height, width), tile, tiles) == _exact_canvas((height, width), tile, tiles)


def test_of_equal_scales_the_smallest_area_is_taken() -> None:
    assert images.canvas((20, 20), 28, 3) == (1, 1), "20 x 20 is enlarged 1.4 times on all five canvases"
    assert images.canvas((30, 30), 28, 3) == (1, 1), "30 x 30 is shrunk by 28 / 30 on all five canvases"
    assert images.canvas((70, 70), 28, 6) == (2, 2), "70 x 70 is shrunk by 0.8 on (2, 2), (2, 3) and (3, 2)"
    assert images.canvas((1, 30), 28, 3) == (1, 2), "1 x 30 is enlarged least on (1, 2)"


# sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "arrangement", "wanted"),
    [
        ((100, 300), (1, 2), (100, 300)),  # one side is between the tile and the canvas: it stays
        ((50, 50), (1, 1), (224, 224)),
        ((10, 100), (1, 1), (22, 224)),
        ((100, 10), (1, 1), (224, 22)),
        ((224, 300), (1, 2), (224, 300)),
        ((300, 224), (2, 1), (300, 224)),
        ((500, 500), (2, 2), (448, 448)),
        ((1000, 1001), (2, 2), (447, 448)),  # the width decides, however little it does
        ((1001, 1000), (2, 2), (448, 447)),
        ((100, 1000), (1, 4), (89, 896)),
        ((2000, 10), (4, 1), (896, 4)),
        ((1, 2000), (1, 4), (1, 896)),  # 0.448 of a pixel becomes 1
        ((2000, 1), (4, 1), (896, 1)),
    ],
)
def test_an_image_is_fitted_to_its_canvas_by_hand(
    size: tuple[int, int], arrangement: tuple[int, int], wanted: tuple[int, int]
) -> None:
    assert images.fitted_size(size, arrangement, 224) == wanted


@given(SIDES, SIDES, TILES, COUNTS)
def test_the_fitted_image_keeps_its_ratio_and_lies_in_the_canvas(
    height: int, width: int, tile: int, tiles: int
) -> None:
    # MLLAMA-IMG-028
    high, wide = images.canvas((height, width), tile, tiles)
    new_height, new_width = images.fitted_size((height, width), (high, wide), tile)
    assert 1 <= new_height <= high * tile
    assert 1 <= new_width <= wide * tile
    scale = min(
        Fraction(min(max(height, tile), high * tile), height), Fraction(min(max(width, tile), wide * tile), width)
    )
    for new, old in ((new_height, height), (new_width, width)):
        exact = old * scale
        # The scale is a float: 49 * (1 / 49) is a little less than 1 and is cut to 0.
        assert exact - 1 - Fraction(1, 10**6) < new <= exact or new == 1, f"{old} times {float(scale)} became {new}"


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_small_image_touches_the_tile_and_one_between_stays(height: int, width: int) -> None:
    tile, tiles = 100, 9
    arrangement = images.canvas((height, width), tile, tiles)
    made = images.fitted_size((height, width), arrangement, tile)
    if max(height, width) <= tile:
        assert max(made) == tile, "an image smaller than a tile is enlarged until a side is as long"
    elif min(height, width) >= tile:
        assert made == (height, width), "it lies in its canvas already"


# numbers -------------------------------------------------------------------------------------------------------------


def test_zeros_are_put_at_the_bottom_and_right() -> None:
    pixels = _noise(20, 30) | 1
    made = images.pad(pixels, (1, 2), 28)
    assert made.shape == (28, 56, 3)
    assert made.dtype == np.uint8
    assert np.array_equal(made[:20, :30], pixels)
    assert not made[20:].any()
    assert not made[:, 30:].any()
    assert np.array_equal(images.pad(pixels[:14, :28], (1, 2), 14), pixels[:14, :28]), "what fits stays"


@pytest.mark.parametrize("size", [(29, 28), (28, 57)])
def test_an_image_larger_than_its_canvas_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels does not fit 1 x 2 tiles of 28"):
        images.pad(_noise(*size), (1, 2), 28)


def test_bytes_are_rescaled_in_float64_and_fractions_in_float32() -> None:
    every = np.arange(256, dtype=np.uint8)
    made = images.rescale(every, 1 / 255)
    assert made.dtype == np.float32
    assert made.tolist() == [float(np.float32(int(value) * (1 / 255))) for value in every]
    assert images.rescale(every, 3).tolist() == [3.0 * value for value in range(256)], "bytes must not overflow"
    fractions = np.float32(np.arange(1, 1000) / 1000)
    once = images.rescale(fractions, 1 / 255)
    assert once.dtype == np.float32
    assert np.array_equal(once, fractions * np.float32(1 / 255))
    assert not np.array_equal(once, (fractions.astype(np.float64) / 255).astype(np.float32)), "the two differ"


def test_tiles_are_cut_row_by_row() -> None:
    # MLLAMA-IMG-046
    pixels = _noise(28 * 2, 28 * 3)
    made = images.tiles_of(pixels, (2, 3))
    assert made.shape == (6, 3, 28, 28)
    for index in range(6):
        row, column = index // 3, index % 3
        wanted = pixels[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28].transpose(2, 0, 1)
        assert np.array_equal(made[index], wanted), f"tile {index} is row {row}, column {column}"


def test_tiles_are_packed_first_and_the_rest_is_zero() -> None:
    rng = np.random.default_rng(0)
    one, two, four = (np.float32(rng.uniform(1, 2, (count, 3, 5, 5))) for count in (1, 2, 4))
    made = images.pack([[two], [], [one, four]], 4)
    assert made.shape == (3, 2, 4, 3, 5, 5)
    assert made.dtype == np.float32
    assert np.array_equal(made[0, 0, :2], two)
    assert np.array_equal(made[2, 0, :1], one)
    assert np.array_equal(made[2, 1], four)
    assert np.count_nonzero(made) == two.size + one.size + four.size, "missing tiles and images are exactly 0"


def test_images_of_different_channels_are_not_packed() -> None:
    with pytest.raises(ValueError, match=r"\[\(3, 5, 5\), \(4, 5, 5\)\]; they have to be equal"):
        images.pack([[np.zeros((1, 3, 5, 5), np.float32)], [np.zeros((1, 4, 5, 5), np.float32)]], 4)


def test_ids_begin_with_one_and_missing_images_are_zero() -> None:
    # MLLAMA-IMG-019, MLLAMA-IMG-021
    made = images.ratio_ids([[(1, 1), (1, 2), (2, 2)], [(4, 1)], []], 4)
    assert made.tolist() == [[1, 2, 6], [8, 0, 0], [0, 0, 0]]
    assert made.dtype == np.int64
    assert images.ratio_ids([[(2, 1)]], 2).tolist() == [[3]]


def test_the_mask_has_a_one_for_every_tile_and_for_the_first_of_missing_images() -> None:
    # MLLAMA-IMG-022, MLLAMA-IMG-023
    made = images.ratio_mask([[(1, 1), (1, 3)], [(2, 2)], []], 4)
    assert made.tolist() == [
        [[1, 0, 0, 0], [1, 1, 1, 0]],
        [[1, 1, 1, 1], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 0]],
    ]
    assert made.dtype == np.int64
