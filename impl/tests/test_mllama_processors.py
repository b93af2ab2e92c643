"""Prompts and masks of Mllama, against an independent reading of the rules; attributes and texts of its processor."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mllama_processor_objects import (
    BOS,
    CHECKPOINT,
    IMAGE,
    small_processor,
    tokenizer,
)
from PIL import Image
from processor_objects import noise_image

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
