"""The image rules, each against the documented rule, numpy or Pillow; and reading image files."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmqual_impl import image_files, images
from vlmqual_impl.image_files import ImageError

LANCZOS = int(Image.Resampling.LANCZOS)
SIDES = st.integers(1, 4000)
TILES = st.sampled_from([7, 14, 49, 56, 91, 182, 364])


def _noise(height: int, width: int, channels: int = 3, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


# what was passed -----------------------------------------------------------------------------------------------------


def test_images_can_be_imported_without_torch_and_transformers() -> None:
    code = (
        "import sys, vlmqual_impl.images, vlmqual_impl.processors, vlmqual_impl.api.idefics3_processing\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]", "preprocessing has to run where torch is not installed"


def test_arrays_of_every_layout_are_the_same_picture() -> None:
    pixels = _noise(20, 30)
    first = pixels.transpose(2, 0, 1)
    for name, value in {
        "channels last": pixels,
        "channels first": first,
        "torch": torch.from_numpy(first.copy()),
        "int64": pixels.astype(np.int64),
        "whole floats": pixels.astype(np.float32),
    }.items():
        assert np.array_equal(np.asarray(images.picture(value)), pixels), f"{name} is read differently"


def test_a_declared_format_wins_over_what_would_be_inferred() -> None:
    pixels = _noise(3, 3)
    assert np.array_equal(np.asarray(images.picture(pixels)), pixels.transpose(1, 2, 0)), "ambiguous is channels first"
    assert np.array_equal(np.asarray(images.picture(pixels, "channels_last")), pixels)


def test_one_channel_arrays_and_flat_arrays_are_grey() -> None:
    pixels = _noise(6, 9, 1)
    for value in (pixels, pixels.transpose(2, 0, 1), pixels[..., 0]):
        made = images.picture(value)
        assert made.mode == "L"
        assert np.array_equal(np.asarray(made), pixels[..., 0])


def test_fractions_become_bytes_by_truncation_in_float32() -> None:
    values = np.random.default_rng(1).random((9, 8, 3))
    wanted = (values * 255).astype(np.float32).astype(np.uint8)
    assert np.array_equal(np.asarray(images.picture(values)), wanted)
    halves = torch.from_numpy(values).to(torch.bfloat16)
    wanted = (halves.double().numpy() * 255).astype(np.float32).astype(np.uint8)
    assert np.array_equal(np.asarray(images.picture(halves)), wanted), "bfloat16 tensors have no numpy type"


def test_a_tensor_that_wants_gradients_is_an_image_too() -> None:
    assert images.picture(torch.rand(3, 4, 5, requires_grad=True)).size == (5, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((5, 6, 2), np.uint8), "cannot be inferred"),
        (np.zeros((2, 3, 4, 5), np.uint8), "2 or 3 axes, not 4"),
        (np.zeros(5, np.uint8), "2 or 3 axes, not 1"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.full((4, 5, 3), -1), "from -1 to -1"),
        (np.full((4, 5, 3), 256), "from 256 to 256"),
        (np.full((4, 5, 3), 1.5), "fractions have to lie in 0..1"),
        (np.full((4, 5, 3), np.nan), "not finite"),
        (Image.new("RGB", (0, 4)), "0 x 4 has no pixels"),
    ],
)
def test_arrays_that_are_no_image_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images.picture(value)


@pytest.mark.parametrize("value", [None, 3, "text", [[1]], np.array([["a", "b"]])])
def test_things_that_are_no_image_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="image"):
        images.picture(value)


@pytest.mark.parametrize("value", [_noise(4, 5), _noise(4, 5)[..., 0], Image.new("RGB", (4, 5))])
def test_an_unknown_input_format_is_refused_for_every_kind_of_image(value: Any) -> None:
    with pytest.raises(ValueError, match="'none' is unknown; valid are channels_first, channels_last"):
        images.picture(value, "none")


def test_a_format_that_contradicts_the_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(30, 40, 3\) has 30 channels; valid are 1, 3 and 4"):
        images.picture(_noise(30, 40), "channels_first")


# colours -------------------------------------------------------------------------------------------------------------


def test_transparent_pixels_become_white_in_proportion() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    made = np.asarray(images.to_rgb(Image.fromarray(pixels)))
    share = pixels[..., 3:].astype(float) / 255
    wanted = pixels[..., :3] * share + 255 * (1 - share)
    assert np.abs(made - wanted).max() <= 1, "composited on white: 8-bit rounding allowed"
    assert made[0, 1].tolist() == [255, 255, 255]
    assert made[0, 0].tolist() == [10, 20, 30]


def test_grey_is_expanded_and_palettes_are_looked_up() -> None:
    grey = _noise(4, 5, 1)[..., 0]
    assert np.array_equal(np.asarray(images.to_rgb(Image.fromarray(grey))), np.repeat(grey[..., None], 3, axis=-1))
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([1, 2, 3, 40, 50, 60])
    indexed.putpixel((1, 0), 1)
    assert np.asarray(images.to_rgb(indexed)).tolist() == [[[1, 2, 3], [40, 50, 60]]]
    indexed.info["transparency"] = 0
    assert np.asarray(images.to_rgb(indexed)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "I", "F", "RGBA", "PA", "RGBX"])
def test_every_mode_of_pillow_becomes_rgb(mode: str) -> None:
    source = Image.fromarray(_noise(4, 5)).convert("P" if mode == "PA" else "RGB").convert(mode)
    assert images.to_rgb(source).mode == "RGB"


# sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "longest", "wanted"),
    [
        (800, 600, 1456, (1456, 1092)),
        (100, 50, 1456, (1456, 728)),
        (1920, 1080, 1456, (1456, 820)),  # 819 made even
        (37, 900, 1456, (60, 1456)),  # 59 made even
        (800, 600, 400, (400, 300)),
        (1000, 10, 100, (100, 2)),  # 1 made even
        (1000, 1, 100, (100, 1)),  # 0 is even already, then at least 1
        (1, 1, 364, (364, 364)),
        (500, 500, 5000, (4096, 4096)),
        (5000, 2500, 8190, (4096, 2048)),
        (300, 900, 9999, (1365, 4096)),  # the cap does not make even
    ],
)
def test_the_longest_edge_gives_the_documented_sizes(
    width: int, height: int, longest: int, wanted: tuple[int, int]
) -> None:
    assert images.longest_edge_size((height, width), longest) == wanted[::-1]


@given(SIDES, SIDES, st.integers(1, 4096))
def test_the_longest_edge_is_exact_and_the_other_follows_the_ratio(height: int, width: int, longest: int) -> None:
    new_height, new_width = images.longest_edge_size((height, width), longest)
    assert (new_width if width >= height else new_height) == longest, "the longer side becomes longest_edge"
    shorter = new_height if width >= height else new_width
    exact = longest * min(height, width) / max(height, width)
    # The ratio is a float: 1405 / (1405 / 701) is a little less than 701 and is cut to 700.
    assert exact - 1.001 < shorter < exact + 2 or shorter == 1, (
        f"the shorter side is {shorter}, the ratio gives {exact}"
    )
    assert shorter % 2 == 0 or shorter == 1, "the shorter side is made even"


@given(SIDES, SIDES, TILES)
def test_both_sides_become_multiples_of_the_tile(height: int, width: int, tile: int) -> None:
    new_height, new_width = images.tile_multiple_size((height, width), tile)
    assert new_height % tile == 0 == new_width % tile
    assert min(new_height, new_width) >= tile, "every image has at least one tile"
    if width >= height:
        assert width <= new_width < width + tile
        assert abs(new_height - new_width * height / width) <= tile
    else:
        assert height <= new_height < height + tile
        assert abs(new_width - new_height * width / height) <= tile


def test_a_line_of_pixels_keeps_one_tile_where_its_ratio_rounds_down() -> None:
    assert int(49 * (1 / 49)) == 0, "this is the product that rounds down"
    assert images.tile_multiple_size((49, 1), 7) == (49, 7)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((364, 364), (0, 0)), ((364, 728), (1, 2)), ((728, 364), (2, 1)), ((1092, 1456), (3, 4))],
)
def test_only_a_single_tile_has_no_grid(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert images.grid(size, 364) == wanted


# cutting -------------------------------------------------------------------------------------------------------------


def test_resizing_is_pillow_s() -> None:
    source = Image.fromarray(_noise(30, 40))
    assert np.array_equal(
        np.asarray(images.resize(source, (17, 23), LANCZOS)),
        np.asarray(source.resize((23, 17), Image.Resampling.LANCZOS)),
    )


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 4, 7]))
def test_tiles_are_row_major_and_the_whole_image_comes_last(rows: int, columns: int, tile: int) -> None:
    pixels = _noise(rows * tile, columns * tile)
    frames, *grid = images.split(Image.fromarray(pixels), tile, LANCZOS)
    if rows == columns == 1:
        assert (grid, len(frames)) == ([0, 0], 1)
        assert np.array_equal(np.asarray(frames[0]), pixels)
        return
    assert grid == [rows, columns]
    assert len(frames) == rows * columns + 1, "one frame for each tile and one for the whole image"
    for number, frame in enumerate(frames[:-1]):
        top, left = number // columns * tile, number % columns * tile
        assert np.array_equal(np.asarray(frame), pixels[top : top + tile, left : left + tile]), f"tile {number}"
    whole = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(whole))


# numbers -------------------------------------------------------------------------------------------------------------


def test_every_byte_is_rescaled_in_float64_and_kept_in_float32() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    made = images.rescale(values, 1 / 255)
    assert made.dtype == np.float32
    assert np.array_equal(made.ravel(), np.array([np.float32(value * (1 / 255)) for value in range(256)]))


def test_normalizing_is_done_in_float32_for_each_channel() -> None:
    values = np.random.default_rng(2).random((4, 5, 3)).astype(np.float32)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    made = images.normalize(values, mean, std)
    assert made.dtype == np.float32
    for channel in range(3):
        wanted = (values[..., channel] - np.float32(mean[channel])) / np.float32(std[channel])
        assert np.array_equal(made[..., channel], wanted), f"channel {channel}"
    assert np.array_equal(images.normalize(values, np.array(mean), tuple(std)), made), "any sequence of numbers"


def test_one_number_normalizes_all_channels() -> None:
    values = _noise(4, 5)
    assert np.array_equal(images.normalize(values, 0.5, 0.25), (values.astype(np.float32) - 0.5) / np.float32(0.25))


def test_normalizing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="image_mean has 2 values for an image of 3 channels"):
        images.normalize(_noise(4, 5), [0.5, 0.5], 0.5)
    with pytest.raises(ValueError, match="image_std has 4 values for an image of 3 channels"):
        images.normalize(_noise(4, 5), 0.5, [0.5] * 4)
    with pytest.raises(ValueError, match="image_std 0 has a 0"):
        images.normalize(_noise(4, 5), 0.5, 0)


@pytest.mark.parametrize("format_", ["channels_first", "channels_last"])
def test_padding_fills_frames_at_bottom_and_right_and_adds_empty_frames(format_: Any) -> None:
    def frame(height: int, width: int) -> npt.NDArray[np.float32]:
        made = np.ones((height, width, 3), np.float32)
        return made.transpose(2, 0, 1) if format_ == "channels_first" else made

    frames, masks = images.pad([[frame(2, 3)], [frame(4, 1), frame(1, 1)]], format_)
    values, mask = np.array(frames), np.array(masks)
    if format_ == "channels_first":
        values = values.transpose(0, 1, 3, 4, 2)
    assert values.shape == (2, 2, 4, 3, 3)
    assert (mask.shape, mask.dtype) == ((2, 2, 4, 3), np.int64)
    wanted = np.zeros((2, 2, 4, 3), np.int64)
    wanted[0, 0, :2, :3] = 1
    wanted[1, 0, :4, :1] = 1
    wanted[1, 1, :1, :1] = 1
    assert np.array_equal(mask, wanted)
    assert np.array_equal(values, np.repeat(wanted[..., None], 3, axis=-1).astype(np.float32)), "padding is exactly 0"


# files ---------------------------------------------------------------------------------------------------------------


def _encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(_noise(20, 30))).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    upright = _noise(4, 6)
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    path.write_bytes(_encoded("PNG", Image.fromarray(np.ascontiguousarray(undo[orientation])), exif=exif))
    assert np.array_equal(np.asarray(image_files.read_image(path)), upright)


def test_a_file_s_transparency_is_dropped_not_composited(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    path.write_bytes(_encoded("PNG", Image.new("RGBA", (2, 1), (9, 8, 7, 0))))
    assert np.asarray(image_files.read_image(path)).tolist() == [[[9, 8, 7], [9, 8, 7]]]


@pytest.mark.parametrize(("mode", "key"), [("RGB", (9, 8, 7)), ("L", 9), ("P", 0)])
def test_a_colour_that_stands_for_transparency_in_a_file_stays_what_it_is(
    tmp_path: Path, mode: str, key: int | tuple[int, ...]
) -> None:
    path = tmp_path / "keyed.png"
    image = Image.new(mode, (2, 1), key)
    if mode == "P":
        image.putpalette([9, 8, 7, 1, 2, 3])
    path.write_bytes(_encoded("PNG", image, transparency=key))
    wanted = [9, 9, 9] if mode == "L" else [9, 8, 7]
    assert np.asarray(images.to_rgb(image_files.read_image(path))).tolist() == [[wanted, wanted]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_and_damaged_files_give_one_sentence_that_names_them(tmp_path: Path, kind: str) -> None:
    data = _encoded(kind)
    rng = np.random.default_rng(3)
    path = tmp_path / f"short.{kind.lower()}"
    for size in range(0, len(data) // 2, max(1, len(data) // 40)):
        path.write_bytes(data[:size])
        with pytest.raises(ImageError) as caught:
            image_files.read_image(path)
        assert str(caught.value).startswith(f"image file {path} cannot be read: ")
        assert "\n" not in str(caught.value)
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, min(200, len(data)), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ImageError):  # and nothing else; some damage only changes pixels
            image_files.read_image(path)


def test_what_is_no_image_file_is_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    with pytest.raises(ImageError, match=r"notes\.txt cannot be read: its format is not known$"):
        image_files.read_image(text)
    with pytest.raises(ImageError, match=r"missing\.png does not exist$"):
        image_files.read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="directory"):
        image_files.read_image(tmp_path)
    assert issubclass(ImageError, ValueError)
