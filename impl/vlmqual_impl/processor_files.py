"""Files of a processor: image options, tokenizer, chat template, in the layouts that 4.46 and 5.x write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmqual_impl.checkpoints import locate

IMAGE_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.json", "chat_template.jinja")  # where both are there, transformers takes the first
_HUB = ("revision", "cache_dir", "local_files_only", "token")
_WITHOUT_EFFECT = ("trust_remote_code", "use_fast")
_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def located(place: str | Path, kwargs: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The directory of a checkpoint, or the local copy of a hub id; and the keywords that are not about where it is.

    `trust_remote_code` and `use_fast` are accepted and have no effect: no code is ever taken from a checkpoint, and
    there is one image processor.
    """
    options = {key: value for key, value in kwargs.items() if key not in (*_HUB, *_WITHOUT_EFFECT)}
    if Path(place).is_dir():
        return Path(place), options
    hub = {key: value for key, value in kwargs.items() if key in _HUB}
    return locate(place, patterns=_FILES, **hub), options


def image_options(directory: Path) -> dict[str, Any]:
    """Options of the image processor that is saved in a directory.

    Raises:
        ValueError: neither layout is there.
    """
    if (directory / IMAGE_FILE).is_file():
        return read_json(directory / IMAGE_FILE)
    if (directory / PROCESSOR_FILE).is_file():
        options = read_json(directory / PROCESSOR_FILE).get("image_processor")
        if isinstance(options, dict):
            return options
    raise ValueError(
        f"{directory}: no image processor is saved here; "
        f"looked for {IMAGE_FILE} and an image_processor in {PROCESSOR_FILE}"
    )


def chat_template(directory: Path) -> str | None:
    """The chat template that is saved in a directory as a file of its own, or None.

    Raises:
        ValueError: the file holds none.
    """
    for name in TEMPLATE_FILES:
        path = directory / name
        if path.is_file():
            template = path.read_text("utf-8") if name.endswith("jinja") else read_json(path).get("chat_template")
            if not isinstance(template, str):
                raise ValueError(f"{path}: holds no chat_template that is text")
            return template
    return None


def save_chat_template(template: str, directory: Path) -> list[str]:
    """Write the chat template; a template that the tokenizer has written there is replaced. The paths written."""
    written = [write_json(directory / "chat_template.json", {"chat_template": template})]
    newer = directory / "chat_template.jinja"
    if newer.is_file():
        newer.write_text(template, encoding="utf-8")
        written.append(str(newer))
    return written


def tokenizer(directory: Path) -> Any:
    """The tokenizer that is saved in a directory.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{directory}: no tokenizer is saved here; looked for {TOKENIZER_FILE}")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        # Before 5.0 the class that 5.x writes does not exist; what it stands for does.
        if read_json(path).get("tokenizer_class") == "TokenizersBackend":
            return PreTrainedTokenizerFast.from_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizer library raises plain exceptions on damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory}: the tokenizer cannot be read: {reason}") from error


def llama_tokenizer(directory: Path) -> Any:
    """The tokenizer that is saved in a directory as a `LlamaTokenizerFast`, whichever class wrote it.

    So reads 4.46.3, which demands this class (IDEFICS-PROC-004). 5.x writes other names of classes, and its Llama class
    takes only the vocabulary from `tokenizer.json` and makes the rest anew, so that it reads other ids from a file than
    it wrote; here that file decides, under every version.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    from tokenizers import Tokenizer
    from transformers import LlamaTokenizerFast

    path, core = directory / TOKENIZER_FILE, directory / "tokenizer.json"
    for file in (path, core):
        if not file.is_file():
            raise ValueError(f"{directory}: no tokenizer is saved here; looked for {file.name}")
    more = read_json(path).get("extra_special_tokens")  # what 5.x calls additional_special_tokens
    try:
        made = LlamaTokenizerFast.from_pretrained(directory)
        if isinstance(more, list) and not getattr(made, "extra_special_tokens", None):
            made.add_special_tokens({"additional_special_tokens": more})
        written = Tokenizer.from_file(str(core))
        for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
            setattr(made.backend_tokenizer, part, getattr(written, part))
    except Exception as error:  # the tokenizer library raises plain exceptions on damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory}: the tokenizer cannot be read: {reason}") from error
    return made


def save_tokenizer(tokenizer: Any, directory: Path) -> list[str]:
    """Write a tokenizer so that transformers before 5.0 reads it too; the paths written.

    5.x names a class that older versions lack, and lists further special tokens under a key that they read differently.
    """
    written = [str(path) for path in tokenizer.save_pretrained(str(directory))]
    path = directory / TOKENIZER_FILE
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(path, values)
    return written


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> str:
    """Write a JSON object to a file; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return str(path)
