"""The prompts of a reference: a user's file of them, or the default questions.

A prompts file is TOML with `[[prompt]]` tables or JSON lines, one object each, with the keys `name`, `images` (files,
relative to the prompts file) and one of `text` (as the model reads it, with an image marker for each image), `question`
(the checkpoint's chat template puts the images before it) and `messages` (as chat templates take them).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError
from vlmqual_contract.questions import Question
from vlmqual_contract.target import MARKERS, Prompt

_TEXTS = ("text", "question", "messages")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


def read_prompts(path: Path, family: str, checkpoint: Path) -> tuple[Question, ...]:
    """The prompts of a file, chat template applied.

    Raises:
        UsageError: the file or a prompt of it is damaged, an image file is missing, or a template is wanted that the
            checkpoint does not have.
    """
    found: dict[str, Question] = {}
    for number, table in enumerate(_tables(path), 1):
        name = str(table.get("name", f"prompt-{number}"))
        where = f"{path.name}: {name}"
        if not _NAME.fullmatch(name):
            raise UsageError(f"{where}: a name has letters, digits, dots, dashes and underscores only")
        if name in found:
            raise UsageError(f"{where} stands twice")
        found[name] = Question(name, _prompt(table, where, path.parent, family, checkpoint))
    if not found:
        raise UsageError(f"{path}: there is no prompt in it")
    return tuple(found.values())


def _tables(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".toml":
            tables = tomllib.loads(text).get("prompt", [])
        else:
            tables = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"prompts file {path}: {reason}; it is TOML (*.toml) or JSON lines") from error
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"prompts file {path}: prompts are [[prompt]] tables of TOML or one JSON object a line")
    return tables


def _prompt(table: Mapping[str, Any], where: str, folder: Path, family: str, checkpoint: Path) -> Prompt:
    if unknown := sorted(set(table) - {"name", "images", *_TEXTS}):
        raise UsageError(f"{where} has the unknown key {unknown[0]}; known are name, images, {', '.join(_TEXTS)}")
    kinds = [kind for kind in _TEXTS if kind in table]
    if len(kinds) != 1:
        raise UsageError(f"{where} has {' and '.join(kinds) or 'no text'}; it needs one of {', '.join(_TEXTS)}")
    names = table.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: images is {names!r}; it has to be a list of file names")
    images = tuple(str(folder / name) for name in names)
    if missing := [image for image in images if not Path(image).is_file()]:
        raise UsageError(f"{where}: image file {missing[0]} does not exist")
    text = _text(table, kinds[0], len(images), where, checkpoint)
    if (markers := text.count(MARKERS[family])) != len(images):
        raise UsageError(f"{where} has {markers} markers {MARKERS[family]} for {len(images)} images")
    return Prompt(text, images)


def _text(table: Mapping[str, Any], kind: str, images: int, where: str, checkpoint: Path) -> str:
    given = table[kind]
    if isinstance(given, str) == (kind == "messages") or not given:
        raise UsageError(f"{where}: {kind} is {given!r:.60}; it has to be {'a list' if kind == 'messages' else 'text'}")
    if kind == "text":
        return str(given)
    if kind == "question":
        content = [{"type": "image"}] * images + [{"type": "text", "text": given}]
        given = [{"role": "user", "content": content}]
    return _templated(given, where, checkpoint)


def _templated(messages: Sequence[Any], where: str, checkpoint: Path) -> str:
    from vlmqual_impl.api.auto import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(str(checkpoint))
        if not hasattr(processor, "apply_chat_template"):
            raise UsageError(f"{where}: {type(processor).__name__} has no chat template; write text with its markers")
        return str(processor.apply_chat_template(list(messages), add_generation_prompt=True))
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise UsageError(f"{where}: the chat template refuses it: {error}") from error
