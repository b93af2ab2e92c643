"""Calls of Mllama's processor, against transformers and goldens."""

from __future__ import annotations

import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from mllama_processor_objects import (
    BOS,
    IMAGE,
    NEW,
    PAD,
    TINY,
    reference_processor,
    small_processor,
    tokenizer,
)
from processor_objects import assert_same, noise_image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmqual_contract import fixtures
from vlmqual_impl.api.mllama_processing import MllamaImageProcessor, MllamaProcessor

WIDE = noise_image(80, 20)  # three tiles of 28
SMALL = noise_image(9, 9)  # one tile

# calls ---------------------------------------------------------------------------------------------------------------


def test_a_prompt_with_an_image_gives_the_six_tensors() -> None:
    # MLLAMA-PROC-009, MLLAMA-PROC-013, MLLAMA-PROC-017
    processor = small_processor()
    made = processor(text=f"{IMAGE}If I had to write a haiku for this one", images=WIDE, return_tensors="pt")
    assert set(made) == {
        *("input_ids", "attention_mask", "cross_attention_mask"),
        *("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
    }
    assert all(isinstance(value, torch.Tensor) for value in made.values())
    ids = made.input_ids
    assert processor.tokenizer.decode(ids[0]) == f"{IMAGE}{BOS}If I had to write a haiku for this one"
    assert ids[0, 0] == processor.image_token_id
    assert made.pixel_values.shape == (1, 1, 4, 3, 28, 28)
    assert made.cross_attention_mask[0, :, 0].tolist() == [[1, 1, 1, 0]] * ids.shape[1]
    assert {str(made[name].dtype) for name in made if name != "pixel_values"} == {"torch.int64"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_different_image_counts_are_padded(side: str) -> None:
    # MLLAMA-PROC-004, MLLAMA-PROC-020
    processor = small_processor()
    texts = [f"a{IMAGE}b", "text alone, rather long", f"{IMAGE}{IMAGE}c"]
    made = processor(
        images=[[SMALL], [], [WIDE, SMALL]], text=texts, padding=True, padding_side=side, return_tensors="np"
    )
    wanted = [f"{BOS}a{IMAGE}b", f"{BOS}text alone, rather long", f"{IMAGE}{IMAGE}{BOS}c"]
    for row, mask, text in zip(made.input_ids, made.attention_mask, wanted, strict=True):
        assert processor.tokenizer.decode(row[mask == 1]) == text
        assert processor.tokenizer.decode(row[mask == 0]) == PAD * int((mask == 0).sum())
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right"), f"padding stands on the {side}"
    length = made.input_ids.shape[1]
    assert made.cross_attention_mask.shape == (3, length, 2, 4)
    assert made.aspect_ratio_ids.tolist() == [[1, 0], [0, 0], [3, 1]]
    assert made.aspect_ratio_mask.tolist() == [
        [[1, 0, 0, 0], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 0]],
        [[1, 1, 1, 0], [1, 0, 0, 0]],
    ]
    assert not made.pixel_values[1].any()
    assert not made.cross_attention_mask[1].any(), "a row without images sees none"
    first = made.input_ids[0].tolist().index(processor.image_token_id)
    assert made.cross_attention_mask[0, :, 0, 0].tolist() == [0] * first + [1] * (length - first)
    assert not made.cross_attention_mask[0, :, 1].any(), "a padding image is seen by nobody"
    first = made.input_ids[2].tolist().index(processor.image_token_id)
    assert made.cross_attention_mask[2, :, 0, 2].tolist() == [0] * first + [1] * (length - first)
    assert made.cross_attention_mask[2, :, 1, 0].tolist() == [0] * (first + 1) + [1] * (length - first - 1)


def test_random_batches_are_what_transformers_makes() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    processor, reference = small_processor(), reference_processor()
    for number in range(60):
        counts = rng.integers(0 if NEW else 1, 4, int(rng.integers(1, 4)))  # 4.45 refuses samples without images
        counts[0] = max(counts[0], 1)
        images = [[noise_image(*map(int, rng.integers(20, 90, 2)), number) for _ in range(count)] for count in counts]
        text = [
            "".join("x" * int(rng.integers(0, 4)) + IMAGE for _ in range(count)) + "y" * int(rng.integers(0, 9))
            for count in counts
        ]
        call: dict[str, Any] = {"images": images, "text": text}
        if rng.random() < 0.8:
            call |= {"padding": True, "return_tensors": "np"}
        about = f"seed {seed}, batch {number}: {text}"
        assert_same(processor(**call), reference(**call), about)


@pytest.mark.parametrize(
    "call",
    [
        {"images": "flat", "text": f"{IMAGE}{IMAGE}a"},
        {"images": "one", "text": [IMAGE], "return_tensors": "pt"},
        {"images": "one"},
        {"images": "one", "return_tensors": "pt"},
        {"text": "hello"},
        {"text": ["hello", f"{BOS}you there"], "padding": True, "return_tensors": "np"},
        {"images": "one", "text": IMAGE, "text_kwargs": {"padding": "max_length", "max_length": 30}},
        {"images": "one", "text": IMAGE, "images_kwargs": {"size": {"height": 56, "width": 56}}},
        {"images": "one", "text": f"{IMAGE}a", "common_kwargs": {"return_tensors": "np"}},
        {"images": "nested", "text": [f"{IMAGE}a", f"{IMAGE}bcd"]},
        {"images": "one", "text": f"{BOS}{IMAGE}a", "return_tensors": "np"},
    ],
)
def test_calls_give_what_transformers_gives(call: dict[str, Any]) -> None:
    one = noise_image(60, 40)
    forms: dict[str, Any] = {"one": one, "flat": [one, one], "nested": [[one], [one]]}
    if "images" in call:
        call = {**call, "images": forms[call["images"]]}
    assert_same(small_processor()(**call), reference_processor()(**call), str(call.get("text")))


def test_options_may_be_given_flat_or_sorted() -> None:
    # MLLAMA-PROC-010
    size = {"height": 56, "width": 56}
    flat = small_processor()(
        images=WIDE, text=IMAGE, size=size, padding="max_length", max_length=30, return_tensors="np"
    )
    sorted_ = small_processor()(
        images=WIDE,
        text=IMAGE,
        images_kwargs={"size": size},
        text_kwargs={"padding": "max_length", "max_length": 30},
        common_kwargs={"return_tensors": "np"},
    )
    assert_same(flat, sorted_, "flat or sorted")
    assert flat.pixel_values.shape[-2:] == (56, 56)
    assert flat.input_ids.shape == (1, 30)


def test_the_mask_has_as_many_tiles_as_the_pixels_also_for_a_call() -> None:
    # MLLAMA-PROC-024
    made = small_processor()(images=WIDE, text=f"{IMAGE}a", images_kwargs={"max_image_tiles": 2}, return_tensors="np")
    assert made.pixel_values.shape[2] == made.cross_attention_mask.shape[3] == made.aspect_ratio_mask.shape[2] == 2
    assert made.cross_attention_mask[0, :, 0].tolist() == [[1, 1]] * made.input_ids.shape[1]


def test_text_alone_and_images_alone_are_accepted() -> None:
    # MLLAMA-PROC-014, MLLAMA-PROC-016
    processor = small_processor()
    made = processor(text="hello")
    assert set(made) == {"input_ids", "attention_mask"}
    assert processor.tokenizer.decode(made["input_ids"][0]) == f"{BOS}hello"
    assert isinstance(made["input_ids"][0], list)
    lengths = [len(row) for row in processor(text=["a", "bcd"])["input_ids"]]
    assert lengths[0] < lengths[1], "nothing is padded unasked"
    assert set(processor(images=SMALL)) == {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"}


def test_what_else_the_tokenizer_can_tell_becomes_tensors_too() -> None:
    made = small_processor()(text=["a", "a"], return_length=True, return_special_tokens_mask=True, return_tensors="np")
    assert made.length.tolist() == [2, 2]
    assert made.special_tokens_mask.shape == (2, 2)


def test_images_may_be_files(tmp_path: Any) -> None:
    WIDE.save(tmp_path / "a.png")
    made = small_processor()(images=[[str(tmp_path / "a.png")]], text=IMAGE, return_tensors="np")
    assert_same(made, small_processor()(images=WIDE, text=IMAGE, return_tensors="np"), "file")


class _Served(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        WIDE.save(self.wfile, "PNG")

    def log_message(self, *args: Any) -> None:
        pass


def test_images_may_be_addresses_for_those_who_ask() -> None:
    processor = small_processor()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        made = processor(images=url, text=IMAGE, fetch={"private": True}, return_tensors="np")
        server.shutdown()
    assert_same(made, processor(images=WIDE, text=IMAGE, return_tensors="np"), "address")


def test_golden_prompts_give_the_golden_tensors() -> None:
    root = fixtures.root()
    entries = json.loads((root / "goldens" / "mllama" / "prompts.json").read_text("utf-8"))["entries"]
    seen = 0
    for name, entry in entries.items():
        if not name.startswith("tokens|"):
            continue
        processor = MllamaProcessor.from_pretrained(root / "checkpoints" / entry["checkpoint"])
        samples = [[root / "images" / image for image in row["images"]] for row in entry["rows"]]
        made = processor(
            images=samples if any(samples) else None,
            text=[row["text"] for row in entry["rows"]],
            padding=True,
            return_tensors="np",
        )
        for tensor in ("input_ids", "attention_mask", "cross_attention_mask"):
            assert (tensor in made) == (tensor in entry), f"{name}: {tensor}"
            if tensor in entry:
                assert made[tensor].tolist() == entry[tensor], f"{tensor} of {name} differs from {entry['made_by']}"
        seen += 1
    assert seen >= 10, f"only {seen} goldens were found"


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "neither text nor images"),
        ({"text": IMAGE}, r"\[1\] <\|image\|> markers and the samples have \[0\] images"),
        ({"text": "a", "images": SMALL}, r"\[0\] <\|image\|> markers and the samples have \[1\] images"),
        ({"text": IMAGE * 2, "images": SMALL}, r"\[2\] .* \[1\] images"),
        ({"text": [IMAGE, IMAGE], "images": [SMALL] * 2}, r"\[1, 1\] .* samples have \[2\] images"),
        ({"text": [IMAGE * 2, "b"], "images": [[SMALL]] * 2}, r"\[2, 0\] .* \[1, 1\]"),
        ({"text": [["a", "b"]], "is_split_into_words": True}, "is_split_into_words"),
        ({"text": [["a", "b"]]}, "a string or a list of strings"),
        ({"text": []}, "a string or a list of strings"),
        ({"text": 3}, "a string or a list of strings"),
        ({"text": "a", "images": []}, "images must be"),
        ({"text": "a", "images": [[]]}, "pass images=None for text alone"),
        ({"text": "a", "return_tensors": "tf"}, "return_tensors 'tf' is not available; valid are pt, np and None"),
        ({"text": "a", "text_kwargs": {"padding": "right"}}, "right is not a valid PaddingStrategy"),
        ({"text": ["a", "bcdefg"], "return_tensors": "np"}, r"rows are \[2, \d\] tokens long; use padding=True"),
        ({"text": f"ab{IMAGE}", "images": SMALL, "truncation": True, "max_length": 2}, "neither truncated nor"),
        (
            {
                "text": f"{IMAGE}ab",
                "images": SMALL,
                "truncation": True,
                "max_length": 2,
                "return_overflowing_tokens": True,
            },
            r"\[1, 0\] image tokens",
        ),
        ({"text": IMAGE, "images": "none.png"}, "image file none.png does not exist"),
        ({"text": IMAGE, "images": "https://example.org/a.png"}, "only with fetch=True"),
        ({"text": IMAGE, "images": "http://127.0.0.1/a.png", "fetch": True}, "not a public address"),
        ({"text": IMAGE, "images": SMALL, "do_pad": False}, "do_pad is False"),
    ],
)
def test_wrong_calls_are_named(call: dict[str, Any], message: str) -> None:
    # MLLAMA-PROC-003, MLLAMA-PROC-011, MLLAMA-PROC-015
    with pytest.raises(ValueError, match=message) as caught:
        small_processor()(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "a", "colour": 1}, "MllamaProcessor does not know 'colour'; it knows do_convert_rgb"),
        ({"text": "a", "text_kwargs": {"colour": 1}}, "does not know 'colour' in text_kwargs; it knows add_special"),
        ({"text": "a", "images_kwargs": {"colour": 1}}, "does not know 'colour' in images_kwargs"),
        ({"text": "a", "common_kwargs": {"colour": 1}}, "does not know 'colour'"),
        ({"text": IMAGE, "images": [None]}, "NoneType is no image"),
    ],
)
def test_unknown_keywords_and_other_things_are_type_errors(call: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        small_processor()(**call)


def test_both_parts_of_a_processor_are_required() -> None:
    # MLLAMA-PROC-001, MLLAMA-PROC-002
    none: Any = None
    with pytest.raises(ValueError, match="image_processor is None"):
        MllamaProcessor(none, tokenizer())
    with pytest.raises(ValueError, match="tokenizer is None"):
        MllamaProcessor(MllamaImageProcessor(), none)


def test_a_tokenizer_without_the_needed_tokens_is_named() -> None:
    core = Tokenizer(models.BPE({sign: index for index, sign in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    with pytest.raises(ValueError, match="the tokenizer has no bos_token"):
        MllamaProcessor(MllamaImageProcessor(**TINY), bare)(text="a")
    bare.add_special_tokens({"bos_token": BOS})
    with pytest.raises(ValueError, match=r"\[0\] image tokens \(id None\) and the samples have \[1\] images"):
        MllamaProcessor(MllamaImageProcessor(**TINY), bare)(text=IMAGE, images=SMALL)
