"""Prompts and calls of the processor, against an independent reading of the rules and transformers."""

from __future__ import annotations

import copy
import pickle
import secrets
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processor_objects import (
    BOS,
    END,
    FAKE,
    GLOBAL,
    GRIDS,
    IMAGE,
    PAD,
    assert_same,
    noise_image,
    reference_processor,
    small_processor,
    small_tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor
from vlmqual_impl.processors import check_counts, collapse, expand, image_text

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


# processor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_ids_decode_to_the_expansion_of_every_grid(grid: tuple[int, int]) -> None:
    rows, columns = grid
    image = noise_image(max(columns, 1) * 16, max(rows, 1) * 16)
    processor = small_processor(do_resize=False)
    made = processor(images=image, text="see <image>here", return_tensors="np")
    text = processor.tokenizer.decode(made.input_ids[0])
    assert text == f"{BOS}see {_written_out(rows, columns, 3)}here"
    assert made.pixel_values.shape[1] == rows * columns + 1
    assert set(made) == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}


def test_batches_of_different_image_counts_are_padded_on_the_left() -> None:
    processor = small_processor()
    wide, tall, square = noise_image(60, 20), noise_image(20, 60), noise_image(9, 9)
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
    processor, reference = small_processor(), reference_processor()
    for number in range(30):
        counts = rng.integers(1, 4, int(rng.integers(1, 4)))
        images = [[noise_image(*map(int, rng.integers(5, 90, 2)), number) for _ in range(count)] for count in counts]
        text = [f"{'x' * int(rng.integers(0, 5))}<image>" * int(count) + "?" for count in counts]
        call: dict[str, Any] = {"images": images, "text": text, "padding": True, "return_tensors": "np"}
        assert_same(processor(**call), reference(**call), f"seed {seed}, batch {number}")


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
    one = noise_image(60, 40)
    call = {**call, "images": {"one": one, "flat": [one, one], "nested": [[one], [one]]}[call["images"]]}
    made, wanted = small_processor()(**call), reference_processor()(**call)
    shown = {key: value for key, value in wanted.items() if key not in ("rows", "cols")}
    assert_same(made, shown, str(call.get("text")))


def test_options_may_be_given_flat_or_sorted() -> None:
    image = noise_image(60, 40)
    flat = small_processor()(
        images=image, text="<image>", do_image_splitting=False, padding="max_length", max_length=30
    )
    sorted_ = small_processor()(
        images=image,
        text="<image>",
        images_kwargs={"do_image_splitting": False},
        text_kwargs={"padding": "max_length", "max_length": 30},
    )
    assert flat["input_ids"] == sorted_["input_ids"]
    assert len(flat["input_ids"][0]) == 30
    assert len(flat["pixel_values"][0]) == 1
    common = small_processor()(text="a", common_kwargs={"return_tensors": "np"})
    assert isinstance(common.input_ids, np.ndarray)


def test_text_alone_and_images_alone_are_accepted() -> None:
    processor = small_processor()
    made = processor(text="hello")
    assert set(made) == {"input_ids", "attention_mask"}
    assert processor.tokenizer.decode(made["input_ids"][0]) == f"{BOS}hello"
    assert isinstance(made["input_ids"][0], list)
    assert [len(row) for row in processor(text=["a", "bcd"])["input_ids"]] == [2, 4], "nothing is padded unasked"
    assert set(processor(images=noise_image(9, 9))) == {"pixel_values", "pixel_attention_mask"}


def test_the_number_of_image_tokens_can_be_set_for_a_call() -> None:
    processor = small_processor(image_seq_len=169, do_image_splitting=False)
    ids = processor(images=noise_image(9, 9), text=IMAGE)["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 169
    ids = processor(images=noise_image(9, 9), text=IMAGE, image_seq_len=5)["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 5


def test_changing_the_image_processor_afterwards_takes_effect() -> None:
    processor = small_processor()
    processor.image_processor.do_image_splitting = False
    assert processor(images=noise_image(60, 40), text=IMAGE, return_tensors="np").pixel_values.shape[1] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "neither text nor images"),
        ({"text": IMAGE}, r"\[1\] <image> markers and the samples have \[0\] images"),
        ({"text": "a", "images": noise_image(2, 2)}, r"\[0\] <image> markers and the samples have \[1\] images"),
        ({"text": [IMAGE, IMAGE], "images": [noise_image(2, 2)] * 2}, r"samples have \[2\] images"),
        ({"text": [IMAGE * 2, "b"], "images": [[noise_image(2, 2)]] * 2}, r"\[2, 0\] .* \[1, 1\]"),
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
        ({"text": IMAGE, "images": noise_image(2, 2), "image_seq_len": 0}, "image_seq_len is 0"),
        ({"text": IMAGE, "images": "none.png"}, "image file none.png does not exist"),
        ({"text": IMAGE, "images": "https://example.org/a.png"}, "only with fetch=True"),
        ({"text": IMAGE, "images": "http://127.0.0.1/a.png", "fetch": True}, "not a public address"),
    ],
)
def test_wrong_calls_are_named(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small_processor()(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [({"text": "a", "colour": 1}, "'colour'"), ({"text": IMAGE, "images": [None]}, "NoneType is no image")],
)
def test_unknown_keywords_and_other_things_are_type_errors(call: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        small_processor()(**call)


def test_both_parts_of_a_processor_are_required() -> None:
    with pytest.raises(ValueError, match="image_processor is None"):
        Idefics3Processor(None, small_tokenizer())
    with pytest.raises(ValueError, match="tokenizer is None"):
        Idefics3Processor(Idefics3ImageProcessor())
    with pytest.raises(TypeError, match="does not know colour; it knows image_processor"):
        Idefics3Processor(Idefics3ImageProcessor(), small_tokenizer(), colour=1)
    with pytest.raises(ValueError, match=r"image_seq_len is 2\.5"):
        Idefics3Processor(Idefics3ImageProcessor(), small_tokenizer(), image_seq_len=2.5)  # type: ignore[arg-type]  # must be refused


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
    made = small_processor()(images=noise_image(9, 9), text=IMAGE, return_tensors="pt")
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
    processor = small_processor()
    wanted = f"{BOS}User:<image>What is it?{END}\nAssistant: A page.{END}\n"
    assert processor.apply_chat_template(MESSAGES) == wanted
    assert processor.apply_chat_template([MESSAGES] * 2, add_generation_prompt=True) == [f"{wanted}Assistant:"] * 2
    assert processor.apply_chat_template(MESSAGES, chat_template="{{ messages | length }}") == "2"
    ids = processor.apply_chat_template(MESSAGES, tokenize=True)
    assert processor.tokenizer.decode(ids) == wanted


def test_without_a_template_chats_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no chat template"):
        Idefics3Processor(Idefics3ImageProcessor(), small_tokenizer()).apply_chat_template(MESSAGES)


def test_decoding_forwards_to_the_tokenizer_and_restores_markers() -> None:
    processor = small_processor()
    ids = processor(images=noise_image(60, 60), text="a <image>b")["input_ids"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a <image>b"
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a <image>b"]
    assert processor.decode(ids[0]).startswith(f"{BOS}a {FAKE}<image><image><image><image>{FAKE}")
