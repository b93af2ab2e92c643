"""Files of Mllama's processor: what is written and read, here and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from mllama_processor_objects import CHECKPOINT, IMAGE, TINY, reference_processor, small_processor
from processor_objects import assert_same, noise_image

from vlmqual_contract import fixtures
from vlmqual_impl.api.mllama_processing import MllamaImageProcessor, MllamaProcessor
from vlmqual_impl.image_urls import ImageFetch

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello."}]}]


def _call() -> dict[str, Any]:
    images = [[noise_image(60, 40)], [noise_image(20, 40)]]
    return {"images": images, "text": [f"{IMAGE}hi", f"yo{IMAGE}"], "padding": True, "return_tensors": "np"}


def test_a_saved_processor_loads_here_and_in_transformers(tmp_path: Path) -> None:
    # MLLAMA-IMG-044, MLLAMA-PROC-007, MLLAMA-PROC-021
    folder = tmp_path / "new" / "folder"
    processor = small_processor()
    processor.chat_template = "mine: {{ messages | length }}"
    wanted = processor(**_call())
    written = processor.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"preprocessor_config.json", "chat_template.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {Path(path).name for path in written} >= {"preprocessor_config.json", "chat_template.json"}
    for loaded in (MllamaProcessor.from_pretrained(folder), transformers.MllamaProcessor.from_pretrained(folder)):
        about = type(loaded).__module__
        assert loaded.apply_chat_template(MESSAGES) == "mine: 1", f"{about}: the template travels with the processor"
        assert_same(loaded(**_call()), wanted, about)
    image = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    assert (image["image_processor_type"], image["processor_class"]) == ("MllamaImageProcessor", "MllamaProcessor")
    assert (image["size"], image["max_image_tiles"], image["resample"]) == (TINY["size"], 4, 2)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast", "a class that 4.45 knows too"


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    reference_processor(max_image_tiles=3).save_pretrained(tmp_path)
    loaded = MllamaProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.max_image_tiles == 3
    assert_same(loaded(**_call()), reference_processor(max_image_tiles=3)(**_call()), "saved by transformers")
    assert loaded.apply_chat_template(MESSAGES) == small_processor().apply_chat_template(MESSAGES)


def test_both_layouts_of_files_are_read(tmp_path: Path) -> None:
    small_processor(max_image_tiles=2).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    newer = {"image_processor": options, "processor_class": "MllamaProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    loaded = MllamaProcessor.from_pretrained(tmp_path)
    assert (loaded.image_processor.max_image_tiles, loaded.chat_template) == (2, "{{ messages | length }}")
    assert_same(loaded(**_call()), small_processor(max_image_tiles=2)(**_call()), "5.x layout")
    assert MllamaImageProcessor.from_pretrained(tmp_path).size == TINY["size"]


def test_keywords_override_the_files(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path)
    loaded = MllamaProcessor.from_pretrained(
        tmp_path, max_image_tiles=2, chat_template="mine", fetch=True, trust_remote_code=False
    )
    assert (loaded.image_processor.max_image_tiles, loaded.chat_template) == (2, "mine")
    assert loaded.fetch == ImageFetch()
    with pytest.raises(TypeError, match="MllamaImageProcessor does not know tiles; it knows do_convert_rgb"):
        MllamaProcessor.from_pretrained(tmp_path, tiles=2)
    with pytest.raises(ValueError, match="max_image_tiles is 0"):
        MllamaImageProcessor.from_pretrained(tmp_path, max_image_tiles=0)


def test_unknown_keys_of_files_are_written_back(tmp_path: Path) -> None:
    small_processor().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "made_up": {"x": 1}}))
    (tmp_path / "a" / "processor_config.json").write_text(json.dumps({"made_up": {"x": 1}}))
    MllamaProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((tmp_path / "b" / name).read_text("utf-8"))["made_up"] == {"x": 1}, name


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", None, "looked for preprocessor_config.json and an image_processor in processor_"),
        ("tokenizer_config.json", None, "looked for tokenizer_config.json"),
        ("preprocessor_config.json", '{"do_pad": false}', "do_pad is False"),
        ("chat_template.json", "{}", "chat_template.json: holds no chat_template"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    small_processor().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        MllamaProcessor.from_pretrained(tmp_path)


def test_the_fixture_checkpoints_load_with_their_templates() -> None:
    released = MllamaProcessor.from_pretrained(fixtures.root() / "checkpoints" / "mllama-11b-processor")
    assert released.image_processor.size == {"height": 560, "width": 560}
    assert released.image_processor.image_mean == [0.48145466, 0.4578275, 0.40821073]
    entries = json.loads((fixtures.root() / "goldens" / "mllama" / "prompts.json").read_text("utf-8"))["entries"]
    chats = [entry for name, entry in entries.items() if name.startswith("chat|")]
    assert chats, "prompts.json has no chats"
    for entry in chats:
        for processor in (released, MllamaProcessor.from_pretrained(CHECKPOINT)):
            made = processor.apply_chat_template(
                entry["messages"], add_generation_prompt=entry["add_generation_prompt"]
            )
            assert made == entry["text"]
