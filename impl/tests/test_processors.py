"""Prompts, batches and files of the processor, against an independent reading of the rules and transformers."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import pickle
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlmqual_contract import fixtures
from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor
from vlmqual_impl.image_files import read_image
from vlmqual_impl.processors import check_counts, collapse, expand, image_text

BOS, PAD, END = "<|begin_of_text|>", "<|reserved_special_token_0|>", "<end_of_utterance>"
FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TINY: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
GRIDS = [(0, 0), *((rows, columns) for rows in range(1, 5) for columns in range(1, 5) if rows * columns > 1)]


def _tokenizer() -> Any:
    """Byte-level, without merges, so that text is never lost and every special token is one id."""
    core = Tokenizer(
        models.BPE({sign: index for index, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in (BOS, PAD, END, FAKE, IMAGE)])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, pad_token=PAD, padding_side="left", clean_up_tokenization_spaces=False
    )


def _processor(image_seq_len: int = 3, **options: Any) -> Idefics3Processor:
    return Idefics3Processor(
        Idefics3ImageProcessor(**{**TINY, **options}), _tokenizer(), image_seq_len=image_seq_len, chat_template=TEMPLATE
    )


def _image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _reference_images(**options: Any) -> Any:
    """The library's Pillow image processor: a class of its own since 5.0."""
    if int(transformers.__version__.split(".")[0]) < 5:
        return transformers.Idefics3ImageProcessor(**options)
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(**options)


def _reference(**options: Any) -> Any:
    return transformers.Idefics3Processor(
        _reference_images(**{**TINY, **options}), _tokenizer(), image_seq_len=3, chat_template=TEMPLATE
    )


def _same(made: Any, wanted: Any, about: str) -> None:
    assert set(made) == set(wanted), about
    for name in made:
        if name in ("input_ids", "attention_mask") and isinstance(made[name], list):  # rows of unequal length
            assert made[name] == wanted[name], f"{about}: {name} differs from transformers {transformers.__version__}"
            continue
        one, other = np.asarray(made[name]), np.asarray(wanted[name])
        assert one.shape == other.shape, f"{about}: {name} has shape {one.shape}, transformers has {other.shape}"
        assert np.array_equal(one, other), f"{about}: {name} differs from transformers {transformers.__version__}"


# prompts -------------------------------------------------------------------------------------------------------------


def _written_out(rows: int, columns: int, length: int) -> str:
    """The rule read once more, token by token in reading order, in another way than the code."""
    tokens: list[str] = []
    for cell in range(rows * columns):
        tokens += [FAKE, f"<row_{cell // columns + 1}_col_{cell % columns + 1}>", *[IMAGE] * length]
        if cell % columns == columns - 1:
            tokens.append("\n")
    if rows * columns:
        tokens.append("\n")
    return "".join([*tokens, FAKE, GLOBAL, *[IMAGE] * length, FAKE])


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize("length", [1, 3, 169])
def test_every_grid_is_written_out_as_the_rule_says(rows: int, columns: int, length: int) -> None:
    assert image_text(rows, columns, length) == _written_out(rows, columns, length)


def test_the_rule_s_own_examples() -> None:
    assert image_text(0, 0, 2) == f"{FAKE}{GLOBAL}<image><image>{FAKE}"
    assert image_text(2, 1, 1) == (
        f"{FAKE}<row_1_col_1><image>\n{FAKE}<row_2_col_1><image>\n\n{FAKE}{GLOBAL}<image>{FAKE}"
    )


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4), st.text("ab <>\n", max_size=8))
def test_there_are_as_many_image_tokens_as_frames_need(grids: list[tuple[int, int]], text: str) -> None:
    grids = [(0, 0) if grid == (1, 1) else grid for grid in grids]
    made = expand(text + f"{IMAGE}{text}" * len(grids), grids, 5)
    assert made.count(IMAGE) == sum(5 * (rows * columns + 1) for rows, columns in grids)
    assert made == text + "".join(_written_out(*grid, 5) + text for grid in grids)


def test_several_images_stand_at_their_own_markers_in_order() -> None:
    made = expand("a<image>b<image>\n<image>", [(1, 2), (0, 0), (2, 1)], 1)
    assert made == f"a{_written_out(1, 2, 1)}b{_written_out(0, 0, 1)}\n{_written_out(2, 1, 1)}"


def test_decoded_tags_become_one_marker_again() -> None:
    assert collapse(image_text(0, 0, 2)) == f"{FAKE}<image><image><image>{FAKE}"
    assert collapse("a\n<global-img>\nb<row_1_col_2>\nc") == "a<image>b<image>c"
    assert collapse("<row_1_col_1><row_1_col_2>\n<global-img>") == "<image>"
    assert collapse("no tags\n<row_x_col_y>") == "no tags\n<row_x_col_y>"


@pytest.mark.parametrize(
    ("texts", "counts"),
    [(["<image>"], [2]), (["<image>"], []), (["a"], [1]), (["<image>", ""], [0, 1]), (["a"], [0, 0])],
)
def test_markers_and_images_have_to_match_in_every_sample(texts: list[str], counts: list[int]) -> None:
    with pytest.raises(ValueError, match="markers"):
        check_counts(texts, counts)


# image processor -----------------------------------------------------------------------------------------------------


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
        _image(width, height), return_row_col_info=True, return_tensors="np", **options
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
        images = [[_image(width, height, number)], [_image(height, width, number), _image(width, 7, number)]]
        call: dict[str, Any] = {"return_tensors": "np", "return_row_col_info": True}
        about = f"seed {seed}, number {number}: {width} x {height}, {options}"
        made = Idefics3ImageProcessor(**options).preprocess(images, **call)
        wanted = _reference_images(**options).preprocess(images, **call)
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
    image = _image(width, height)
    made = Idefics3ImageProcessor().preprocess(image, return_tensors="np")
    _same(made, _reference_images().preprocess(image, return_tensors="np"), f"{width} x {height}")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 50), (50, 3), (2, 2), (500, 1), (1, 500), (4, 60)])
@pytest.mark.parametrize("do_resize", [True, False])
def test_degenerate_images_are_read_the_right_way_round(size: tuple[int, int], do_resize: bool) -> None:
    image = _image(*size)
    call: dict[str, Any] = {"do_resize": do_resize, "return_tensors": "np", "return_row_col_info": True}
    made = Idefics3ImageProcessor(**TINY).preprocess(image, **call)
    rows, columns = made.rows[0][0], made.cols[0][0]
    assert (columns >= rows) if size[0] >= size[1] else (rows >= columns), "the grid lies as the image does"
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4.46 takes sides of 1 and 3 for channels
        _same(made, _reference_images(**TINY).preprocess(image, **call), f"{size}")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
def test_every_mode_gives_three_channels(mode: str) -> None:
    source = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)) if mode == "I;16" else _image(30, 20)
    image = source if mode == "I;16" else source.convert(mode)
    made = Idefics3ImageProcessor(**TINY).preprocess(image, return_tensors="np")
    assert made.pixel_values.shape[2] == 3
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4.46 refuses or misreads them
        _same(made, _reference_images(**TINY).preprocess(image, return_tensors="np"), mode)


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
    image = _image(30, 20)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    wanted = Idefics3ImageProcessor(**TINY).preprocess(image, return_tensors="np")
    for value in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), tmp_path / "a.png"):
        _same(Idefics3ImageProcessor(**TINY).preprocess(value, return_tensors="np"), wanted, type(value).__name__)
    for value in ([image], (image,), [[image]], ((image,),)):
        _same(Idefics3ImageProcessor(**TINY).preprocess(value, return_tensors="np"), wanted, "nesting")
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
    last = np.asarray(_image(30, 20))
    first = last.transpose(2, 0, 1)
    processor = Idefics3ImageProcessor(**TINY)
    wanted = processor.preprocess(last, return_tensors="np").pixel_values
    assert wanted.shape == (1, 13, 3, 16, 16)
    moved = processor.preprocess(last, return_tensors="np", data_format="channels_last").pixel_values
    assert np.array_equal(moved.transpose(0, 1, 4, 2, 3), wanted)
    assert processor.preprocess(last, data_format=None)["pixel_values"][0][0].shape == (16, 16, 3)
    assert processor.preprocess(first, data_format=None)["pixel_values"][0][0].shape == (3, 16, 16)
    assert processor.preprocess(_image(30, 20), data_format=None)["pixel_values"][0][0].shape == (16, 16, 3)
    masked = processor.preprocess(last, data_format="channels_last")["pixel_attention_mask"]
    assert masked[0][0].shape == (16, 16)


def test_without_padding_there_is_no_mask_and_samples_keep_their_frames() -> None:
    images = [[_image(30, 20)], [_image(30, 20), _image(16, 16)]]
    made = Idefics3ImageProcessor(**TINY, do_pad=False).preprocess(images)
    assert set(made) == {"pixel_values"}
    assert [len(sample) for sample in made["pixel_values"]] == [13, 30]
    with pytest.raises(ValueError, match=r"\[13, 30\] frames.*do_pad=True"):
        Idefics3ImageProcessor(**TINY, do_pad=False).preprocess(images, return_tensors="np")


def test_what_is_returned_follows_return_tensors() -> None:
    processor = Idefics3ImageProcessor(**TINY)
    for framework, kind in (("np", np.ndarray), ("pt", torch.Tensor)):
        made = processor.preprocess(_image(30, 20), return_tensors=framework)
        assert isinstance(made.pixel_values, kind)
        assert isinstance(made.pixel_attention_mask, kind)
        assert (str(made.pixel_values.dtype), str(made.pixel_attention_mask.dtype)) in (
            ("float32", "int64"),
            ("torch.float32", "torch.int64"),
        )
    made = processor.preprocess(_image(30, 20))
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
        Idefics3ImageProcessor(**TINY).preprocess(_image(8, 9), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [[], [[_image(2, 2)], _image(2, 2)]])
def test_wrong_nesting_is_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="images must be an image, a list of images"):
        Idefics3ImageProcessor(**TINY).preprocess(images)


# processor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_ids_decode_to_the_expansion_of_every_grid(grid: tuple[int, int]) -> None:
    rows, columns = grid
    image = _image(max(columns, 1) * 16, max(rows, 1) * 16)
    processor = _processor(do_resize=False)
    made = processor(images=image, text="see <image>here", return_tensors="np")
    text = processor.tokenizer.decode(made.input_ids[0])
    assert text == f"{BOS}see {_written_out(rows, columns, 3)}here"
    assert made.pixel_values.shape[1] == rows * columns + 1
    assert set(made) == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}


def test_batches_of_different_image_counts_are_padded_on_the_left() -> None:
    processor = _processor()
    wide, tall, square = _image(60, 20), _image(20, 60), _image(9, 9)
    made = processor(
        images=[[wide], [tall, square], []],
        text=["a<image>", "<image>b<image>", "text alone"],
        padding=True,
        return_tensors="pt",
    )
    wanted = [
        f"{BOS}a{_written_out(2, 4, 3)}",
        f"{BOS}{_written_out(4, 2, 3)}b{_written_out(4, 4, 3)}",
        f"{BOS}text alone",
    ]
    for row, mask, text in zip(made.input_ids, made.attention_mask, wanted, strict=True):
        kept = processor.tokenizer.decode(row[mask.bool()])
        assert kept == text
        assert processor.tokenizer.decode(row[~mask.bool()]) == PAD * int((mask == 0).sum())
        assert mask.tolist() == sorted(mask.tolist()), "padding stands on the left"
    assert made.pixel_attention_mask.flatten(2).any(-1).sum(1).tolist() == [9, 26, 0]
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert (made.input_ids == image_id).sum(1).tolist() == [27, 78, 0], "three tokens for every frame"


def test_random_batches_are_what_transformers_makes() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    processor, reference = _processor(), _reference()
    for number in range(30):
        counts = rng.integers(1, 4, int(rng.integers(1, 4)))
        images = [[_image(*map(int, rng.integers(5, 90, 2)), number) for _ in range(count)] for count in counts]
        text = [f"{'x' * int(rng.integers(0, 5))}<image>" * int(count) + "?" for count in counts]
        call: dict[str, Any] = {"images": images, "text": text, "padding": True, "return_tensors": "np"}
        _same(processor(**call), reference(**call), f"seed {seed}, batch {number}")


@pytest.mark.parametrize(
    "call",
    [
        {"images": "flat", "text": "<image><image>a"},
        {"images": "one", "text": ["<image>"], "return_tensors": "pt"},
        {"images": "one"},
        {"images": "one", "text": "<image>", "text_kwargs": {"add_special_tokens": False}},
        {"images": "one", "text": "<image>", "images_kwargs": {"do_image_splitting": False}},
        {"images": "nested", "text": ["<image>a", "<image>bcd"]},
    ],
)
def test_calls_give_what_transformers_gives(call: dict[str, Any]) -> None:
    one = _image(60, 40)
    call = {**call, "images": {"one": one, "flat": [one, one], "nested": [[one], [one]]}[call["images"]]}
    made, wanted = _processor()(**call), _reference()(**call)
    shown = {key: value for key, value in wanted.items() if key not in ("rows", "cols")}
    _same(made, shown, str(call.get("text")))


def test_options_may_be_given_flat_or_sorted() -> None:
    image = _image(60, 40)
    flat = _processor()(images=image, text="<image>", do_image_splitting=False, padding="max_length", max_length=30)
    sorted_ = _processor()(
        images=image,
        text="<image>",
        images_kwargs={"do_image_splitting": False},
        text_kwargs={"padding": "max_length", "max_length": 30},
    )
    assert flat["input_ids"] == sorted_["input_ids"]
    assert len(flat["input_ids"][0]) == 30
    assert len(flat["pixel_values"][0]) == 1
    common = _processor()(text="a", common_kwargs={"return_tensors": "np"})
    assert isinstance(common.input_ids, np.ndarray)


def test_text_alone_and_images_alone_are_accepted() -> None:
    processor = _processor()
    made = processor(text="hello")
    assert set(made) == {"input_ids", "attention_mask"}
    assert processor.tokenizer.decode(made["input_ids"][0]) == f"{BOS}hello"
    assert isinstance(made["input_ids"][0], list)
    assert [len(row) for row in processor(text=["a", "bcd"])["input_ids"]] == [2, 4], "nothing is padded unasked"
    assert set(processor(images=_image(9, 9))) == {"pixel_values", "pixel_attention_mask"}


def test_the_number_of_image_tokens_can_be_set_for_a_call() -> None:
    processor = _processor(image_seq_len=169, do_image_splitting=False)
    ids = processor(images=_image(9, 9), text=IMAGE)["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 169
    ids = processor(images=_image(9, 9), text=IMAGE, image_seq_len=5)["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 5


def test_changing_the_image_processor_afterwards_takes_effect() -> None:
    processor = _processor()
    processor.image_processor.do_image_splitting = False
    assert processor(images=_image(60, 40), text=IMAGE, return_tensors="np").pixel_values.shape[1] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "neither text nor images"),
        ({"text": IMAGE}, r"\[1\] <image> markers and the samples have \[0\] images"),
        ({"text": "a", "images": _image(2, 2)}, r"\[0\] <image> markers and the samples have \[1\] images"),
        ({"text": [IMAGE, IMAGE], "images": [_image(2, 2)] * 2}, r"samples have \[2\] images"),
        ({"text": [IMAGE * 2, "b"], "images": [[_image(2, 2)]] * 2}, r"\[2, 0\] .* \[1, 1\]"),
        ({"text": [["a", "b"]], "is_split_into_words": True}, "is_split_into_words"),
        ({"text": "a", "text_kwargs": {"is_split_into_words": True}}, "is_split_into_words"),
        ({"text": [["a", "b"]]}, "a string or a list of strings"),
        ({"text": []}, "a string or a list of strings"),
        ({"text": 3}, "a string or a list of strings"),
        ({"text": "a", "images": []}, "images must be"),
        ({"text": "a", "images": [[]]}, "pass images=None for text alone"),
        ({"text": "a", "audio": 1}, "audio were passed"),
        ({"text": "a", "videos": 1}, "videos were passed"),
        ({"text": "a", "return_tensors": "tf"}, "return_tensors 'tf' is not available; valid are pt, np and None"),
        ({"text": "a", "return_tensors": "jax"}, "return_tensors 'jax' is not available"),
        ({"text": IMAGE, "images": _image(2, 2), "image_seq_len": 0}, "image_seq_len is 0"),
        ({"text": IMAGE, "images": "none.png"}, "image file none.png does not exist"),
        ({"text": IMAGE, "images": "https://example.org/a.png"}, "only with allow_urls=True"),
        ({"text": IMAGE, "images": "http://127.0.0.1/a.png", "allow_urls": True}, "not a public address"),
    ],
)
def test_wrong_calls_are_named(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _processor()(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [({"text": "a", "colour": 1}, "'colour'"), ({"text": IMAGE, "images": [None]}, "NoneType is no image")],
)
def test_unknown_keywords_and_other_things_are_type_errors(call: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _processor()(**call)


def test_both_parts_of_a_processor_are_required() -> None:
    with pytest.raises(ValueError, match="image_processor is None"):
        Idefics3Processor(None, _tokenizer())
    with pytest.raises(ValueError, match="tokenizer is None"):
        Idefics3Processor(Idefics3ImageProcessor())
    with pytest.raises(TypeError, match="does not know colour; it knows image_processor"):
        Idefics3Processor(Idefics3ImageProcessor(), _tokenizer(), colour=1)
    with pytest.raises(ValueError, match=r"image_seq_len is 2\.5"):
        Idefics3Processor(Idefics3ImageProcessor(), _tokenizer(), image_seq_len=2.5)  # type: ignore[arg-type]


def test_the_image_tokens_are_single_ids_also_of_a_tokenizer_without_them() -> None:
    core = Tokenizer(models.BPE({sign: index for index, sign in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    assert len(bare(IMAGE)["input_ids"]) > 1
    processor = Idefics3Processor(Idefics3ImageProcessor(), bare)
    for token in (FAKE, IMAGE, END):
        assert len(processor.tokenizer(token)["input_ids"]) == 1
    assert processor.tokenizer.decode(bare(f"a{IMAGE}")["input_ids"], skip_special_tokens=True) == "a"


# batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_mapping_with_attributes_that_moves_as_a_whole() -> None:
    made = _processor()(images=_image(9, 9), text=IMAGE, return_tensors="pt")
    assert {**made}.keys() == dict(made.items()).keys()
    assert made.input_ids is made["input_ids"]
    with pytest.raises(AttributeError, match=r"the batch has no 'labels'; it has .*pixel_values"):
        _ = made.labels
    assert made.to("cpu") is made
    made.to(dtype=torch.bfloat16)
    assert made.pixel_values.dtype == torch.bfloat16
    assert made.input_ids.dtype == made.pixel_attention_mask.dtype == torch.int64, "ids are never cast"
    made.to("cpu", torch.float16)
    assert made.pixel_values.dtype == torch.float16
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.input_ids, made.input_ids)


# text ----------------------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": " A page."}]},
]


def test_chats_are_rendered_by_the_template() -> None:
    processor = _processor()
    wanted = f"{BOS}User:<image>What is it?{END}\nAssistant: A page.{END}\n"
    assert processor.apply_chat_template(MESSAGES) == wanted
    assert processor.apply_chat_template([MESSAGES] * 2, add_generation_prompt=True) == [f"{wanted}Assistant:"] * 2
    assert processor.apply_chat_template(MESSAGES, chat_template="{{ messages | length }}") == "2"
    ids = processor.apply_chat_template(MESSAGES, tokenize=True)
    assert processor.tokenizer.decode(ids) == wanted


def test_without_a_template_chats_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no chat template"):
        Idefics3Processor(Idefics3ImageProcessor(), _tokenizer()).apply_chat_template(MESSAGES)


def test_decoding_forwards_to_the_tokenizer_and_restores_markers() -> None:
    processor = _processor()
    ids = processor(images=_image(60, 60), text="a <image>b")["input_ids"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a <image>b"
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a <image>b"]
    assert processor.decode(ids[0]).startswith(f"{BOS}a {FAKE}<image><image><image><image>{FAKE}")


# files ---------------------------------------------------------------------------------------------------------------


def _call() -> dict[str, Any]:
    images = [[_image(60, 40)], [_image(20, 40)]]
    return {"images": images, "text": ["<image>hi", "yo<image>"], "padding": True, "return_tensors": "np"}


def test_a_saved_processor_loads_here_and_in_transformers(tmp_path: Path) -> None:
    wanted = _processor()(**_call())
    _processor().save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    for loaded in (Idefics3Processor.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(folder)):
        assert type(loaded).__name__ == "Idefics3Processor"
        assert (loaded.image_seq_len, loaded.chat_template) == (3, TEMPLATE)
        _same(loaded(**_call()), wanted, type(loaded).__module__)
    written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast", "a class that 4.46 knows too"


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    _reference().save_pretrained(tmp_path)
    loaded = Idefics3Processor.from_pretrained(tmp_path)
    assert (loaded.image_seq_len, loaded.chat_template) == (3, TEMPLATE)
    _same(loaded(**_call()), _reference()(**_call()), "saved by transformers")


def test_both_layouts_of_files_are_read(tmp_path: Path) -> None:
    _processor().save_pretrained(tmp_path)
    options = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    newer = {"image_processor": options, "image_seq_len": 3, "processor_class": "Idefics3Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    loaded = Idefics3Processor.from_pretrained(tmp_path)
    assert (loaded.image_seq_len, loaded.chat_template) == (3, TEMPLATE)
    _same(loaded(**_call()), _processor()(**_call()), "5.x layout")
    assert Idefics3ImageProcessor.from_pretrained(tmp_path).size == TINY["size"]


def test_keywords_override_the_files(tmp_path: Path) -> None:
    _processor().save_pretrained(tmp_path)
    for tiles in (2, 3, 5, 6):
        size = {"longest_edge": tiles * 16}
        loaded = Idefics3Processor.from_pretrained(tmp_path, size=size, image_seq_len=9, trust_remote_code=False)
        assert (loaded.image_processor.size, loaded.image_seq_len) == (size, 9)
        made = loaded(images=_image(30, 30), text=IMAGE)
        assert made["input_ids"][0].count(loaded.tokenizer.convert_tokens_to_ids(IMAGE)) == 9 * (tiles * tiles + 1)
    with pytest.raises(TypeError, match="does not know sice; it knows do_convert_rgb"):
        Idefics3Processor.from_pretrained(tmp_path, sice={"longest_edge": 2})
    with pytest.raises(TypeError, match="does not know sice"):
        Idefics3ImageProcessor.from_pretrained(tmp_path, sice={"longest_edge": 2})


def test_unknown_keys_of_files_are_written_back(tmp_path: Path) -> None:
    _processor().save_pretrained(tmp_path / "a")
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = tmp_path / "a" / name
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "made_up": {"x": 1}}))
    Idefics3Processor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((tmp_path / "b" / name).read_text("utf-8"))["made_up"] == {"x": 1}, name


def test_a_template_set_here_wins_over_the_tokenizer_s_after_saving(tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = "the tokenizer's"
    assert Idefics3Processor(Idefics3ImageProcessor(), tokenizer).chat_template == "the tokenizer's"
    Idefics3Processor(Idefics3ImageProcessor(), tokenizer, chat_template="mine").save_pretrained(tmp_path)
    assert Idefics3Processor.from_pretrained(tmp_path).chat_template == "mine"
    assert transformers.AutoProcessor.from_pretrained(tmp_path).chat_template == "mine"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", None, "looked for preprocessor_config.json and an image_processor in processor_"),
        ("tokenizer_config.json", None, "looked for tokenizer_config.json"),
        ("tokenizer.json", "{", "the tokenizer cannot be read"),
        ("preprocessor_config.json", "{", r"preprocessor_config\.json: cannot be read as JSON"),
        ("processor_config.json", "[]", r"processor_config\.json: holds no JSON object"),
        ("chat_template.json", "{}", r"chat_template\.json: holds no chat_template"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    _processor().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=re.sub(r"(?<!\\)\.", r"\.", message)) as caught:
        Idefics3Processor.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such checkpoint directory"):
        Idefics3Processor.from_pretrained(tmp_path / "nowhere")


def test_released_geometry_gives_the_golden_prompts() -> None:
    root = fixtures.root()
    processor = Idefics3Processor.from_pretrained(root / "checkpoints" / "idefics3-8b-processor")
    made = processor(images=_image(80, 60), text=IMAGE)
    ids = made["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 169 * 13
    entries = json.loads((root / "goldens" / "idefics3" / "prompts.json").read_text("utf-8"))["entries"]
    chats = [entry for name, entry in entries.items() if name.startswith("chat|")]
    assert chats, "prompts.json has no chats"
    for entry in chats:
        given_ = processor.apply_chat_template(entry["messages"], add_generation_prompt=entry["add_generation_prompt"])
        assert given_ == entry["text"]
