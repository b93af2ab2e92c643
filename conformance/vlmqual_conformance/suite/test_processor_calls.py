"""Calls of Idefics3's processor: what it takes, what it returns, what it refuses, chats and decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite import idefics3_rules as rules
from vlmqual_conformance.suite.image_server import served
from vlmqual_conformance.suite.library_objects import (
    Idefics3Objects,
    array,
    error_of,
    idefics3_objects,
    image,
    keys,
    picture,
    plain,
)
from vlmqual_contract import fixtures
from vlmqual_contract.errors import TargetRaised
from vlmqual_contract.subject import Handle, Image, RemoteLibrary, Tensor

MARK = rules.MARK
ADDED = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
DOCUMENTED_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do we see in this image?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "In this image, we can see the city of New York."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And how about this image?"}]},
]


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


@pytest.fixture
def processor(idefics3: Idefics3Objects) -> Handle:
    """A processor with tiles of 28 pixels and two tokens a frame."""
    return idefics3.new_processor()


def chats() -> dict[str, Any]:
    """Chat goldens."""
    entries = json.loads(fixtures.file("goldens/idefics3/prompts.json").read_text("utf-8"))["entries"]
    return {key.partition("|")[2]: entry for key, entry in entries.items() if key.startswith("chat|")}


# what is returned -------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-PROC-012")
def test_a_call_returns_the_four_documented_tensors(processor: Handle) -> None:
    made = processor.call("", images=image(60, 80), text=f"{MARK}a", return_tensors="np")
    assert keys(made) == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}


@requirement("IDEFICS3-PROC-013", "IDEFICS3-CARD-014")
def test_text_without_images_is_accepted(idefics3: Idefics3Objects, processor: Handle) -> None:
    made = processor.call("", text="hello there")
    assert keys(made) == {"input_ids", "attention_mask"}
    assert np.reshape(plain(made.get("input_ids")), -1).tolist() == idefics3.tokenize("hello there")


@requirement("IDEFICS3-PROC-014")
def test_images_without_text_are_accepted(processor: Handle) -> None:
    made = processor.call("", images=image(60, 80), return_tensors="np")
    assert keys(made) - {"rows", "cols"} == {"pixel_values", "pixel_attention_mask"}
    assert array(made, "pixel_values").shape[:2] == (1, 13)


@requirement("IDEFICS3-PROC-021")
def test_return_tensors_selects_the_framework_and_its_absence_gives_lists(processor: Handle) -> None:
    kinds = {
        name: processor.call("", images=image(30, 40), text=f"{MARK}a", return_tensors=name).type_of("input_ids")[0]
        for name in ("np", "pt", None)
    }
    assert kinds == {"np": "ndarray", "pt": "Tensor", None: "list"}


@requirement("IDEFICS3-PROC-022")
def test_rows_are_not_padded_unless_asked_for(processor: Handle) -> None:
    made = processor.call("", images=[[image(60, 80)], [image(28, 112)]], text=[f"{MARK}a", f"{MARK}a"])
    lengths = [len(row) for row in made.get("input_ids")]
    assert lengths[0] > lengths[1]


@requirement("IDEFICS3-PROC-011")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stands_on_the_side_that_the_tokenizer_names(idefics3: Idefics3Objects, side: str) -> None:
    processor = idefics3.call("Idefics3Processor.from_pretrained", str(idefics3.checkpoint))
    assert processor.get("tokenizer.padding_side") == "left", "the checkpoint's tokenizer pads on the left"
    processor.set("tokenizer.padding_side", side)
    texts = [f"{MARK}In this image, we see", f"bla bla bla{MARK}"]
    made = processor.call(
        "",
        images=[[image(60, 80)], [image(60, 80)]],
        text=texts,
        padding=True,
        return_tensors="np",
        images_kwargs={"do_image_splitting": False},
    )
    ids, mask = array(made, "input_ids"), array(made, "attention_mask")
    pad = processor.get("tokenizer.pad_token_id")
    for row, text in enumerate(texts):
        real = idefics3.tokenize(rules.expanded(text, [(0, 0)], 16))
        padding = [pad] * (ids.shape[1] - len(real))
        seen = [0] * len(padding)
        assert ids[row].tolist() == (padding + real if side == "left" else real + padding)
        assert mask[row].tolist() == (seen + [1] * len(real) if side == "left" else [1] * len(real) + seen)
    assert (ids[:, 0] == pad).any() or side == "right"


@requirement("IDEFICS3-PROC-023")
def test_the_tokenizer_puts_one_bos_token_first(idefics3: Idefics3Objects, processor: Handle) -> None:
    ids = plain(processor.call("", images=image(30, 40), text=f"{MARK}a").get("input_ids"))[0]
    bos = idefics3.processor.get("tokenizer.bos_token_id")
    assert ids[0] == bos
    assert ids.count(bos) == 1
    bare = processor.call("", images=image(30, 40), text=f"{MARK}a", add_special_tokens=False)
    assert plain(bare.get("input_ids"))[0] == ids[1:]


@requirement("IDEFICS3-PROC-010")
def test_the_documented_batch_reads_as_documented_but_for_one_space(idefics3: Idefics3Objects) -> None:
    processor = idefics3.new_processor(image_seq_len=169)
    processor.set("image_processor.do_image_splitting", False)
    text = [f"{MARK}In this image, we see", f"bla bla bla{MARK}"]
    made = processor.call("", images=[[image(60, 80)], [image(80, 60)]], text=text, return_tensors="np", padding=True)
    block = f"<fake_token_around_image><global-img>{'<image>' * 169}<fake_token_around_image>"
    pads = "<|reserved_special_token_0|>"
    rows = [idefics3.decoded(row) for row in array(made, "input_ids")]
    counts = [row.count(pads) for row in rows]
    assert min(counts) == 0
    assert rows[0] == f"{pads * counts[0]}<|begin_of_text|>{block}In this image, we see"
    assert rows[1] == f"{pads * counts[1]}<|begin_of_text|>bla bla bla{block}"


# what is taken ----------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-PROC-017")
def test_a_flat_list_of_images_belongs_to_one_prompt(processor: Handle) -> None:
    made = processor.call("", images=[image(28, 56), image(28, 28)], text=f"{MARK}{MARK}a", return_tensors="np")
    assert array(made, "pixel_values").shape[:2] == (1, 9 + 17)
    assert array(made, "input_ids").shape[0] == 1


@requirement("IDEFICS3-PROC-018")
def test_a_flat_list_of_images_is_not_shared_out_over_prompts(processor: Handle) -> None:
    error = error_of(lambda: processor.call("", images=[image(28, 28), image(28, 28)], text=[f"{MARK}a", f"{MARK}b"]))
    assert error is not None, "a flat list of images was shared out over two prompts"
    assert {"ValueError", "IndexError"} & set(error.bases), f"refused with {error}"


@requirement("IDEFICS3-PROC-019")
def test_pil_images_arrays_and_tensors_give_the_same(processor: Handle) -> None:
    pixels = picture(60, 80)
    made = [
        processor.call("", images=[form], text=f"{MARK}a", return_tensors="np")
        for form in (Image(pixels), pixels, Tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    ]
    for other in made[1:]:
        for name in ("input_ids", "pixel_values"):
            np.testing.assert_array_equal(array(other, name), array(made[0], name), err_msg=name)


@requirement("IDEFICS3-PROC-030")
def test_addresses_are_taken_as_images(idefics3: Idefics3Objects, processor: Handle) -> None:
    pixels = picture(60, 80)
    processor.set("fetch", {"private": True})  # a library may want to be told first
    with served(idefics3.library, pixels) as address:
        made = processor.call("", images=[address], text=f"{MARK}a", return_tensors="np")
    wanted = processor.call("", images=[Image(pixels)], text=f"{MARK}a", return_tensors="np")
    for name in ("input_ids", "pixel_values"):
        np.testing.assert_array_equal(array(made, name), array(wanted, name))


# what is refused --------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-PROC-015")
def test_neither_text_nor_images_is_an_error(processor: Handle) -> None:
    with pytest.raises(TargetRaised) as caught:
        processor.call("")
    assert {"ValueError", "TypeError"} & set(caught.value.bases)


@requirement("IDEFICS3-PROC-016")
def test_more_markers_than_images_are_refused(processor: Handle) -> None:
    error = error_of(lambda: processor.call("", images=[[image(28, 28)]], text=[f"{MARK}a{MARK}"]))
    assert error is not None
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS3-PROC-016")
def test_more_images_than_markers_are_refused(processor: Handle) -> None:
    error = error_of(lambda: processor.call("", images=[[image(28, 28), image(28, 28)]], text=[f"{MARK}a"]))
    assert error is not None
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS3-PROC-016")
def test_markers_in_another_row_than_the_images_are_refused(processor: Handle) -> None:
    images = [[image(28, 28)], [image(28, 28)]]
    error = error_of(lambda: processor.call("", images=images, text=[f"{MARK}{MARK}a", "b"]))
    assert error is not None
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS3-PROC-016")
def test_a_marker_without_any_image_is_refused(processor: Handle) -> None:
    error = error_of(lambda: processor.call("", text=f"{MARK}a"))
    assert error is not None
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS3-PROC-020")
def test_prompts_that_are_split_into_words_are_refused(processor: Handle) -> None:
    error = error_of(
        lambda: processor.call("", images=[[image(28, 28)]], text=[[MARK, "hello"]], is_split_into_words=True)
    )
    assert error is not None, "a prompt that is split into words is taken"


# chats and decoding -----------------------------------------------------------------------------------------------


@requirement("IDEFICS3-PROC-026", "IDEFICS3-CARD-003")
@pytest.mark.parametrize("name", chats())
def test_chats_render_as_the_golden(idefics3: Idefics3Objects, name: str) -> None:
    entry = chats()[name]
    text = idefics3.processor.call(
        "apply_chat_template", entry["messages"], add_generation_prompt=entry["add_generation_prompt"]
    )
    assert text == entry["text"]


@requirement("IDEFICS3-CARD-003")
def test_the_documented_chat_renders_into_one_prompt(idefics3: Idefics3Objects) -> None:
    text = idefics3.processor.call("apply_chat_template", DOCUMENTED_CHAT, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|>User:<image>What do we see in this image?<end_of_utterance>\n"
        "Assistant: In this image, we can see the city of New York.<end_of_utterance>\n"
        "User:<image>And how about this image?<end_of_utterance>\nAssistant:"
    )


@requirement("IDEFICS3-PROC-026")
def test_a_chat_template_given_to_the_constructor_is_used(idefics3: Idefics3Objects) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    processor = idefics3.call(
        "Idefics3Processor",
        idefics3.new_image_processor(),
        idefics3.processor.get("tokenizer"),
        chat_template=template,
    )
    text = processor.call("apply_chat_template", DOCUMENTED_CHAT, add_generation_prompt=True)
    assert text == "[user][assistant][user]?"


@requirement("IDEFICS3-PROC-025")
def test_decoding_gives_the_tokenizers_text(idefics3: Idefics3Objects) -> None:
    ids = idefics3.tokenize("What does the sign say?")
    assert idefics3.processor.call("decode", ids, skip_special_tokens=True) == "What does the sign say?"
    both = idefics3.processor.call("batch_decode", [ids, ids[:3]], skip_special_tokens=True)
    assert isinstance(both, list)
    assert both[0] == "What does the sign say?"
    assert "What does the sign say?".startswith(both[1])
    assert both[1] not in ("", both[0])


@requirement("IDEFICS3-PROC-025")
def test_decoding_turns_expanded_images_back_into_markers(idefics3: Idefics3Objects, processor: Handle) -> None:
    text = f"a{MARK}b{MARK}c"
    ids = plain(processor.call("", images=[image(60, 80), image(28, 28)], text=text).get("input_ids"))[0]
    assert processor.call("decode", ids, skip_special_tokens=True) == text
    assert processor.call("batch_decode", [ids], skip_special_tokens=True) == [text]


@requirement("IDEFICS3-PROC-028")
@pytest.mark.parametrize("token", ADDED)
def test_special_tokens_are_single_tokens(idefics3: Idefics3Objects, token: str) -> None:
    ids = idefics3.tokenize(f"a{token}b", add_special_tokens=False)
    assert len(ids) == 3
    assert idefics3.decoded([ids[1]]) == token
    assert idefics3.processor.call("tokenizer.decode", ids, skip_special_tokens=True) == "ab"


@requirement("IDEFICS3-PROC-028")
def test_special_tokens_are_added_to_a_tokenizer_that_lacks_them(idefics3: Idefics3Objects, tmp_path: Path) -> None:
    content = json.loads((idefics3.checkpoint / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = [item for item in content["added_tokens"] if item["content"] not in ADDED]
    content["model"]["vocab"] = {key: item for key, item in content["model"]["vocab"].items() if key not in ADDED}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tokenizer = idefics3.call("transformers:PreTrainedTokenizerFast", tokenizer_file=str(tmp_path / "tokenizer.json"))
    before = tokenizer.call("", "<image>", add_special_tokens=False).get("input_ids")
    assert len(before) > 1, "the tokenizer knows the token before the processor is made"
    idefics3.call("Idefics3Processor", idefics3.new_image_processor(), tokenizer)
    for token in ADDED:
        assert len(tokenizer.call("", token, add_special_tokens=False).get("input_ids")) == 1, token
