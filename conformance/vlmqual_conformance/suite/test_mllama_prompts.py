"""Mllama's prompts: markers, begin-of-text, which tokens see which tiles, options, chat template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite import mllama_rules as rules
from vlmqual_conformance.suite.library_objects import array, error_of, image, keys
from vlmqual_conformance.suite.mllama_objects import BOS, IMAGE_ID, PAD, MllamaObjects, mllama_objects
from vlmqual_contract.subject import Handle, Image, RemoteLibrary
from vlmqual_contract.target import Array

I = "<|image|>"  # noqa: E741  # as short as it has to be to keep prompts readable
BEGIN = "<|begin_of_text|>"
ONE, WIDE, FOUR = (28, 28), (28, 56), (56, 56)  # of 1, 2 and 4 tiles of 28 pixels


@pytest.fixture
def mllama(library: RemoteLibrary) -> MllamaObjects:
    """Objects of the library under test."""
    return mllama_objects(library)


@pytest.fixture
def processor(mllama: MllamaObjects) -> Handle:
    """A processor with tiles of 28 pixels."""
    return mllama.new_processor()


def made(processor: Handle, text: Any, images: Any = None, **options: Any) -> Handle:
    """What the processor makes, as arrays."""
    found = processor.call("", images=images, text=text, return_tensors="np", **options)
    assert isinstance(found, Handle)
    return found


def ids(processor: Handle, text: str, images: Any = None) -> list[int]:
    """Token ids of one prompt."""
    row: list[int] = array(made(processor, text, images), "input_ids")[0].tolist()
    return row


def pictures(*sizes: tuple[int, int]) -> list[Image]:
    """Pictures of these sizes."""
    return [image(*size, seed=index) for index, size in enumerate(sizes)]


# markers and begin-of-text ----------------------------------------------------------------------------------------


@requirement("MLLAMA-PROC-009")
@pytest.mark.parametrize("markers", [1, 2])
def test_begin_of_text_comes_behind_leading_markers(mllama: MllamaObjects, processor: Handle, markers: int) -> None:
    found = ids(processor, f"{I * markers}If I had to write a haiku for this one", pictures(*[ONE] * markers))
    assert found == [*[IMAGE_ID] * markers, BOS, *mllama.tokenize("If I had to write a haiku for this one")]


@requirement("MLLAMA-PROC-009", "MLLAMA-PROC-016")
@pytest.mark.parametrize("text", ["hello", "  two  spaces\nand lines"])
def test_text_without_markers_begins_with_begin_of_text(mllama: MllamaObjects, processor: Handle, text: str) -> None:
    assert ids(processor, text) == [BOS, *mllama.tokenize(text)]


@requirement("MLLAMA-PROC-009")
def test_begin_of_text_comes_first_when_the_marker_does_not(mllama: MllamaObjects, processor: Handle) -> None:
    found = ids(processor, f"one {I} two", pictures(ONE))
    assert found == [BOS, *mllama.tokenize("one "), IMAGE_ID, *mllama.tokenize(" two")]


@requirement("MLLAMA-PROC-023")
@pytest.mark.parametrize("text", [f"{BEGIN}{I}a", f"{I}{BEGIN}a", f"{I}one{BEGIN}two"])
def test_a_prompt_with_begin_of_text_is_left_as_it_is(mllama: MllamaObjects, processor: Handle, text: str) -> None:
    assert ids(processor, text, pictures(ONE)) == mllama.tokenize(text)
    assert ids(processor, text, pictures(ONE)).count(BOS) == 1


@requirement("MLLAMA-PROC-003", "MLLAMA-PROC-015")
@pytest.mark.parametrize(
    ("text", "images"),
    [("no marker", 1), (f"{I}{I}two", 1), (f"{I}one", 2), (f"{I}marker, no image", 0)],
)
def test_markers_and_images_have_to_be_equally_many(processor: Handle, text: str, images: int) -> None:
    error = error_of(lambda: made(processor, text, pictures(*[ONE] * images) or None))
    assert error, f"{text!r} with {images} images is accepted"
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("MLLAMA-PROC-019")
def test_a_flat_list_belongs_to_one_prompt(processor: Handle) -> None:
    found = made(processor, f"{I}{I}a", pictures(ONE, WIDE))
    assert array(found, "aspect_ratio_ids").tolist() == [[1, 2]]


# which tokens see which tiles ---------------------------------------------------------------------------------------


@requirement("MLLAMA-PROC-017")
def test_a_token_sees_the_real_tiles_of_the_image_before_it(processor: Handle) -> None:
    found = made(processor, f"{BEGIN}before {I}after it", pictures(WIDE))
    mask, row = array(found, "cross_attention_mask"), array(found, "input_ids")[0].tolist()
    assert mask.shape == (1, len(row), 1, 4)
    assert mask.dtype == np.int64
    start = row.index(IMAGE_ID)
    assert not mask[0, :start].any(), "text before the marker sees nothing"
    assert mask[0, start:, 0].tolist() == [[1, 1, 0, 0]] * (len(row) - start)


@requirement("MLLAMA-PROC-018")
@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (f"{I}a{I}b", (ONE, FOUR)),
        (f"{I}{I}a", (WIDE, ONE)),
        (f"{I}{I}a{I}b", (WIDE, ONE, FOUR)),
        (f"{I}a{I}{I}{I}", (ONE, ONE, WIDE, FOUR)),
        (f"text {I}{I} and {I}{I} more", (ONE, WIDE, FOUR, ONE)),
        (f"what is{I}", (WIDE,)),
    ],
)
def test_interleaved_and_consecutive_images(processor: Handle, text: str, sizes: tuple[tuple[int, int], ...]) -> None:
    found = made(processor, text, [pictures(*sizes)])
    row = array(found, "input_ids")[0].tolist()
    counts = [{ONE: 1, WIDE: 2, FOUR: 4}[size] for size in sizes]
    wanted = rules.dense(row, IMAGE_ID, counts, len(sizes), 4)
    np.testing.assert_array_equal(array(found, "cross_attention_mask")[0], wanted, err_msg=text)


@requirement("MLLAMA-PROC-004", "MLLAMA-PROC-018")
def test_a_batch_with_different_numbers_of_images_is_padded(processor: Handle) -> None:
    images = [pictures(ONE), pictures(WIDE, FOUR)]
    found = made(processor, [f"{I}a longer text than the other one", f"{I}b{I}c"], images, padding=True)
    assert array(found, "pixel_values").shape == (2, 2, 4, 3, 28, 28)
    assert array(found, "aspect_ratio_ids").tolist() == [[1, 0], [2, 6]]
    assert array(found, "aspect_ratio_mask").shape == (2, 2, 4)
    rows = array(found, "input_ids").tolist()
    masks = [rules.dense(row, IMAGE_ID, counts, 2, 4) for row, counts in zip(rows, [[1], [2, 4]], strict=True)]
    np.testing.assert_array_equal(array(found, "cross_attention_mask"), np.stack(masks))
    assert PAD in rows[1], "the shorter row is padded"


@requirement("MLLAMA-PROC-017")
def test_the_mask_of_rows_that_are_not_padded_reaches_to_the_end_of_the_longest(processor: Handle) -> None:
    texts = [f"{I}a longer text than the other one", f"{I}b"]
    found = processor.call("", images=[pictures(WIDE), pictures(WIDE)], text=texts, padding=False)
    assert isinstance(found, Handle)
    lengths = [len(row) for row in found.get("input_ids")]
    assert lengths[0] > lengths[1], "the rows were to differ in length"
    mask = np.asarray(array(found, "cross_attention_mask"))
    assert mask.shape == (2, max(lengths), 1, 4)
    assert mask[0, lengths[0] - 1, 0].tolist() == [1, 1, 0, 0]


@requirement("MLLAMA-PROC-020")
def test_samples_without_images_stand_beside_samples_with_images(processor: Handle) -> None:
    found = made(processor, [f"{I}a", "no image at all"], [pictures(WIDE), []], padding=True)
    assert array(found, "aspect_ratio_ids").tolist() == [[2], [0]]
    assert array(found, "aspect_ratio_mask").tolist() == [[[1, 1, 0, 0]], [[1, 0, 0, 0]]]
    assert not array(found, "cross_attention_mask")[1].any()
    assert not array(found, "pixel_values")[1].any()


@requirement("MLLAMA-PROC-024")
def test_the_masks_tile_axis_follows_a_calls_number_of_tiles(processor: Handle) -> None:
    found = made(processor, f"{I}a", pictures(FOUR), images_kwargs={"max_image_tiles": 2})
    assert array(found, "pixel_values").shape[2] == 2
    assert array(found, "cross_attention_mask").shape[3] == 2


# results and options ------------------------------------------------------------------------------------------------


@requirement("MLLAMA-PROC-013")
def test_text_and_images_give_six_tensors(processor: Handle) -> None:
    assert keys(made(processor, f"{I}a", pictures(ONE))) == {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "cross_attention_mask",
    }


@requirement("MLLAMA-PROC-014")
def test_images_alone_give_the_vision_models_inputs(processor: Handle) -> None:
    found = processor.call("", images=image(*ONE), return_tensors="np")
    assert keys(found) == {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"}


@requirement("MLLAMA-PROC-016")
def test_text_alone_gives_ids_and_their_mask(processor: Handle) -> None:
    assert keys(made(processor, "hello")) == {"input_ids", "attention_mask"}


@requirement("MLLAMA-PROC-010")
def test_options_may_come_in_mappings_for_each_modality(mllama: MllamaObjects) -> None:
    found = mllama.processor.call(
        "",
        images=image(60, 60),
        text=[f"{I}If I had to write a haiku for this one"],
        images_kwargs={"size": {"height": 112, "width": 112}},
        text_kwargs={"padding": "max_length", "max_length": 40},
        common_kwargs={"return_tensors": "np"},
    )
    assert array(found, "pixel_values").shape == (1, 1, 4, 3, 112, 112)
    assert array(found, "input_ids").shape == (1, 40)


@requirement("MLLAMA-PROC-011")
def test_a_side_is_no_padding_strategy(processor: Handle) -> None:
    error = error_of(lambda: made(processor, [f"{I}a"], pictures(ONE), text_kwargs={"padding": "right"}))
    assert error, "padding='right' is accepted"
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("MLLAMA-PROC-012")
def test_decoding_is_the_tokenizers(mllama: MllamaObjects, processor: Handle) -> None:
    rows = [[IMAGE_ID, BOS, *mllama.tokenize("what is it?")], mllama.tokenize("nothing")]
    for skip in (False, True):
        wanted = [mllama.tokenizer.call("decode", row, skip_special_tokens=skip) for row in rows]
        assert [processor.call("decode", row, skip_special_tokens=skip) for row in rows] == wanted
        assert processor.call("batch_decode", rows, skip_special_tokens=skip) == wanted
    assert wanted[0] == "what is it?"


# chat template ------------------------------------------------------------------------------------------------------

TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does the image show?"}]}]
RENDERED = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>What does the image show?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@requirement("MLLAMA-PROC-006")
def test_messages_become_a_prompt(mllama: MllamaObjects) -> None:
    assert mllama.processor.call("apply_chat_template", TURN, add_generation_prompt=True) == RENDERED


@requirement("MLLAMA-PROC-008")
def test_conversations_become_prompts_that_the_processor_takes_with_one_image(mllama: MllamaObjects) -> None:
    texts = mllama.processor.call("apply_chat_template", [TURN], add_generation_prompt=True)
    assert texts == [RENDERED]
    found: Array = array(made(mllama.processor, texts, image(60, 60)), "input_ids")
    assert found[0].tolist() == mllama.tokenize(RENDERED)
