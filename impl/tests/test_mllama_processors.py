"""Prompts and calls of Mllama's processor, against an independent reading of the rules, goldens and transformers."""

from __future__ import annotations

import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mllama_processor_objects import (
    BOS,
    CHECKPOINT,
    IMAGE,
    NEW,
    PAD,
    TINY,
    reference_processor,
    small_processor,
    tokenizer,
)
from PIL import Image
from processor_objects import assert_same, noise_image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmqual_contract import fixtures
from vlmqual_impl.api.mllama_processing import MllamaImageProcessor, MllamaProcessor
from vlmqual_impl.processors_mllama import begun, check_counts, dense_mask, spans

M = 99  # the image token in ids made by hand
WIDE = noise_image(80, 20)  # three tiles of 28
SMALL = noise_image(9, 9)  # one tile


# begin of text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("hello", "[B]hello"),
        ("", "[B]"),
        ("<|image|>hello", "<|image|>[B]hello"),
        ("<|image|><|image|>a<|image|>b", "<|image|><|image|>[B]a<|image|>b"),
        ("a<|image|>b", "[B]a<|image|>b"),
        ("<|image|>", "<|image|>[B]"),
        (" <|image|>a", "[B] <|image|>a"),
        ("[B]<|image|>a", "[B]<|image|>a"),
        ("<|image|>[B]a", "<|image|>[B]a"),
        ("a[B]b", "a[B]b"),
    ],
)
def test_the_begin_of_text_stands_behind_the_leading_markers(prompt: str, wanted: str) -> None:
    # MLLAMA-PROC-009, MLLAMA-PROC-016, MLLAMA-PROC-023
    assert begun(prompt, "[B]") == wanted


@pytest.mark.parametrize(
    ("texts", "counts"),
    [
        ([IMAGE], [2]),
        ([IMAGE], []),
        (["a"], [1]),
        ([IMAGE, ""], [0, 1]),
        (["a"], [0, 0]),
        ([IMAGE, IMAGE], [2]),
    ],
)
def test_markers_and_images_have_to_match_in_every_sample(texts: list[str], counts: list[int]) -> None:
    # MLLAMA-PROC-003, MLLAMA-PROC-015, MLLAMA-PROC-019
    with pytest.raises(ValueError, match="markers and the samples have"):
        check_counts(texts, counts)


def test_samples_without_images_stand_beside_samples_with_images() -> None:
    # MLLAMA-PROC-020
    check_counts([IMAGE, "b", IMAGE * 2], [1, 0, 2])
    check_counts(["a", "b"], [])


# masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([M, 1, M, 2], [(0, 2), (2, 4)]),
        ([M, M, 1, M, 2, 3], [(0, 3), (1, 3), (3, 6)]),
        ([1, M, M, M], [(1, 4), (2, 4), (3, 4)]),
        ([1, M, 2, 3], [(1, 4)]),
        ([1, 2, M], [(2, 3)]),
        ([0, 0, M, 5, M, M, 6, M], [(2, 4), (4, 7), (5, 7), (7, 8)]),
        ([1, 2], []),
    ],
)
def test_images_are_seen_from_their_marker_to_the_next(ids: list[int], wanted: list[tuple[int, int]]) -> None:
    # MLLAMA-PROC-018
    assert spans(ids, M) == wanted


def _seen(ids: list[int], place: int) -> set[int]:
    """The images that a position sees, read from its own side: those of the last group of markers up to it."""
    number, group, inside = -1, set[int](), False
    for token in ids[: place + 1]:
        if token == M:
            number += 1
            group = group | {number} if inside else {number}
        inside = token == M
    return group


@given(st.lists(st.sampled_from([1, 2, M]), min_size=1, max_size=14), st.integers(1, 4), st.randoms())
def test_every_position_sees_the_tiles_of_the_last_group_of_images(ids: list[int], tiles: int, random: Any) -> None:
    counts = [random.randint(1, tiles) for token in ids if token == M]
    made = dense_mask([ids], [counts], M, tiles)
    assert made.shape == (1, len(ids), len(counts), tiles)
    assert made.dtype == np.int64
    for place in range(len(ids)):
        wanted = np.zeros((len(counts), tiles), np.int64)
        for image in _seen(ids, place):
            wanted[image, : counts[image]] = 1
        assert made[0, place].tolist() == wanted.tolist(), f"position {place} of {ids}"


def test_the_dense_mask_by_hand() -> None:
    # MLLAMA-PROC-017
    rows = [[0, M, 1, M, M, 2], [0, 0, 0, 5, M, 6], [0, 0, 3, 4, 5, 6]]
    made = dense_mask(rows, [[2, 1, 4], [3], []], M, 4)
    wanted: npt.NDArray[np.int64] = np.zeros((3, 6, 3, 4), np.int64)
    wanted[0, 1:3, 0, :2] = 1
    wanted[0, 3:6, 1, :1] = 1
    wanted[0, 4:6, 2, :4] = 1
    wanted[1, 4:6, 0, :3] = 1
    assert made.tolist() == wanted.tolist()


def test_rows_that_are_not_padded_make_a_mask_of_the_longest() -> None:
    made = dense_mask([[M, 1], [M, 1, 2, 3]], [[1], [2]], M, 2)
    assert made.shape == (2, 4, 1, 2)
    assert made[0, :, 0].tolist() == [[1, 0]] * 4, "a single image is seen to the end of the longest row"
    assert dense_mask([[M, 1, M], [1, M, 1, 1]], [[1, 1], [1]], M, 1)[0, :, 1, 0].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "num_tiles", "message"),
    [
        ([[M, 1]], [[1, 1]], r"the token rows have \[1\] image tokens \(id 99\) and the samples have \[2\] images"),
        ([[M, 1], [1, M]], [[1, 1]], r"\[1, 1\] image tokens .* \[2\] images.*neither truncated nor spread"),
    ],
)
def test_rows_that_lost_markers_are_refused(rows: list[list[int]], num_tiles: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_mask(rows, num_tiles, M, 4)


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
        made = processor(images=url, text=IMAGE, allow_urls=True, allow_private_urls=True, return_tensors="np")
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
        ({"text": IMAGE, "images": "https://example.org/a.png"}, "only with allow_urls=True"),
        ({"text": IMAGE, "images": "http://127.0.0.1/a.png", "allow_urls": True}, "not a public address"),
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


# attributes and text -------------------------------------------------------------------------------------------------


def test_special_tokens_and_input_names_are_attributes() -> None:
    processor, config = small_processor(), json.loads((CHECKPOINT / "config.json").read_text("utf-8"))
    assert (processor.image_token, processor.python_token, processor.bos_token) == (IMAGE, "<|python_tag|>", BOS)
    assert processor.image_token_id == config["image_token_index"]
    assert processor.tokenizer.decode([processor.python_token_id]) == "<|python_tag|>"
    assert processor.model_input_names == [
        *("input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
        "cross_attention_mask",
    ]
    assert processor.attributes == ("image_processor", "tokenizer")


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A page."}]},
]


def test_chats_are_rendered_by_the_tokenizer_s_template() -> None:
    # MLLAMA-PROC-006, MLLAMA-PROC-008
    processor = small_processor()
    wanted = (
        f"{BOS}<|start_header_id|>user<|end_header_id|>\n\n{IMAGE}What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA page.<|eot_id|>"
    )
    assert processor.chat_template == processor.tokenizer.chat_template
    assert processor.apply_chat_template(MESSAGES) == wanted
    head = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert processor.apply_chat_template([MESSAGES] * 2, add_generation_prompt=True) == [wanted + head] * 2
    assert processor.apply_chat_template(MESSAGES, chat_template="{{ messages | length }}") == "2"
    assert processor.tokenizer.decode(processor.apply_chat_template(MESSAGES, tokenize=True)) == wanted
    made = processor(text=processor.apply_chat_template([MESSAGES]), images=SMALL, return_tensors="pt")
    assert processor.decode(made.input_ids[0]) == wanted, "the template brings the begin of text itself"


def test_without_a_template_chats_are_refused() -> None:
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="there is no chat template"):
        MllamaProcessor(MllamaImageProcessor(), bare).apply_chat_template(MESSAGES)


def test_decoding_forwards_to_the_tokenizer() -> None:
    # MLLAMA-PROC-012
    processor = small_processor()
    ids = processor(images=SMALL, text=f"a {IMAGE}b")["input_ids"]
    assert processor.decode(ids[0]) == f"{BOS}a {IMAGE}b"
    assert processor.decode(ids[0], skip_special_tokens=True) == "a b"
    assert processor.batch_decode(ids) == [f"{BOS}a {IMAGE}b"]


def test_changing_the_image_processor_afterwards_takes_effect() -> None:
    processor = small_processor()
    processor.image_processor.max_image_tiles = 1
    made = processor(images=Image.new("RGB", (80, 20)), text=IMAGE, return_tensors="np")
    assert made.pixel_values.shape[2] == made.cross_attention_mask.shape[3] == 1
