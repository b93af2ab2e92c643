"""Files of Idefics' processor: what is written and read, here and by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
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
    reference_processor,
    sentence_tokenizer,
    small_processor,
    tokenizer,
)
from PIL import Image
from processor_objects import assert_same
from tokenizers import Tokenizer

from vlmqual_contract import fixtures
from vlmqual_impl import AutoImageProcessor, AutoProcessor, IdeficsImageProcessor, IdeficsProcessor, image_urls

RED, BLUE = Image.new("RGB", (8, 5), "red"), Image.new("RGB", (5, 8), "blue")


def _text(processor: Any, *args: Any, **kwargs: Any) -> list[str]:
    """What the prompts became, padding left out."""
    made = processor(*args, **kwargs)
    rows = zip(made["input_ids"].tolist(), made["attention_mask"].tolist(), strict=True)
    ids = [[token for token, seen in zip(*row, strict=True) if seen] for row in rows]
    return [processor.tokenizer.decode(row) for row in ids]


PROMPTS = [["User:", RED, "What is this?\n", "Assistant:"], ["User: go on", BLUE, RED]]


@pytest.mark.parametrize("build", [tokenizer, sentence_tokenizer])
def test_a_saved_processor_loads_here_and_in_transformers(tmp_path: Path, build: Any) -> None:
    # IDEFICS-PROC-020
    folder = tmp_path / "new" / "folder"
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=SIDE, fetch=True), build(), fetch=True)
    wanted = processor(text=PROMPTS)
    written = processor.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {Path(path).name for path in written} >= {"preprocessor_config.json", "tokenizer.json"}
    for kind in (IdeficsProcessor, AutoProcessor):
        loaded = kind.from_pretrained(folder)
        assert isinstance(loaded, IdeficsProcessor)
        assert loaded.fetch is None, "permission is never taken from a file"
        assert_same(loaded(text=PROMPTS), wanted, str(kind))
    assert isinstance(AutoImageProcessor.from_pretrained(folder), IdeficsImageProcessor)
    assert IdeficsProcessor.from_pretrained(folder, fetch=True).fetch == image_urls.ImageFetch()
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert_same(IdeficsProcessor.from_pretrained(again)(text=PROMPTS), wanted, "saved a second time")
    if not NEW:  # 5.x makes a tokenizer of its own from the vocabulary alone
        theirs = transformers.IdeficsProcessor.from_pretrained(folder)
        assert_same(theirs(text=PROMPTS), wanted, "transformers")


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    theirs = reference_processor(image_std=[0.4, 0.5, 0.6])
    theirs.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert (loaded.image_processor.image_size, loaded.image_processor.image_std) == (SIDE, [0.4, 0.5, 0.6])
    switch = {"add_end_of_utterance_token": True}
    assert_same(loaded(text=PROMPTS, **switch), theirs(text=PROMPTS, **switch), "saved by transformers")
    assert _text(loaded, text=["a", "b"]) == [f"{BOS}a{END}b"], "the list of further special tokens was lost"


def test_further_special_tokens_under_their_newer_name_are_read(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text("utf-8"))
    values["extra_special_tokens"] = values.pop("additional_special_tokens")
    path.write_text(json.dumps(values))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    loaded = IdeficsProcessor.from_pretrained(tmp_path)
    assert_same(loaded(text=PROMPTS), small_processor()(text=PROMPTS), "5.x's name of the list")


@pytest.mark.parametrize("name", ["idefics-tiny", "idefics-resampler-tiny", "idefics-9b-processor"])
def test_processors_of_the_fixtures_encode_as_their_files_say(name: str) -> None:
    folder = fixtures.root() / "checkpoints" / name
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, IdeficsProcessor)
    assert processor.tokenizer.padding_side == "left"
    size = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))["image_size"]
    assert processor(text=PROMPTS)["pixel_values"].shape == (2, 2, 3, size, size)
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"{BOS}User:{BLOCK}What is this?\n" + "Assistant: a caf\u00e9"
    made = processor(text=["User:", RED, "What is this?\n", "Assistant: a caf\u00e9"], add_end_of_utterance_token=False)
    assert made["input_ids"][0].tolist() == core.encode(text, add_special_tokens=False).ids
    assert processor.image_token_id == core.token_to_id(IMAGE)


def test_options_override_the_files_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path)
    assert IdeficsProcessor.from_pretrained(tmp_path, image_size=14).image_processor.image_size == 14
    with pytest.raises(TypeError, match="sighs"):
        IdeficsProcessor.from_pretrained(tmp_path, sighs=1)


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(tmp_path: Path, missing: str) -> None:
    small_processor().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        IdeficsProcessor.from_pretrained(tmp_path)


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path / "whole")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "whole", copy)
        (copy / name).write_text('{"model":')
        with pytest.raises(ValueError, match="cannot be read") as caught:
            IdeficsProcessor.from_pretrained(copy)
        assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_without_the_image_token_takes_texts_only() -> None:
    bare = tokenizer(with_end=False)
    core = json.loads(bare.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] not in (IMAGE, FAKE)]
    plain = transformers.LlamaTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), bos_token=BOS, eos_token=EOS, pad_token="<unk>"
    )
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=SIDE), plain)
    assert processor(text=["abc"])["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="the tokenizer has no <image> token"):
        processor(text=["abc", RED])
