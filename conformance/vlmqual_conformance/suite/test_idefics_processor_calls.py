"""Calls of Idefics' processor: its parts, forms of its arguments, what it returns, decoding, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_objects import (
    ALLOWED,
    BLOCK,
    MARKER,
    SIDE,
    IdeficsObjects,
    idefics_objects,
    same,
    squared,
)
from vlmqual_conformance.suite.image_server import served
from vlmqual_conformance.suite.library_objects import array, error_of, image, keys, picture
from vlmqual_contract.subject import Handle, Image, RemoteLibrary

NAMES = {"input_ids", "attention_mask", "pixel_values", "image_attention_mask"}
PIXELS = (picture(20, 30, 1), picture(40, 10, 2))
ONE, TWO = map(Image, PIXELS)


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsObjects:
    """Objects of the library under test."""
    return idefics_objects(library)


def pictured(processor: Handle, images: Any, text: Any) -> Handle:
    """What a processor makes of images beside texts."""
    found = processor.call("", images=images, text=text)
    assert isinstance(found, Handle), f"the processor gave {found!r}, not an object"
    return found


# parts ------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-PROC-001")
def test_parameters_of_the_processor(idefics: IdeficsObjects) -> None:
    first, *named, last = idefics.library.signature("IdeficsProcessor")
    assert (first.name, first.required) == ("image_processor", True)
    assert [(item.name, item.default) for item in named] == [
        ("tokenizer", None),
        ("image_size", 224),
        ("add_end_of_utterance_token", None),
    ]
    assert last.kind == "VAR_KEYWORD", "further keywords are not taken"


@requirement("IDEFICS-PROC-002")
def test_an_image_processor_is_required(idefics: IdeficsObjects) -> None:
    error = error_of(lambda: idefics.library.call("IdeficsProcessor", None, idefics.tokenizer))
    assert error, "a processor without image processor was made"
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS-PROC-003")
@pytest.mark.parametrize("given", [(), (None,)], ids=["not given", "None"])
def test_a_tokenizer_is_required(idefics: IdeficsObjects, given: tuple[None, ...]) -> None:
    error = error_of(lambda: idefics.library.call("IdeficsProcessor", idefics.images, *given))
    assert error, "a processor without tokenizer was made"
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS-PROC-004")
def test_the_tokenizer_is_one_of_llama(idefics: IdeficsObjects) -> None:
    file = str(idefics.checkpoint / "tokenizer.json")
    other = idefics.call("transformers:PreTrainedTokenizerFast", tokenizer_file=file, bos_token="<s>", eos_token="</s>")
    error = error_of(lambda: idefics.library.call("IdeficsProcessor", idefics.images, other))
    assert error, "a tokenizer of another class was taken"
    assert {"ValueError", "TypeError"} & set(error.bases), f"refused with {error}"


@requirement("IDEFICS-PROC-005")
def test_parameters_of_a_call(idefics: IdeficsObjects) -> None:
    *named, last = idefics.library.signature("IdeficsProcessor.__call__")
    assert [(item.name, item.default) for item in named] == [
        ("images", None),
        ("text", None),
        ("audio", None),
        ("videos", None),
    ]
    assert last.kind == "VAR_KEYWORD", "further keywords are not taken"


# what is returned -------------------------------------------------------------------------------------------------


@requirement("IDEFICS-PROC-006")
@pytest.mark.parametrize("prompt", [["a", ONE, "b"], ["hello"]], ids=["with an image", "text alone"])
def test_a_call_returns_four_entries(idefics: IdeficsObjects, prompt: list[Any]) -> None:
    assert keys(idefics.made(idefics.processor, prompt)) == NAMES


@requirement("IDEFICS-PROC-007")
@pytest.mark.parametrize("prompt", [["a", ONE, "b"], ["hello"]], ids=["with an image", "text alone"])
def test_all_entries_are_tensors_of_pytorch(idefics: IdeficsObjects, prompt: list[Any]) -> None:
    made = idefics.made(idefics.processor, prompt)
    assert {name: made.type_of(name)[0] for name in NAMES} == dict.fromkeys(NAMES, "Tensor")


# forms of arguments -----------------------------------------------------------------------------------------------


@requirement("IDEFICS-PROC-011")
def test_a_flat_list_is_one_prompt_and_a_list_of_lists_a_batch(idefics: IdeficsObjects) -> None:
    flat = idefics.made(idefics.released, ["a", ONE, "b"])
    nested = idefics.made(idefics.released, [["a", ONE, "b"], ["c", TWO, "d"]])
    wanted = [idefics.tokenize(f"<s>{text}", idefics.released_tokenizer) for text in (f"a{BLOCK}b", f"c{BLOCK}d")]
    assert array(flat, "input_ids").tolist() == wanted[:1]
    assert array(nested, "input_ids").tolist() == wanted
    assert [array(made, "pixel_values").shape[:2] for made in (flat, nested)] == [(1, 1), (2, 1)]


@requirement("IDEFICS-PROC-012")
def test_images_stand_before_their_texts(idefics: IdeficsObjects) -> None:
    made = pictured(idefics.processor, [ONE, TWO], ["x", "y"])
    assert array(made, "input_ids").tolist() == [idefics.tokenize(f"<s>{BLOCK}{text}") for text in "xy"]
    same(array(made, "pixel_values"), np.stack([squared(pixels) for pixels in PIXELS])[:, None])


@requirement("IDEFICS-PROC-013")
def test_one_image_goes_with_one_text(idefics: IdeficsObjects) -> None:
    made = pictured(idefics.processor, ONE, "x")
    assert array(made, "input_ids").tolist() == [idefics.tokenize(f"<s>{BLOCK}x")]
    same(array(made, "pixel_values"), squared(PIXELS[0])[None, None])


@requirement("IDEFICS-PROC-015")
@pytest.mark.parametrize("listed", [True, False], ids=["list", "single"])
def test_addresses_are_taken_as_images(idefics: IdeficsObjects, listed: bool) -> None:
    processor = idefics.new_processor(**ALLOWED)
    with served(idefics.library, PIXELS[0]) as address:
        made = pictured(processor, *(([address], ["x"]) if listed else (address, "x")))
    assert array(made, "input_ids").tolist() == [idefics.tokenize(f"<s>{BLOCK}x")]
    same(array(made, "pixel_values"), squared(PIXELS[0])[None, None])


@requirement("IDEFICS-PROC-016")
def test_neither_text_nor_images_is_an_error(idefics: IdeficsObjects) -> None:
    error = error_of(lambda: idefics.processor.call(""))
    assert error, "a call without arguments was answered"
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS-PROC-017")
def test_a_transform_replaces_the_rules_for_images(idefics: IdeficsObjects) -> None:
    results = np.arange(2 * 3 * SIDE * SIDE, dtype=np.float32).reshape(2, 3, SIDE, SIDE)
    transform = idefics.transform(*results)
    made = idefics.made(idefics.processor, ["a", ONE, "b", image(40, 10)], transform=transform)
    np.testing.assert_array_equal(array(made, "pixel_values"), results[None])
    assert transform.get("call_count") == 2
    assert transform.get("call_args_list.1.args.0.size") == (10, 40), "it is not called with the images as they are"


@requirement("IDEFICS-PROC-018")
def test_debugging_prints_what_becomes_of_the_prompts(idefics: IdeficsObjects) -> None:
    printed = []
    for options in ({}, {"debug": True}):
        output = idefics.call("io:StringIO")
        capture = idefics.call("contextlib:redirect_stdout", output)
        capture.call("__enter__")
        try:
            made = idefics.made(idefics.released, ["User:", ONE, "Describe"], **options)
        finally:
            capture.call("__exit__", None, None, None)
        assert keys(made) == NAMES
        printed.append(output.call("getvalue"))
    assert printed[0] == "", "a call prints although it is not asked to"
    assert MARKER in printed[1], f"the prompt is not in {printed[1]!r}"


# decoding and files -----------------------------------------------------------------------------------------------


@requirement("IDEFICS-PROC-019")
@pytest.mark.parametrize("skip", [False, True])
def test_decoding_is_the_tokenizers(idefics: IdeficsObjects, skip: bool) -> None:
    rows = [idefics.tokenize(f"<s>what is it?{BLOCK}"), idefics.tokenize("<s>nothing")]
    options = {"skip_special_tokens": skip}
    wanted = [idefics.tokenizer.call("decode", row, **options) for row in rows]
    assert [idefics.processor.call("decode", row, **options) for row in rows] == wanted
    assert idefics.processor.call("batch_decode", rows, **options) == wanted
    assert all(("<s>" in text) != skip for text in wanted)


@requirement("IDEFICS-PROC-020")
def test_a_processor_can_be_saved_and_loaded(idefics: IdeficsObjects, tmp_path: Path) -> None:
    idefics.processor.call("save_pretrained", str(tmp_path))
    loaded = idefics.call("IdeficsProcessor.from_pretrained", str(tmp_path))
    prompts = [["a", ONE, "b", "c", TWO], ["hello"]]
    made, wanted = idefics.made(loaded, prompts), idefics.made(idefics.processor, prompts)
    for name in NAMES:
        np.testing.assert_array_equal(array(made, name), array(wanted, name), err_msg=name)
    same(array(made, "pixel_values")[0], np.stack([squared(pixels) for pixels in PIXELS]))
