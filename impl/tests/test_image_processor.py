"""The image processor, against the documented options, goldens and transformers."""

from __future__ import annotations

import hashlib
import inspect
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from processor_objects import (
    TINY,
    assert_same,
    noise_image,
    reference_image_processor,
)

from vlmqual_contract import fixtures
from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor
from vlmqual_impl.image_files import read_image


def test_signatures_are_the_documented_ones() -> None:
    constructor = inspect.signature(Idefics3ImageProcessor.__init__).parameters
    assert [(name, one.default) for name, one in constructor.items() if name not in ("self", "kwargs")] == [
        ("do_convert_rgb", True),
        ("do_resize", True),
        ("size", None),
        ("resample", 1),
        ("do_image_splitting", True),
        ("max_image_size", None),
        ("do_rescale", True),
        ("rescale_factor", 0.00392156862745098),
        ("do_normalize", True),
        ("image_mean", None),
        ("image_std", None),
        ("do_pad", True),
    ]
    assert [*inspect.signature(Idefics3ImageProcessor.preprocess).parameters][1:] == [
        *("images", "do_convert_rgb", "do_resize", "size", "resample", "do_image_splitting", "do_rescale"),
        *("max_image_size", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad", "return_tensors"),
        *("return_row_col_info", "data_format", "input_data_format"),
    ]
    made = [*inspect.signature(Idefics3Processor.__init__).parameters.items()][1:]
    assert [(name, one.default) for name, one in made[:-1]] == [
        ("image_processor", inspect.Parameter.empty),
        ("tokenizer", None),
        ("image_seq_len", 169),
        ("chat_template", None),
    ]
    call = [*inspect.signature(Idefics3Processor.__call__).parameters.items()][1:]
    assert [(name, one.default) for name, one in call[:-1]] == [
        (name, None) for name in ("images", "text", "audio", "videos", "image_seq_len")
    ]


def test_defaults_are_the_documented_ones() -> None:
    made = Idefics3ImageProcessor()
    assert made.size == {"longest_edge": 1456}
    assert made.max_image_size == {"longest_edge": 364}
    assert made.image_mean == made.image_std == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("width", "height", "options", "rows", "columns"),
    [
        (800, 600, {}, 3, 4),
        (100, 50, {}, 2, 4),
        (37, 900, {}, 4, 1),
        (100, 50, {"do_resize": False}, 0, 0),
        (800, 600, {"do_resize": False}, 3, 3),
        (800, 600, {"size": {"longest_edge": 728}}, 2, 2),
        (800, 600, {"max_image_size": {"longest_edge": 182}}, 6, 8),
        (800, 600, {"do_image_splitting": False}, 0, 0),
        (90, 90, {"size": {"longest_edge": 2184}}, 6, 6),
    ],
)
def test_documented_examples_of_grids(
    width: int, height: int, options: dict[str, Any], rows: int, columns: int
) -> None:
    made = Idefics3ImageProcessor(do_rescale=False, do_normalize=False).preprocess(
        noise_image(width, height), return_row_col_info=True, return_tensors="np", **options
    )
    side = options.get("max_image_size", {"longest_edge": 364})["longest_edge"]
    assert (made.rows, made.cols) == ([[rows]], [[columns]])
    assert made.pixel_values.shape == (1, rows * columns + 1, 3, side, side)
    assert made.pixel_attention_mask.all()


def test_random_images_are_bit_identical_to_transformers() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for number in range(100):
        width, height = (int(side) for side in np.exp(rng.uniform(np.log(5), np.log(300), 2)))
        tile = int(rng.choice([8, 14, 16, 28]))
        options: dict[str, Any] = {
            "max_image_size": {"longest_edge": tile},
            "size": {"longest_edge": int(rng.integers(tile, 6 * tile))},
            "do_image_splitting": bool(rng.random() < 0.8),
            "do_resize": bool(rng.random() < 0.8),
        }
        images = [
            [noise_image(width, height, number)],
            [noise_image(height, width, number), noise_image(width, 7, number)],
        ]
        call: dict[str, Any] = {"return_tensors": "np", "return_row_col_info": True}
        about = f"seed {seed}, number {number}: {width} x {height}, {options}"
        made = Idefics3ImageProcessor(**options).preprocess(images, **call)
        wanted = reference_image_processor(**options).preprocess(images, **call)
        assert (made.rows, made.cols) == (wanted["rows"], wanted["cols"]), about
        for name in ("pixel_values", "pixel_attention_mask"):
            assert np.array_equal(made[name], wanted[name]), f"{about}: {name}"
        frames = [
            sum(r * c + 1 for r, c in zip(rows, columns, strict=True))
            for rows, columns in zip(made.rows, made.cols, strict=True)
        ]
        assert made.pixel_values.shape == (2, max(frames), 3, tile, tile), about
        assert made.pixel_attention_mask.any(axis=(2, 3)).sum(axis=1).tolist() == frames, about


@pytest.mark.parametrize(("width", "height"), [(800, 600), (120, 77), (1000, 30)])
def test_full_size_images_are_bit_identical_to_transformers(width: int, height: int) -> None:
    image = noise_image(width, height)
    made = Idefics3ImageProcessor().preprocess(image, return_tensors="np")
    assert_same(made, reference_image_processor().preprocess(image, return_tensors="np"), f"{width} x {height}")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 50), (50, 3), (2, 2), (500, 1), (1, 500), (4, 60)])
@pytest.mark.parametrize("do_resize", [True, False])
def test_degenerate_images_are_read_the_right_way_round(size: tuple[int, int], do_resize: bool) -> None:
    image = noise_image(*size)
    call: dict[str, Any] = {"do_resize": do_resize, "return_tensors": "np", "return_row_col_info": True}
    made = Idefics3ImageProcessor(**TINY).preprocess(image, **call)
    rows, columns = made.rows[0][0], made.cols[0][0]
    assert (columns >= rows) if size[0] >= size[1] else (rows >= columns), "the grid lies as the image does"
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4.46 takes sides of 1 and 3 for channels
        assert_same(made, reference_image_processor(**TINY).preprocess(image, **call), f"{size}")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
def test_every_mode_gives_three_channels(mode: str) -> None:
    source = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)) if mode == "I;16" else noise_image(30, 20)
    image = source if mode == "I;16" else source.convert(mode)
    made = Idefics3ImageProcessor(**TINY).preprocess(image, return_tensors="np")
    assert made.pixel_values.shape[2] == 3
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4.46 refuses or misreads them
        assert_same(made, reference_image_processor(**TINY).preprocess(image, return_tensors="np"), mode)


@pytest.mark.parametrize("key", ["path", "pil"])
def test_fixture_images_give_the_golden_pixels(key: str) -> None:
    root = fixtures.root()
    entries = json.loads((root / "goldens" / "idefics3" / "pixels.json").read_text("utf-8"))["entries"]
    processor = Idefics3ImageProcessor.from_pretrained(root / "checkpoints" / "idefics3-tiny")
    seen = 0
    for name, wanted in entries.items():
        file, checkpoint, kind = name.split("|")
        if checkpoint != "idefics3-tiny" or kind != key:
            continue
        path = root / "images" / file
        with Image.open(path) as opened:
            image = read_image(path) if kind == "path" else opened.copy()
        made = processor.preprocess([[image]], return_tensors="np", return_row_col_info=True)
        assert (made.rows[0][0], made.cols[0][0]) == (wanted["rows"], wanted["cols"]), name
        for tensor in ("pixel_values", "pixel_attention_mask"):
            digest = hashlib.sha256(np.ascontiguousarray(made[tensor]).tobytes()).hexdigest()
            assert digest == wanted[tensor]["sha256"], f"{tensor} of {name} differs from {wanted['made_by']}"
        seen += 1
    assert seen >= 10, f"only {seen} goldens were found"


def test_images_may_be_given_in_every_form(tmp_path: Path) -> None:
    image = noise_image(30, 20)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    wanted = Idefics3ImageProcessor(**TINY).preprocess(image, return_tensors="np")
    for value in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), tmp_path / "a.png"):
        assert_same(Idefics3ImageProcessor(**TINY).preprocess(value, return_tensors="np"), wanted, type(value).__name__)
    for value in ([image], (image,), [[image]], ((image,),)):
        assert_same(Idefics3ImageProcessor(**TINY).preprocess(value, return_tensors="np"), wanted, "nesting")
    assert Idefics3ImageProcessor(**TINY)([image, image], return_tensors="np").pixel_values.shape[:2] == (1, 26)
    assert Idefics3ImageProcessor(**TINY)([[image], [image]], return_tensors="np").pixel_values.shape[:2] == (2, 13)


def test_values_follow_the_switches() -> None:
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    single = {**TINY, "size": {"longest_edge": 16}}

    def value(**options: Any) -> float:
        return float(Idefics3ImageProcessor(**single).preprocess(white, **options)["pixel_values"][0][0].max())

    assert value() == 1.0
    assert value(do_normalize=False) == 1.0
    assert value(do_rescale=False, do_normalize=False) == 255.0
    assert value(image_mean=0.0, image_std=0.5) == 2.0
    assert value(image_mean=[0.0] * 3, image_std=(0.25,) * 3) == 4.0
    assert value(rescale_factor=2 / 255, do_normalize=False) == 2.0
    assert value(do_rescale=False, image_mean=127.5, image_std=127.5) == 1.0


def test_the_channels_stand_where_asked() -> None:
    last = np.asarray(noise_image(30, 20))
    first = last.transpose(2, 0, 1)
    processor = Idefics3ImageProcessor(**TINY)
    wanted = processor.preprocess(last, return_tensors="np").pixel_values
    assert wanted.shape == (1, 13, 3, 16, 16)
    moved = processor.preprocess(last, return_tensors="np", data_format="channels_last").pixel_values
    assert np.array_equal(moved.transpose(0, 1, 4, 2, 3), wanted)
    assert processor.preprocess(last, data_format=None)["pixel_values"][0][0].shape == (16, 16, 3)
    assert processor.preprocess(first, data_format=None)["pixel_values"][0][0].shape == (3, 16, 16)
    assert processor.preprocess(noise_image(30, 20), data_format=None)["pixel_values"][0][0].shape == (16, 16, 3)
    masked = processor.preprocess(last, data_format="channels_last")["pixel_attention_mask"]
    assert masked[0][0].shape == (16, 16)


def test_without_padding_there_is_no_mask_and_samples_keep_their_frames() -> None:
    images = [[noise_image(30, 20)], [noise_image(30, 20), noise_image(16, 16)]]
    made = Idefics3ImageProcessor(**TINY, do_pad=False).preprocess(images)
    assert set(made) == {"pixel_values"}
    assert [len(sample) for sample in made["pixel_values"]] == [13, 30]
    with pytest.raises(ValueError, match=r"\[13, 30\] frames.*do_pad=True"):
        Idefics3ImageProcessor(**TINY, do_pad=False).preprocess(images, return_tensors="np")


def test_what_is_returned_follows_return_tensors() -> None:
    processor = Idefics3ImageProcessor(**TINY)
    for framework, kind in (("np", np.ndarray), ("pt", torch.Tensor)):
        made = processor.preprocess(noise_image(30, 20), return_tensors=framework)
        assert isinstance(made.pixel_values, kind)
        assert isinstance(made.pixel_attention_mask, kind)
        assert (str(made.pixel_values.dtype), str(made.pixel_attention_mask.dtype)) in (
            ("float32", "int64"),
            ("torch.float32", "torch.int64"),
        )
    made = processor.preprocess(noise_image(30, 20))
    assert isinstance(made["pixel_values"], list)
    assert isinstance(made["pixel_values"][0][0], np.ndarray)
    assert not {"rows", "cols"} & set(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_tensors": "tf"}, "return_tensors 'tf' is not available; valid are pt, np and None"),
        ({"return_tensors": "jax"}, "return_tensors 'jax'"),
        ({"data_format": "none"}, "data_format 'none' is unknown; valid are channels_first, channels_last and None"),
        ({"input_data_format": "none"}, "input_data_format 'none' is unknown"),
        ({"max_image_size": 364}, "max_image_size 364 is not valid"),
        ({"max_image_size": {"height": 9, "width": 9}}, "max_image_size .* is not valid"),
        ({"max_image_size": {"longest_edge": 0}}, "at least 1 pixel"),
        ({"size": {"shortest_edge": 9}}, "size .* is not valid"),
        ({"size": 9}, "size 9 is not valid"),
        ({"size": {"longest_edge": "9"}}, "whole numbers"),
        ({"resample": 77}, "resample 77 is no PIL filter"),
        ({"image_mean": [0.5] * 2}, "image_mean has 2 values"),
        ({"image_std": 0.0}, "image_std"),
        ({"rescale_factor": "a"}, "rescale_factor 'a' is no number"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Idefics3ImageProcessor(**TINY).preprocess(noise_image(8, 9), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [[], [[noise_image(2, 2)], noise_image(2, 2)]])
def test_wrong_nesting_is_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="images must be an image, a list of images"):
        Idefics3ImageProcessor(**TINY).preprocess(images)
