"""The processor of Idefics: prompts of texts and images, against the specification's example and transformers."""

from __future__ import annotations

import inspect
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from idefics_processor_objects import (
    BLOCK,
    BOS,
    END,
    EOS,
    FAKE,
    IMAGE,
    NEW,
    SIDE,
    random_prompts,
    reference_processor,
    small_processor,
    tokenizer,
)
from PIL import Image
from processor_objects import assert_same, noise_image

from vlmqual_impl import IdeficsImageProcessor, IdeficsProcessor, image_urls
from vlmqual_impl.image_files import ImageError
from vlmqual_impl.processors_idefics import Text, items

URL = "https://hips.hearstapps.com/hmg-prod/images/dog-puns-1581708208.jpg"
RED, BLUE = Image.new("RGB", (8, 5), "red"), Image.new("RGB", (5, 8), "blue")


def _text(processor: Any, *args: Any, **kwargs: Any) -> list[str]:
    """What the prompts became, padding left out."""
    made = processor(*args, **kwargs)
    rows = zip(made["input_ids"].tolist(), made["attention_mask"].tolist(), strict=True)
    ids = [[token for token, seen in zip(*row, strict=True) if seen] for row in rows]
    return [processor.tokenizer.decode(row) for row in ids]


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.as_tensor(IdeficsImageProcessor(image_size=SIDE)(image)[0])


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Addresses that were fetched; each gives a red image."""
    asked: list[tuple[str, Any]] = []

    def fetch(url: str, limits: Any) -> Image.Image:
        asked.append((url, limits))
        return RED

    monkeypatch.setattr(image_urls, "fetch_image", fetch)
    return asked


# documented names ----------------------------------------------------------------------------------------------------


def test_signatures_are_the_documented_ones() -> None:
    # IDEFICS-PROC-001, IDEFICS-PROC-005
    constructor = inspect.signature(IdeficsProcessor.__init__).parameters
    empty = inspect.Parameter.empty
    assert [(name, one.default) for name, one in constructor.items()][1:-1] == [
        ("image_processor", empty),
        ("tokenizer", None),
        ("image_size", 224),
        ("add_end_of_utterance_token", None),
    ]
    call = inspect.signature(IdeficsProcessor.__call__).parameters
    wanted = [("images", None), ("text", None), ("audio", None), ("videos", None)]
    assert [(name, one.default) for name, one in call.items()][1:-1] == wanted


def test_image_processor_and_a_llama_tokenizer_are_required() -> None:
    # IDEFICS-PROC-002, IDEFICS-PROC-003, IDEFICS-PROC-004
    with pytest.raises(ValueError, match="image_processor is None"):
        IdeficsProcessor(None, tokenizer())
    with pytest.raises(ValueError, match="image_processor is a str; an IdeficsImageProcessor is required"):
        IdeficsProcessor("idefics", tokenizer())
    with pytest.raises(ValueError, match="tokenizer is None"):
        IdeficsProcessor(IdeficsImageProcessor())
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer is a .*; a LlamaTokenizerFast is required"):
        IdeficsProcessor(IdeficsImageProcessor(), other)
    with pytest.raises(TypeError, match="does not know sighs"):
        IdeficsProcessor(IdeficsImageProcessor(), tokenizer(), sighs=1)


def test_a_call_returns_four_tensors() -> None:
    # IDEFICS-PROC-006, IDEFICS-PROC-007
    made = small_processor()(text=["User:", RED, "Describe"])
    assert [*made] == ["input_ids", "attention_mask", "pixel_values", "image_attention_mask"]
    assert all(isinstance(one, torch.Tensor) for one in made.values())
    assert [made[name].dtype for name in made] == [torch.int64, torch.int64, torch.float32, torch.int64]
    batch, tokens = made["input_ids"].shape
    assert made["attention_mask"].shape == (batch, tokens)
    assert made["pixel_values"].shape == (1, 1, 3, SIDE, SIDE)
    assert made["image_attention_mask"].shape == (batch, tokens, 1)
    arrays = small_processor()(text=["User:", RED, "Describe"], return_tensors="np")
    assert all(isinstance(one, np.ndarray) for one in arrays.values())
    with pytest.raises(ValueError, match="return_tensors 'tf' is not available"):
        small_processor()(text=["a"], return_tensors="tf")


# the text ------------------------------------------------------------------------------------------------------------


def test_the_documented_example_becomes_the_documented_text(fetched: list[Any]) -> None:
    # IDEFICS-PROC-009, with a tokenizer like the released one, which does not list <end_of_utterance>
    prompts = [
        "User:",
        BLUE,
        "Describe this image.\nAssistant: An image of two kittens in grass.\n",
        "User:",
        URL,
        "Describe this image.\nAssistant:",
    ]
    made = small_processor(with_end=False)(text=prompts, return_tensors="pt", fetch=True)
    assert small_processor(with_end=False).tokenizer.decode(made["input_ids"][0]) == (
        "<s>User:<fake_token_around_image><image><fake_token_around_image>Describe this image.\n"
        "Assistant: An image of two kittens in grass.\n"
        "User:<fake_token_around_image><image><fake_token_around_image>Describe this image.\n"
        "Assistant:"
    )
    assert fetched == [(URL, image_urls.ImageFetch())]
    assert torch.equal(made["pixel_values"][0], torch.stack([_pixels(BLUE), _pixels(RED)]))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (["User:", RED, "Describe"], f"User:{BLOCK}Describe"),  # IDEFICS-PROC-008
        ([RED, BLUE], f"{FAKE}{IMAGE}{FAKE}{IMAGE}{FAKE}"),  # IDEFICS-PROC-027
        ([RED, BLUE, RED, "a"], f"{FAKE}{IMAGE}{FAKE}{IMAGE}{FAKE}{IMAGE}{FAKE}a"),
        ([RED, "a", BLUE], f"{BLOCK}a{BLOCK}"),
        ([RED, "", BLUE], f"{BLOCK}{BLOCK}"),  # an empty text parts them, as in 4.46.3
        (["  a b ", RED, "\n c \t"], f"a b{BLOCK}\n c \t"),  # blanks are taken off, other white space stays
        (["a", "b", RED, "c", "d"], f"a{END}b{BLOCK}c{END}d"),  # IDEFICS-PROC-024, IDEFICS-PROC-025
        (["a", RED, "b"], f"a{BLOCK}b"),
        (["a", "b", RED], f"a{END}b{BLOCK}"),
        (["a", "", "b"], f"a{END}{END}b"),
        (["a"], "a"),
        ([], ""),
    ],
)
def test_items_become_text(prompt: list[Any], wanted: str) -> None:
    assert _text(small_processor(), text=[prompt]) == [BOS + wanted]
    assert _text(small_processor(), text=[prompt], add_eos_token=True) == [BOS + wanted + EOS]
    assert _text(small_processor(), text=[prompt], add_end_of_utterance_token=False) == [BOS + wanted.replace(END, "")]
    if prompt:
        assert _text(small_processor(), text=prompt) == [BOS + wanted], "a flat list is one prompt"
        assert _text(small_processor(), text=tuple(prompt)) == [BOS + wanted]


def test_texts_are_parted_where_the_tokenizer_lists_the_token_or_the_call_says_so() -> None:
    # IDEFICS-PROC-024, IDEFICS-PROC-025
    with_end, without = small_processor(), small_processor(with_end=False)
    assert _text(with_end, text=["a", "b"]) == [f"{BOS}a{END}b"]
    assert _text(without, text=["a", "b"]) == [f"{BOS}ab"]
    assert _text(without, text=["a", "b"], add_end_of_utterance_token=True) == [f"{BOS}a{END}b"]
    assert _text(with_end, text=["a", "b"], text_kwargs={"add_end_of_utterance_token": False}) == [f"{BOS}ab"]
    silent = IdeficsProcessor(with_end.image_processor, with_end.tokenizer, add_end_of_utterance_token=False)
    assert _text(silent, text=["a", "b"]) == [f"{BOS}a{END}b"], "the constructor's argument has no effect"


def test_a_text_with_a_marker_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="a text has an <image> marker of its own"):
        small_processor()(text=["a <image> b", RED])


# flat, nested, pairs -------------------------------------------------------------------------------------------------


def test_one_prompt_or_a_batch_by_text_or_alone() -> None:
    # IDEFICS-PROC-011, LM-016
    processor = small_processor()
    one, two = ["a", RED, "b"], [BLUE, RED]
    assert _text(processor, text=[one, two]) == [f"{BOS}a{BLOCK}b", f"{BOS}{BLOCK}{IMAGE}{FAKE}"]
    assert_same(processor([one, two]), processor(text=[one, two]), "prompts as the only argument")
    assert_same(processor(one), processor(text=[one]), "one prompt as the only argument")
    assert_same(processor(text="a b "), processor(text=[["a b"]]), "a single text")
    assert_same(processor(RED), processor(text=[[RED]]), "a single image")
    for wrong in ([["a", RED], "b"], []):
        with pytest.raises(ValueError, match="prompts must be a list"):
            processor(text=wrong)


def test_images_and_texts_are_paired() -> None:
    # IDEFICS-PROC-012, IDEFICS-PROC-013
    processor = small_processor()
    made = processor(images=[RED, BLUE], text=["x", "yy"])
    assert _text(processor, images=[RED, BLUE], text=["x", "yy"]) == [f"{BOS}{BLOCK}x", f"{BOS}{BLOCK}yy"]
    assert torch.equal(made["pixel_values"][:, 0], torch.stack([_pixels(RED), _pixels(BLUE)]))
    assert_same(processor(images=RED, text="x"), processor(text=[[RED, "x"]]), "a single image and text")
    assert_same(processor(images=["x", "yy"], text=[RED, BLUE]), made, "the two swapped")
    lists = processor(images=[[RED, BLUE], [RED]], text=["x", "y"])  # as in 5.23.0; 4.46.3 fails
    assert_same(lists, processor(text=[["x", RED, BLUE], ["y", RED]]), "lists of images")


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, None, "neither text nor images were passed"),  # IDEFICS-PROC-016
        ([RED], ["a", "b"], "there are 2 texts and 1 images"),
        ([RED, [BLUE]], ["a", "b"], "lists of images, not both"),
        ([RED], [["a", BLUE]], "text must be a text or a list of texts"),
        ([RED], [BLUE], "text must be a text or a list of texts"),
        ([], [], "text must be a text or a list of texts"),
    ],
)
def test_what_does_not_go_together_is_refused(images: Any, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_processor()(images=images, text=text)


def test_other_media_and_options_are_refused() -> None:
    for media in ("audio", "videos"):
        with pytest.raises(ValueError, match=f"{media} were passed"):
            small_processor()(text=["a"], **{media: [1]})
    with pytest.raises(TypeError, match="does not know 'sighs'"):
        small_processor()(text=["a"], sighs=1)


# paths and addresses -------------------------------------------------------------------------------------------------


def test_paths_are_images_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RED.save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    processor = small_processor()
    wanted = processor(text=["User:", RED, "Describe"])
    for path in (tmp_path / "red.png", Path("red.png")):
        assert_same(processor(text=["User:", path, "Describe"]), wanted, str(path))
        assert_same(processor(images="x", text=path), processor(images=RED, text="x"), f"swapped {path}")
    for named in (tmp_path / "red.png", str(tmp_path / "red.png"), "red.png"):
        assert_same(processor(images=named, text="x"), processor(images=RED, text="x"), str(named))
    for missing in ([Path("blue.png")], [["a", Path("blue.png")]]):
        with pytest.raises(ImageError, match=r"image file blue\.png does not exist"):
            processor(text=missing)
    with pytest.raises(ImageError, match=r"image file blue\.png does not exist"):
        processor(images=["blue.png"], text=["x"])


def test_a_text_is_a_text_whatever_files_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RED.save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    processor = small_processor()
    for text in ("red.png", str(tmp_path / "red.png")):
        assert _text(processor, text=[text]) == [BOS + text]


def test_addresses_need_permission(fetched: list[Any]) -> None:
    # IDEFICS-PROC-015
    processor = small_processor()
    for prompts in ({"text": ["a", URL]}, {"images": [URL], "text": ["a"]}):
        with pytest.raises(ImageError, match="an address is fetched only with fetch=True"):
            processor(**prompts)
    assert fetched == []
    mine = image_urls.ImageFetch(timeout_s=3)
    assert_same(processor(text=["a", f" {URL} "], fetch=mine), processor(text=["a", RED]), "an item")
    assert_same(processor(images=[URL], text=["a"], fetch=True), processor(images=[RED], text=["a"]), "an image")
    assert fetched == [(URL, mine), (URL, image_urls.ImageFetch())]
    with pytest.raises(ImageError, match="only with fetch=True"):
        processor(text=["a", URL])  # permission is for one call


def test_permission_of_the_constructor_holds_until_a_call_takes_it(fetched: list[Any]) -> None:
    images, core = IdeficsImageProcessor(image_size=SIDE), tokenizer()
    allowed = IdeficsProcessor(images, core, fetch={"limit_bytes": 9})
    inherited = IdeficsProcessor(IdeficsImageProcessor(image_size=SIDE, fetch=True), core)
    for processor in (allowed, inherited):
        processor(text=["a", URL])
        with pytest.raises(ImageError, match="only with fetch=True"):
            processor(text=["a", URL], fetch=False)
    assert fetched == [(URL, image_urls.ImageFetch(limit_bytes=9)), (URL, image_urls.ImageFetch())]
    with pytest.raises(TypeError, match="fetch is 'yes'"):
        allowed(text=["a"], fetch="yes")


def test_texts_that_hold_an_address_are_texts(fetched: list[Any]) -> None:
    for text in (f"see {URL}", "http:", "example.org/a.png", "file:///etc/hostname"):
        assert _text(small_processor(), text=[text], fetch=True) == [BOS + text]
    assert fetched == []


# pixels and mask -----------------------------------------------------------------------------------------------------


def test_images_of_a_prompt_are_packed_with_zeros_behind_them() -> None:
    # IDEFICS-PROC-010
    made = small_processor()(text=[["a", RED], [BLUE, "b", RED], ["c"]])["pixel_values"]
    assert made.shape == (3, 2, 3, SIDE, SIDE)
    assert torch.equal(made[0, 0], _pixels(RED))
    assert torch.equal(made[1], torch.stack([_pixels(BLUE), _pixels(RED)]))
    assert not made[0, 1].any()
    assert not made[2].any()


def test_prompts_without_images_have_zeros_for_one() -> None:
    # IDEFICS-PROC-022
    made = small_processor()(text=[["hello"], ["you", "two"]])
    assert made["pixel_values"].shape == (2, 1, 3, SIDE, SIDE)
    assert not made["pixel_values"].any()
    assert made["image_attention_mask"].shape == (*made["input_ids"].shape, 1)
    assert not made["image_attention_mask"].any()


def test_tokens_see_the_image_before_them() -> None:
    # IDEFICS-PROC-021, by hand. Tokens: <s> a F <image> F b F <image> F c, one for each sign.
    made = small_processor()(text=[["a", RED, "b", BLUE, "c"], ["d"]])
    wanted = torch.zeros(10, 2, dtype=torch.int64)
    wanted[3:7, 0] = 1
    wanted[7:, 1] = 1
    assert torch.equal(made["image_attention_mask"][0], wanted)
    assert not made["image_attention_mask"][1].any(), "padding and texts without an image see none"


def test_an_end_of_sequence_is_the_last_to_see_an_image_until_the_next() -> None:
    # ALGORITHMS 4.3. Tokens: <s> F <image> F a </s> b F <image> F c </s>
    made = small_processor()(text=[RED, f"a{EOS}b", BLUE, "c"], add_eos_token=True)
    wanted = torch.zeros(12, 2, dtype=torch.int64)
    wanted[2:6, 0] = 1
    wanted[8:, 1] = 1
    assert torch.equal(made["image_attention_mask"][0], wanted)


def test_a_transform_replaces_the_image_rules() -> None:
    # IDEFICS-PROC-017
    seen: list[Any] = []

    def transform(image: Any) -> torch.Tensor:
        seen.append(image)
        return torch.full((3, 7, 7), float(len(seen)))

    made = small_processor()(text=[["a", RED, BLUE], ["b", RED], ["c"]], transform=transform)["pixel_values"]
    assert made[:, :, 0, 0, 0].tolist() == [[1, 2], [3, 0], [0, 0]]
    assert made.shape == (3, 2, 3, 7, 7)
    assert seen == [RED, BLUE, RED]


def test_the_image_processor_decides_the_size() -> None:
    # IDEFICS-PROC-026: the constructor's image_size has no effect in any version
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=SIDE), tokenizer(), image_size=14)
    assert processor(text=["a", RED])["pixel_values"].shape[-1] == SIDE
    assert processor(text=["a", RED], image_size=10)["pixel_values"].shape[-2:] == (10, 10)
    assert processor(text=["a"])["pixel_values"].shape[-1] == SIDE


# padding and truncation ----------------------------------------------------------------------------------------------


def test_rows_are_padded_to_the_longest_on_the_tokenizer_s_side() -> None:
    # IDEFICS-PROC-023
    processor = small_processor()
    prompts = [["abcdef", RED], ["x", BLUE]]
    made = processor(text=prompts)
    short = processor(text=prompts[1])
    assert made["attention_mask"].tolist() == [[1] * 10, [0] * 5 + [1] * 5]
    assert made["input_ids"][1].tolist() == [processor.tokenizer.pad_token_id] * 5 + short["input_ids"][0].tolist()
    assert torch.equal(made["image_attention_mask"][1, 5:], short["image_attention_mask"][0])
    assert not made["image_attention_mask"][1, :5].any()
    right = processor(text=prompts, padding_side="right") if NEW else None
    if right is not None:
        assert right["attention_mask"].tolist()[1] == [1] * 5 + [0] * 5
    fixed = processor(text=prompts, padding="max_length", max_length=12)
    assert fixed["input_ids"].shape == (2, 12)
    with pytest.raises(ValueError, match=r"rows are \[5, 10\] tokens long; use padding=True"):
        processor(text=prompts, padding=False)


def test_images_that_a_truncation_cut_off_are_left_out() -> None:
    # Tokens: <s> a F <image> F b F <image> F c
    processor = small_processor()
    prompt = ["a", RED, "b", BLUE, "c"]
    processor.tokenizer.truncation_side = "right"
    made = processor(text=prompt, truncation=True, max_length=6)
    assert made["input_ids"].shape == (1, 6)
    assert torch.equal(made["pixel_values"][0], torch.stack([_pixels(RED), torch.zeros(3, SIDE, SIDE)]))
    assert made["image_attention_mask"][0].tolist() == [[0, 0]] * 3 + [[1, 0]] * 3
    processor.tokenizer.truncation_side = "left"
    made = processor(text=prompt, truncation=True, max_length=4)
    assert torch.equal(made["pixel_values"][0], torch.stack([_pixels(BLUE), torch.zeros(3, SIDE, SIDE)]))
    assert made["image_attention_mask"][0].tolist() == [[0, 0]] + [[1, 0]] * 3


def test_debug_prints_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    # IDEFICS-PROC-018
    small_processor()(text=["a", RED])
    assert capsys.readouterr().out == ""
    small_processor()(text=["a", RED], debug=True)
    assert repr(f"{BOS}a{BLOCK}") in capsys.readouterr().out


# against transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_any_prompts_give_the_tensors_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = random_prompts(
        rng, lambda: noise_image(*(int(n) for n in rng.integers(4, 60, 2)), seed=int(rng.integers(9)))
    )
    prompts = list(islice(drawn, int(rng.integers(1, 5))))
    options: dict[str, Any] = {
        "add_eos_token": bool(seed % 2),
        "add_end_of_utterance_token": bool(seed % 3),
        "padding": True if seed % 4 else "longest",
        "return_tensors": "pt",
    }
    assert_same(
        small_processor()(text=prompts, **options), reference_processor()(text=prompts, **options), f"{prompts}"
    )
    if seed % 3 and not NEW:  # 5.x never finds the token by itself
        del options["add_end_of_utterance_token"]
        assert_same(small_processor()(text=prompts, **options), reference_processor()(text=prompts, **options), "None")


def test_pairs_and_texts_give_the_tensors_of_transformers() -> None:
    image = noise_image(30, 20)
    for call in (
        {"images": [image, RED], "text": ["x", "yy"]},
        {"images": image, "text": "x"},
        {"text": [["hello"], ["you"]]},
        {"text": ["a", image], "padding": "max_length", "max_length": 20},
        {"text": ["a", image, "bcd"], "truncation": True, "max_length": 6},
    ):
        assert_same(small_processor()(**call), reference_processor()(**call), str(call))


def test_decoding_is_the_tokenizer_s() -> None:
    # IDEFICS-PROC-019
    processor = small_processor()
    ids = processor(text=[["a", RED], ["bb"]])["input_ids"]
    assert processor.batch_decode(ids) == processor.tokenizer.batch_decode(ids)
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a", "bb"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a"


# markers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images", "wanted"),
    [
        ("User:<image>What?", [1], ["User:", 1, "What?"]),
        ("<image><image>a", [1, 2], [1, 2, "a"]),
        ("a<image>", [1], ["a", 1]),
        ("<image> <image>", [1, 2], [1, " ", 2]),
        ("a", [], ["a"]),
        ("", [], []),
    ],
)
def test_texts_with_markers_become_items(text: str, images: list[Any], wanted: list[Any]) -> None:
    assert items(text, images) == wanted


def test_a_text_that_has_its_image_beside_it_names_no_file(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    path = str(tmp_path / "red.png")
    processor = small_processor()
    made, wanted = (processor(images=[image], text=[path]) for image in (path, RED))
    assert torch.equal(made["input_ids"], wanted["input_ids"])
    assert torch.equal(made["pixel_values"], wanted["pixel_values"])
    assert made["pixel_values"].shape[1] == 1


def test_texts_of_others_name_no_files_and_addresses(tmp_path: Path, fetched: list[Any]) -> None:
    RED.save(tmp_path / "red.png")
    for text in (str(tmp_path / "red.png"), URL):
        for prompt in (items(f"<image>{text}", [BLUE]), [BLUE, Text(text)]):
            assert _text(small_processor(), text=[prompt], fetch=True) == [f"{BOS}{BLOCK}{text}"]
        assert _text(small_processor(), images=BLUE, text=Text(text)) == [f"{BOS}{BLOCK}{text}"]
    assert fetched == []


@pytest.mark.parametrize(("text", "images"), [("a<image>", []), ("a", [1]), ("<image><image>", [1])])
def test_markers_and_images_are_equally_many(text: str, images: list[Any]) -> None:
    with pytest.raises(ValueError, match=rf"the text has \d <image> markers for {len(images)} images"):
        items(text, images)
