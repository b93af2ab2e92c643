"""Idefics' prompts: the text that they become, where their images are packed, which tokens see which image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_objects import (
    ALLOWED,
    BLOCK,
    END,
    FAKE,
    MARKER,
    NEXT,
    SIDE,
    IdeficsObjects,
    idefics_objects,
    same,
    squared,
)
from vlmqual_conformance.suite.image_server import served
from vlmqual_conformance.suite.library_objects import array, image, picture
from vlmqual_contract.subject import Handle, Image, RemoteLibrary
from vlmqual_contract.target import Array

PIXELS = tuple(picture(height, width, seed) for seed, (height, width) in enumerate([(20, 30), (40, 10), (25, 25)]))
ONE, TWO, THREE = map(Image, PIXELS)


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsObjects:
    """Objects of the library under test."""
    return idefics_objects(library)


def ids(made: Handle) -> list[list[int]]:
    """Token ids."""
    rows: list[list[int]] = array(made, "input_ids").tolist()
    return rows


def text_of(idefics: IdeficsObjects, prompt: list[Any], text: str, **options: Any) -> None:
    """Check what a prompt becomes, by the ids that the tokenizer has for the wanted text."""
    found = ids(idefics.made(idefics.released, prompt, **options))
    assert found == [idefics.tokenize(text, idefics.released_tokenizer)], f"{prompt} did not become {text!r}"


# text -------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-PROC-008")
def test_an_image_becomes_its_token_between_two_fake_tokens(idefics: IdeficsObjects) -> None:
    text_of(idefics, ["User:", ONE, "Describe"], f"<s>User:{BLOCK}Describe")
    (row,) = ids(idefics.made(idefics.released, ["User:", ONE, "Describe"]))
    place = row.index(idefics.id_of(MARKER))
    assert row[place - 1] == row[place + 1] == idefics.id_of(FAKE)
    assert row.count(idefics.id_of(MARKER)) == 1
    assert row[0] == idefics.id_of("<s>")


@requirement("IDEFICS-PROC-008")
@pytest.mark.parametrize(
    ("given", "kept"),
    [("  a b  ", "a b"), (" a\n ", "a\n"), ("\n a", "\n a"), ("\ta\t", "\ta\t"), ("a", "a")],
    ids=["blanks", "a line end within blanks", "a blank within a line start", "tabs", "nothing"],
)
def test_blanks_around_a_text_are_dropped_and_no_other_white_space(
    idefics: IdeficsObjects, given: str, kept: str
) -> None:
    text_of(idefics, [given, ONE, given], f"<s>{kept}{BLOCK}{kept}")


@requirement("IDEFICS-PROC-009")
def test_the_documented_prompt_becomes_the_documented_text(idefics: IdeficsObjects) -> None:
    processor = idefics.new_processor(idefics.released_tokenizer, **ALLOWED)
    with served(idefics.library, PIXELS[1]) as address:
        made = idefics.made(
            processor,
            [
                "User:",
                ONE,
                "Describe this image.\nAssistant: An image of two kittens in grass.\n",
                "User:",
                address,
                "Describe this image.\nAssistant:",
            ],
        )
    wanted = (
        f"<s>User:{BLOCK}Describe this image.\nAssistant: An image of two kittens in grass.\n"
        f"User:{BLOCK}Describe this image.\nAssistant:"
    )
    assert ids(made) == [idefics.tokenize(wanted, idefics.released_tokenizer)]
    same(array(made, "pixel_values"), np.stack([squared(PIXELS[0]), squared(PIXELS[1])])[None])


@requirement("IDEFICS-PROC-027")
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([ONE, TWO], BLOCK + NEXT),
        ([ONE], BLOCK),
        ([ONE, "a"], f"{BLOCK}a"),
        ([ONE, TWO, THREE, "a"], f"{BLOCK}{NEXT}{NEXT}a"),
    ],
    ids=["two images", "one image", "an image first", "three images first"],
)
def test_a_prompt_may_begin_with_images_and_have_nothing_else(
    idefics: IdeficsObjects, prompt: list[Any], text: str
) -> None:
    text_of(idefics, prompt, f"<s>{text}")


@requirement("IDEFICS-PROC-027")
@pytest.mark.parametrize(
    ("prompt", "text"),
    [(["a", ONE, TWO], f"a{BLOCK}{NEXT}"), (["a", ONE, TWO, "b", THREE], f"a{BLOCK}{NEXT}b{BLOCK}")],
    ids=["last", "between"],
)
def test_an_image_behind_an_image_shares_the_fake_token(idefics: IdeficsObjects, prompt: list[Any], text: str) -> None:
    text_of(idefics, prompt, f"<s>{text}")


@requirement("IDEFICS-PROC-024")
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (["a", "b"], f"a{END}b"),
        (["a", "b", "c"], f"a{END}b{END}c"),
        (["a", ONE, "b", "c", TWO], f"a{BLOCK}b{END}c{BLOCK}"),
        (["a"], "a"),
    ],
    ids=["two", "three", "beside images", "one"],
)
def test_the_end_of_an_utterance_stands_between_texts(idefics: IdeficsObjects, prompt: list[Any], text: str) -> None:
    wanted = {True: text, False: text.replace(END, "")}
    for switch, each in wanted.items():
        made = idefics.made(idefics.processor, prompt, add_end_of_utterance_token=switch)
        assert ids(made) == [idefics.tokenize(f"<s>{each}")], f"add_end_of_utterance_token={switch}"


@requirement("IDEFICS-PROC-024")
def test_the_end_of_the_sequence_is_put_when_asked_for(idefics: IdeficsObjects) -> None:
    text_of(idefics, ["a", ONE, "b"], f"<s>a{BLOCK}b</s>", add_eos_token=True)
    text_of(idefics, ["a", ONE], f"<s>a{BLOCK}</s>", add_eos_token=True)
    text_of(idefics, ["a", ONE], f"<s>a{BLOCK}", add_eos_token=False)


@requirement("IDEFICS-PROC-025")
@pytest.mark.parametrize("given", [{}, {"add_end_of_utterance_token": None}], ids=["not given", "None"])
def test_the_end_of_an_utterance_is_put_where_the_tokenizer_lists_it(
    idefics: IdeficsObjects, given: dict[str, Any]
) -> None:
    made = idefics.made(idefics.processor, ["a", "b"], **given)
    assert ids(made) == [idefics.tokenize(f"<s>a{END}b")]


@requirement("IDEFICS-PROC-025")
@pytest.mark.parametrize("given", [{}, {"add_end_of_utterance_token": None}], ids=["not given", "None"])
def test_the_end_of_an_utterance_is_not_put_where_the_tokenizer_does_not_list_it(
    idefics: IdeficsObjects, given: dict[str, Any]
) -> None:
    text_of(idefics, ["a", "b"], "<s>ab", **given)


# padding and packing ------------------------------------------------------------------------------------------------


@requirement("IDEFICS-PROC-023")
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_padded_to_the_longest_on_the_tokenizers_side(idefics: IdeficsObjects, side: str) -> None:
    tokenizer = idefics.new_tokenizer("idefics-9b-processor")
    assert tokenizer.get("padding_side") == "left", "the checkpoint's tokenizer pads on the left"
    tokenizer.set("padding_side", side)
    made = idefics.made(idefics.new_processor(tokenizer), [["a", ONE, "many more tokens than that"], ["b", TWO]])
    texts = [f"<s>a{BLOCK}many more tokens than that", f"<s>b{BLOCK}"]
    real = [idefics.tokenize(text, idefics.released_tokenizer) for text in texts]
    missing = len(real[0]) - len(real[1])
    assert missing > 0
    padding = [idefics.id_of("<unk>")] * missing
    short = padding + real[1] if side == "left" else real[1] + padding
    seen = [0] * missing + [1] * len(real[1])
    assert ids(made) == [real[0], short]
    assert array(made, "attention_mask").tolist() == [[1] * len(real[0]), seen if side == "left" else seen[::-1]]


@requirement("IDEFICS-PROC-010")
def test_pixels_have_a_place_for_every_image_and_zeros_behind_the_last(idefics: IdeficsObjects) -> None:
    made = array(idefics.made(idefics.processor, [["a", ONE], ["b", TWO, "c", THREE]]), "pixel_values")
    assert made.shape == (2, 2, 3, SIDE, SIDE)
    assert made.dtype == np.float32
    same(made[0, 0], squared(PIXELS[0]))
    assert not made[0, 1].any(), "a place without an image is not 0"
    same(made[1], np.stack([squared(PIXELS[1]), squared(PIXELS[2])]))


@requirement("IDEFICS-PROC-026")
def test_the_image_processors_size_decides(idefics: IdeficsObjects) -> None:
    processor = idefics.call("IdeficsProcessor", idefics.new_image_processor(42), idefics.tokenizer, image_size=14)
    for prompt in (["a", ONE], ["a"]):
        made = array(idefics.made(processor, prompt), "pixel_values")
        assert made.shape == (1, 1, 3, 42, 42), f"pixel_values of {len(prompt) - 1} images"


# which tokens see which image -----------------------------------------------------------------------------------------


def seen(row: list[int], marker: int, end: int, slots: int) -> Array:
    """The mask of a row of token ids, (S, slots), by the statement of the rule."""
    wanted = np.zeros((len(row), slots), np.int64)
    starts = [place for place, token in enumerate(row) if token == marker]
    for image_number, start in enumerate(starts):
        stops = [place for place in range(start + 1, len(row)) if row[place] == marker]
        stops += [place + 1 for place in range(start, len(row)) if row[place] == end]
        wanted[start : min(stops, default=len(row)), image_number] = 1
    return wanted


@requirement("IDEFICS-PROC-021")
def test_a_token_sees_the_last_image_before_it(idefics: IdeficsObjects) -> None:
    made = idefics.made(idefics.released, ["a", ONE, "b", TWO, "c"])
    (row,), mask = ids(made), array(made, "image_attention_mask")
    assert mask.shape == (1, len(row), 2)
    assert mask.dtype == np.int64
    first, second = (place for place, token in enumerate(row) if token == idefics.id_of(MARKER))
    wanted = [[0, 0]] * first + [[1, 0]] * (second - first) + [[0, 1]] * (len(row) - second)
    assert mask[0].tolist() == wanted


@requirement("IDEFICS-PROC-021")
@pytest.mark.parametrize(
    "prompts",
    [
        [["a", ONE, TWO, "b"]],
        [["a", ONE, "b</s>c", TWO, "d</s>"]],
        [["</s>a", ONE, "b"]],
        [["a", ONE, "b</s>c</s>d", TWO, THREE, "e"]],
        [["a", ONE, "long enough for padding of the other"], ["b", TWO, THREE]],
        [["a long text that has no image"], ["b", TWO, "c"]],
    ],
    ids=["neighbours", "ended twice", "ended before", "ended twice in a text", "two rows", "a row without"],
)
def test_no_token_sees_an_image_beyond_the_next_one_or_the_end(idefics: IdeficsObjects, prompts: list[Any]) -> None:
    made = idefics.made(idefics.released, prompts)
    rows, mask = ids(made), array(made, "image_attention_mask")
    slots = max(sum(isinstance(item, Image) for item in prompt) for prompt in prompts)
    marker, end = idefics.id_of(MARKER), idefics.id_of("</s>")
    np.testing.assert_array_equal(mask, np.stack([seen(row, marker, end, slots) for row in rows]))
    assert (mask.sum(-1) <= 1).all()


@requirement("IDEFICS-PROC-021")
def test_the_end_that_is_put_sees_the_last_image(idefics: IdeficsObjects) -> None:
    made = idefics.made(idefics.released, ["a", ONE, "b"], add_eos_token=True)
    assert ids(made)[0][-1] == idefics.id_of("</s>")
    assert array(made, "image_attention_mask")[0, -1].tolist() == [1]


@requirement("IDEFICS-PROC-022")
@pytest.mark.parametrize("prompts", [["hello"], [["hello"], ["another one"]]], ids=["one", "a batch"])
def test_text_alone_has_zeros_for_pixels_and_mask(idefics: IdeficsObjects, prompts: list[Any]) -> None:
    made = idefics.made(idefics.processor, prompts)
    rows, pixels, mask = ids(made), array(made, "pixel_values"), array(made, "image_attention_mask")
    assert pixels.shape == (len(prompts), 1, 3, SIDE, SIDE)
    assert mask.shape == (len(prompts), len(rows[0]), 1)
    assert not pixels.any()
    assert not mask.any()
    assert rows[0][-1] == idefics.tokenize("<s>hello")[-1]


@requirement("IDEFICS-PROC-022", "IDEFICS-PROC-010")
def test_a_prompt_without_images_stands_beside_prompts_with_images(idefics: IdeficsObjects) -> None:
    made = idefics.made(idefics.processor, [["hello"], ["a", image(20, 30), "b", TWO]])
    assert array(made, "pixel_values").shape == (2, 2, 3, SIDE, SIDE)
    assert not array(made, "pixel_values")[0].any()
    assert not array(made, "image_attention_mask")[0].any()
    same(array(made, "pixel_values")[1, 1], squared(PIXELS[1]))
