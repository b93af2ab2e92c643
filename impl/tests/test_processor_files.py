"""Files of a processor: what is written and read, here and by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from processor_objects import (
    IMAGE,
    TEMPLATE,
    TINY,
    assert_same,
    noise_image,
    reference_processor,
    small_processor,
    small_tokenizer,
)

from vlmqual_contract import fixtures
from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor


def _call() -> dict[str, Any]:
    images = [[noise_image(60, 40)], [noise_image(20, 40)]]
    return {"images": images, "text": ["<image>hi", "yo<image>"], "padding": True, "return_tensors": "np"}


def test_a_saved_processor_loads_here_and_in_transformers(tmp_path: Path) -> None:
    wanted = small_processor()(**_call())
    small_processor().save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    for loaded in (Idefics3Processor.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(folder)):
        assert type(loaded).__name__ == "Idefics3Processor"
        assert (loaded.image_seq_len, loaded.chat_template) == (3, TEMPLATE)
        assert_same(loaded(**_call()), wanted, type(loaded).__module__)
    written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast", "a class that 4.46 knows too"


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    reference_processor().save_pretrained(tmp_path)
    loaded = Idefics3Processor.from_pretrained(tmp_path)
    assert (loaded.image_seq_len, loaded.chat_template) == (3, TEMPLATE)
    assert_same(loaded(**_call()), reference_processor()(**_call()), "saved by transformers")


def test_both_layouts_of_files_are_read(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path)
    options = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    newer = {"image_processor": options, "image_seq_len": 3, "processor_class": "Idefics3Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    loaded = Idefics3Processor.from_pretrained(tmp_path)
    assert (loaded.image_seq_len, loaded.chat_template) == (3, TEMPLATE)
    assert_same(loaded(**_call()), small_processor()(**_call()), "5.x layout")
    assert Idefics3ImageProcessor.from_pretrained(tmp_path).size == TINY["size"]


def test_keywords_override_the_files(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path)
    for tiles in (2, 3, 5, 6):
        size = {"longest_edge": tiles * 16}
        loaded = Idefics3Processor.from_pretrained(tmp_path, size=size, image_seq_len=9, trust_remote_code=False)
        assert (loaded.image_processor.size, loaded.image_seq_len) == (size, 9)
        made = loaded(images=noise_image(30, 30), text=IMAGE)
        assert made["input_ids"][0].count(loaded.tokenizer.convert_tokens_to_ids(IMAGE)) == 9 * (tiles * tiles + 1)
    with pytest.raises(TypeError, match="does not know sice; it knows do_convert_rgb"):
        Idefics3Processor.from_pretrained(tmp_path, sice={"longest_edge": 2})
    with pytest.raises(TypeError, match="does not know sice"):
        Idefics3ImageProcessor.from_pretrained(tmp_path, sice={"longest_edge": 2})


def test_unknown_keys_of_files_are_written_back(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path / "a")
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = tmp_path / "a" / name
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "made_up": {"x": 1}}))
    Idefics3Processor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((tmp_path / "b" / name).read_text("utf-8"))["made_up"] == {"x": 1}, name


def test_a_template_set_here_wins_over_the_tokenizer_s_after_saving(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "the tokenizer's"
    assert Idefics3Processor(Idefics3ImageProcessor(), tokenizer).chat_template == "the tokenizer's"
    Idefics3Processor(Idefics3ImageProcessor(), tokenizer, chat_template="mine").save_pretrained(tmp_path)
    assert Idefics3Processor.from_pretrained(tmp_path).chat_template == "mine"
    assert transformers.AutoProcessor.from_pretrained(tmp_path).chat_template == "mine"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", None, "looked for preprocessor_config.json and an image_processor in processor_"),
        ("tokenizer_config.json", None, "looked for tokenizer_config.json"),
        ("tokenizer.json", "{", "the tokenizer cannot be read"),
        ("preprocessor_config.json", "{", r"preprocessor_config\.json: cannot be read as JSON"),
        ("processor_config.json", "[]", r"processor_config\.json: holds no JSON object"),
        ("chat_template.json", "{}", r"chat_template\.json: holds no chat_template"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    small_processor().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=re.sub(r"(?<!\\)\.", r"\.", message)) as caught:
        Idefics3Processor.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such checkpoint directory"):
        Idefics3Processor.from_pretrained(tmp_path / "nowhere")


def test_released_geometry_gives_the_golden_prompts() -> None:
    root = fixtures.root()
    processor = Idefics3Processor.from_pretrained(root / "checkpoints" / "idefics3-8b-processor")
    made = processor(images=noise_image(80, 60), text=IMAGE)
    ids = made["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 169 * 13
    entries = json.loads((root / "goldens" / "idefics3" / "prompts.json").read_text("utf-8"))["entries"]
    chats = [entry for name, entry in entries.items() if name.startswith("chat|")]
    assert chats, "prompts.json has no chats"
    for entry in chats:
        given_ = processor.apply_chat_template(entry["messages"], add_generation_prompt=entry["add_generation_prompt"])
        assert given_ == entry["text"]
