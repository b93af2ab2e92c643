"""The image processor of Mllama, against the documented options, goldens and transformers."""

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
from mllama_processor_objects import NAMES, NEW, TILE, TINY, reference_image_processor
from PIL import Image
from processor_objects import noise_image

from vlmqual_contract import fixtures
from vlmqual_impl.api.mllama_processing import MllamaImageProcessor, MllamaProcessor
from vlmqual_impl.image_files import read_image

CLIP: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _assert_same(made: Any, wanted: Any, about: str) -> None:
    assert made["num_tiles"] == wanted["num_tiles"], f"{about}: num_tiles differs"
    for name in NAMES:
        one, other = np.asarray(made[name]), np.asarray(wanted[name])
        assert one.dtype == other.dtype, f"{about}: {name} is {one.dtype}, transformers has {other.dtype}"
        assert np.array_equal(one, other), f"{about}: {name} differs from transformers"


# documented names ----------------------------------------------------------------------------------------------------


def test_signatures_are_the_documented_ones() -> None:
    # MLLAMA-IMG-001, MLLAMA-IMG-015, MLLAMA-IMG-026, MLLAMA-IMG-030, MLLAMA-PROC-001
    constructor = inspect.signature(MllamaImageProcessor.__init__).parameters
    assert [(name, one.default) for name, one in constructor.items()][1:-1] == [
        ("do_convert_rgb", True),
        ("do_resize", True),
        ("size", None),
        ("resample", 2),
        ("do_rescale", True),
        ("rescale_factor", 0.00392156862745098),
        ("do_normalize", True),
        ("image_mean", None),
        ("image_std", None),
        ("do_pad", True),
        ("max_image_tiles", 4),
    ]
    assert [*constructor][-1] == "kwargs"
    assert [*inspect.signature(MllamaImageProcessor.preprocess).parameters][1:] == [
        *("images", "do_convert_rgb", "do_resize", "size", "resample", "do_rescale", "rescale_factor"),
        *("do_normalize", "image_mean", "image_std", "do_pad", "max_image_tiles", "input_data_format"),
        "return_tensors",
    ]
    empty = inspect.Parameter.empty
    for method, wanted in (
        (MllamaImageProcessor.pad, [("image", empty), ("size", empty), ("aspect_ratio", empty)]),
        (
            MllamaImageProcessor.resize,
            [("image", empty), ("size", empty), ("max_image_tiles", empty), ("resample", 2)],
        ),
    ):
        made = [(name, one.default) for name, one in inspect.signature(method).parameters.items()][1:]
        assert made == [*wanted, ("data_format", None), ("input_data_format", None)], method.__name__
    made = [(name, one.default) for name, one in inspect.signature(MllamaProcessor.__init__).parameters.items()][1:]
    assert made == [("image_processor", empty), ("tokenizer", empty)]
    call = [(name, one.default) for name, one in inspect.signature(MllamaProcessor.__call__).parameters.items()][1:]
    assert call[:-1] == [("images", None), ("text", None)]


def test_defaults_are_the_documented_ones() -> None:
    made = MllamaImageProcessor()
    assert made.size == {"height": 224, "width": 224}
    assert made.image_mean == made.image_std == [0.5, 0.5, 0.5]
    assert (made.resample, made.max_image_tiles, made.rescale_factor) == (2, 4, 1 / 255)
    assert made.do_convert_rgb is made.do_resize is made.do_rescale is made.do_normalize is made.do_pad is True
    assert [*made.model_input_names] == ["pixel_values", "num_tiles", "aspect_ratio_ids", "aspect_ratio_mask"]


@pytest.mark.parametrize(
    ("width", "height", "tiles", "number", "count"),
    [
        (50, 50, 4, 1, 1),
        (300, 100, 4, 2, 2),
        (100, 300, 4, 5, 2),
        (50, 50, 2, 1, 1),
        (300, 100, 2, 2, 2),
        (100, 300, 2, 3, 2),
        (500, 500, 4, 6, 4),
        (1000, 100, 4, 4, 4),
        (10, 2000, 4, 8, 4),
    ],
)
def test_documented_examples_of_aspect_ratio_ids(width: int, height: int, tiles: int, number: int, count: int) -> None:
    made = MllamaImageProcessor(max_image_tiles=tiles).preprocess(noise_image(width, height))
    assert made.aspect_ratio_ids.tolist() == [[number]]
    assert made.aspect_ratio_mask.tolist() == [[[1] * count + [0] * (tiles - count)]]
    assert made.num_tiles == [[count]]
    assert made.pixel_values.shape == (1, 1, tiles, 3, 224, 224)
    assert not made.pixel_values[0, 0, count:].any(), "tiles that are not there are exactly 0"


# against transformers ------------------------------------------------------------------------------------------------


def test_random_images_are_bit_identical_to_transformers() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for number in range(300):
        tiles = number % 6 + 1
        # Before 5.0 sides of 1 and 3 are read as channels, and a side that would shrink below 1 pixel is refused.
        lower, upper = (np.log(2), np.log(500)) if NEW else (np.log(20), np.log(400))
        sizes = [tuple(int(side) for side in np.exp(rng.uniform(lower, upper, 2))) for _ in range(3)]
        options: dict[str, Any] = {
            "size": {"height": TILE, "width": TILE},
            "max_image_tiles": tiles,
            "resample": int(rng.choice([0, 1, 2, 3])) if rng.random() < 0.2 else 2,
            **(CLIP if rng.random() < 0.5 else {}),
        }
        one, two, three = (noise_image(*size, number) for size in sizes)
        batch = [[one], [two, three]]
        about = f"seed {seed}, number {number}: {sizes}, {options}"
        made = MllamaImageProcessor(**options).preprocess(batch, return_tensors="np")
        _assert_same(made, reference_image_processor(**options).preprocess(batch, return_tensors="np"), about)
        assert made.pixel_values.shape == (2, 2, tiles, 3, TILE, TILE), about
        assert made.aspect_ratio_ids[0, 1] == 0, about
        assert made.aspect_ratio_mask[0, 1].tolist() == [1] + [0] * (tiles - 1), about
        assert made.aspect_ratio_mask.sum() == sum(map(sum, made.num_tiles)) + 1, about


@pytest.mark.parametrize(("width", "height"), [(800, 600), (120, 77), (1000, 60)])
def test_full_size_images_are_bit_identical_to_transformers(width: int, height: int) -> None:
    image = noise_image(width, height)
    options = {"size": {"height": 560, "width": 560}, **CLIP}
    made = MllamaImageProcessor(**options).preprocess(image, return_tensors="np")
    wanted = reference_image_processor(**options).preprocess(image, return_tensors="np")
    _assert_same(made, wanted, f"{width} x {height}")


EXTREME = [(2000, 1), (1, 2000), (1000, 10), (10, 1000), (3, 900), (900, 3), (1, 1), (3, 3), (1, 7), (50, 3), (3, 50)]


@pytest.mark.parametrize("size", EXTREME)
@pytest.mark.parametrize("tiles", [1, 4])
def test_elongated_and_tiny_images_are_processed_the_right_way_round(size: tuple[int, int], tiles: int) -> None:
    # MLLAMA-IMG-047
    image = noise_image(*size)
    made = MllamaImageProcessor(**TINY, max_image_tiles=tiles).preprocess(image, return_tensors="np")
    if tiles == 4 and max(size) >= 900:
        assert made.aspect_ratio_ids.tolist() == [[4 if size[0] > size[1] else 8]], "the canvas lies as the image does"
    if NEW:  # 4.45 refuses sides that shrink below 1 pixel and takes sides of 1 and 3 for channels
        reference = reference_image_processor(**TINY, max_image_tiles=tiles)
        _assert_same(made, reference.preprocess(image, return_tensors="np"), f"{size}")
    if min(size) == 1 == made.num_tiles[0][0] and max(size) == 2000:
        row = made.pixel_values[0, 0, 0, :, 0, :] if size[1] == 1 else made.pixel_values[0, 0, 0, :, :, 0]
        rest = made.pixel_values[0, 0, 0, :, 1:, :] if size[1] == 1 else made.pixel_values[0, 0, 0, :, :, 1:]
        assert (row > -1).any(), "one line of pixels is left"
        assert (rest == -1).all(), "all others are padding"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr", "I;16"])
def test_every_mode_gives_the_three_channels_of_transformers(mode: str) -> None:
    # MLLAMA-IMG-036
    source = (
        Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50)) if mode == "I;16" else noise_image(50, 40)
    )
    image = source if mode == "I;16" else source.convert(mode)
    if mode == "RGBA":
        image.putalpha(noise_image(50, 40, 1).convert("L"))
    made = MllamaImageProcessor(**TINY).preprocess(image, return_tensors="np")
    assert made.pixel_values.shape[3] == 3
    _assert_same(made, reference_image_processor(**TINY).preprocess(image, return_tensors="np"), mode)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "L"])
def test_conversion_can_be_switched_off_for_a_call(mode: str) -> None:
    # MLLAMA-IMG-037
    image, channels = noise_image(50, 40).convert(mode), 4 if mode in ("RGBA", "CMYK") else 1
    options: dict[str, Any] = {**TINY, "image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    made = MllamaImageProcessor(**options).preprocess(image, do_convert_rgb=False, return_tensors="np")
    assert made.pixel_values.shape[3] == channels
    if NEW:  # 4.45 ignores the option and then refuses four channels
        wanted = reference_image_processor(**options).preprocess(image, do_convert_rgb=False, return_tensors="np")
        _assert_same(made, wanted, mode)


@pytest.mark.parametrize("checkpoint", ["mllama-tiny", "mllama-11b-processor"])
@pytest.mark.parametrize("key", ["path", "pil"])
def test_fixture_images_give_the_golden_pixels(checkpoint: str, key: str) -> None:
    root = fixtures.root()
    entries = json.loads((root / "goldens" / "mllama" / "pixels.json").read_text("utf-8"))["entries"]
    processor = MllamaImageProcessor.from_pretrained(root / "checkpoints" / checkpoint)
    seen = 0
    for name, wanted in entries.items():
        file, recorded, kind = name.split("|")
        if recorded != checkpoint or kind != key:
            continue
        path = root / "images" / file
        with Image.open(path) as opened:
            image = read_image(path) if kind == "path" else opened.copy()
        made = processor.preprocess([[image]], return_tensors="np")
        assert made.num_tiles == [[int(made.aspect_ratio_mask.sum())]], name
        for tensor in NAMES:
            digest = hashlib.sha256(np.ascontiguousarray(made[tensor]).tobytes()).hexdigest()
            assert digest == wanted[tensor]["sha256"], f"{tensor} of {name} differs from {wanted['made_by']}"
        seen += 1
    assert seen >= 5, f"only {seen} goldens were found"


# forms and switches --------------------------------------------------------------------------------------------------


def test_images_may_be_given_in_every_form(tmp_path: Path) -> None:
    # MLLAMA-IMG-038, MLLAMA-IMG-042
    image = noise_image(50, 40)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    processor = MllamaImageProcessor(**TINY)
    wanted = processor.preprocess(image, return_tensors="np")
    first = array.transpose(2, 0, 1)
    for value in (array, first, torch.from_numpy(array.copy()), array.astype(np.float32), tmp_path / "a.png"):
        _assert_same(processor.preprocess(value, return_tensors="np"), wanted, type(value).__name__)
    for value, format_ in ((array, "channels_last"), (first, "channels_first"), (image, "channels_last")):
        _assert_same(processor.preprocess(value, input_data_format=format_), wanted, format_)
    for nested in ([image], (image,), [[image]], ((image,),)):
        _assert_same(processor.preprocess(nested, return_tensors="np"), wanted, "nesting")
    assert processor([image, image]).pixel_values.shape[:2] == (1, 2), "a flat list is one sample"
    assert processor([[image], [image]]).pixel_values.shape[:2] == (2, 1)
    made = processor([[], [image]])
    assert made.num_tiles == [[], wanted.num_tiles[0]]
    assert made.aspect_ratio_ids[0].tolist() == [0]
    assert not made.pixel_values[0].any(), "a sample without images has a padding image of zeros"


def test_fractions_stay_fractions() -> None:
    image = noise_image(50, 40)
    fractions = np.asarray(image).astype(np.float64) / 255
    processor = MllamaImageProcessor(**TINY)
    reference = reference_image_processor(**TINY)
    made = processor.preprocess(fractions, do_rescale=False, return_tensors="np")
    _assert_same(made, reference.preprocess(fractions, do_rescale=False, return_tensors="np"), "not rescaled")
    assert made.pixel_values.min() == -1
    assert made.pixel_values.max() > 0.9
    twice = processor.preprocess(fractions, do_normalize=False, return_tensors="np")
    assert 0 < twice.pixel_values.max() <= 1 / 255 + 1e-9, "rescaling twice is what was asked for"
    if not NEW:  # the last bit differs since 4.46, which makes the product in float64
        _assert_same(twice, reference.preprocess(fractions, do_normalize=False, return_tensors="np"), "twice")


def test_arrays_are_never_converted() -> None:
    grey = np.asarray(noise_image(50, 40))[..., :1]
    made = MllamaImageProcessor(**TINY).preprocess(grey, image_mean=0.5, image_std=0.5)
    assert made.pixel_values.shape == (1, 1, 4, 1, 28, 28), "conversion is for pictures only"
    with pytest.raises(ValueError, match="image_mean has 3 values for an image of 1 channels"):
        MllamaImageProcessor(**TINY).preprocess(grey)


def test_padding_is_zero_before_it_is_normalised_and_missing_tiles_are_zero() -> None:
    # MLLAMA-IMG-034
    white = Image.new("RGB", (14, 28), (255, 255, 255))
    made = MllamaImageProcessor(**TINY, **CLIP).preprocess(white)["pixel_values"][0, 0]
    for channel in range(3):
        mean, std = np.float32(CLIP["image_mean"][channel]), np.float32(CLIP["image_std"][channel])
        assert np.unique(made[0, channel, :, :14]).tolist() == [(np.float32(1) - mean) / std]
        assert np.unique(made[0, channel, :, 14:]).tolist() == [(np.float32(0) - mean) / std]
    assert not made[1:].any()


def test_values_follow_the_switches() -> None:
    white = Image.new("RGB", (28, 28), (255, 255, 255))

    def value(**options: Any) -> float:
        return float(MllamaImageProcessor(**TINY).preprocess(white, **options)["pixel_values"].max())

    assert value() == 1.0
    assert value(do_normalize=False) == 1.0
    assert value(do_rescale=False, do_normalize=False) == 255.0
    assert value(image_mean=0.0, image_std=0.5) == 2.0
    assert value(image_mean=[0.0] * 3, image_std=(0.25,) * 3) == 4.0
    assert value(rescale_factor=2 / 255, do_normalize=False) == 2.0
    assert value(rescale_factor=2, do_normalize=False) == 510.0
    assert value(do_rescale=False, image_mean=127.5, image_std=127.5) == 1.0


def test_size_and_tiles_can_be_set_for_a_call() -> None:
    # MLLAMA-IMG-041
    made = MllamaImageProcessor().preprocess(noise_image(90, 30), size={"height": 56, "width": 56}, max_image_tiles=2)
    assert made.pixel_values.shape == (1, 1, 2, 3, 56, 56)
    assert made.aspect_ratio_ids.tolist() == [[2]]
    assert made.aspect_ratio_mask.shape == (1, 1, 2)


def test_what_is_returned_follows_return_tensors() -> None:
    # MLLAMA-IMG-016, MLLAMA-IMG-039, MLLAMA-IMG-040
    processor = MllamaImageProcessor(**TINY)
    for framework, kind in ((None, np.ndarray), ("np", np.ndarray), ("pt", torch.Tensor)):
        made = processor.preprocess(noise_image(30, 20), return_tensors=framework)
        assert set(made) == {*NAMES, "num_tiles"}
        assert {type(made[name]) for name in NAMES} == {kind}
        assert [str(made[name].dtype).removeprefix("torch.") for name in NAMES] == ["float32", "int64", "int64"]
        assert made.num_tiles == [[2]]


# errors --------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"do_pad": False}, "do_pad is False"),
    ({"do_resize": False}, "do_resize is False"),
    ({"size": {"height": 28, "width": 14}}, "height and width of a tile have to be equal"),
    ({"size": {"longest_edge": 28}}, r'size .* is not valid; it needs \{"height": n, "width": n\}'),
    ({"size": {"height": 28}}, "size .* is not valid"),
    ({"size": 28}, "size 28 is not valid"),
    ({"size": {"height": 0, "width": 0}}, "at least 1 pixel"),
    ({"size": {"height": 2.5, "width": 2.5}}, "whole number"),
    ({"max_image_tiles": 0}, "max_image_tiles is 0; it has to be a positive integer"),
    ({"max_image_tiles": -1}, "max_image_tiles is -1"),
    ({"max_image_tiles": 2.5}, r"max_image_tiles is 2\.5"),
    ({"resample": 77}, "resample 77 is no PIL filter"),
    ({"rescale_factor": "a"}, "rescale_factor 'a' is no number"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_named_when_constructed_and_when_called(options: dict[str, Any], message: str) -> None:
    # MLLAMA-IMG-013, MLLAMA-IMG-014, MLLAMA-IMG-031, MLLAMA-IMG-032, MLLAMA-IMG-043
    with pytest.raises(ValueError, match=message):
        MllamaImageProcessor(**{**TINY, **options})
    with pytest.raises(ValueError, match=message) as caught:
        MllamaImageProcessor(**TINY).preprocess(noise_image(8, 9), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"return_tensors": "tf"}, "return_tensors 'tf' is not available; valid are pt, np and None"),
        ({"input_data_format": "none"}, "input_data_format 'none' is unknown"),
        ({"image_mean": [0.5] * 2}, "image_mean has 2 values"),
        ({"image_std": 0.0}, "image_std"),
        ({"images": []}, "images must be an image, a list of images"),
        ({"images": [[], []]}, "no image in any sample"),
        ({"images": [[noise_image(2, 2)], noise_image(2, 2)]}, "images must be an image, a list of images"),
        ({"images": "none.png"}, "image file none.png does not exist"),
        ({"images": "https://example.org/a.png"}, "only with fetch=True"),
    ],
)
def test_wrong_calls_are_named(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MllamaImageProcessor(**TINY).preprocess(**{"images": noise_image(8, 9), **call})
    assert "\n" not in str(caught.value)


def test_what_is_no_image_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="NoneType is no image"):
        MllamaImageProcessor(**TINY).preprocess([None])
