"""What files of known failures and of waivers share: their tables, and patterns of case names."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError

_REQUIREMENT = re.compile(r"[A-Z0-9]+-[A-Z]+-\d{3}")


def tables(path: Path, key: str, of_what: str) -> list[dict[str, Any]]:
    """The tables `[[key]]` of a file.

    Raises:
        UsageError: it is not there, or no TOML.
    """
    try:
        found: list[dict[str, Any]] = tomllib.loads(path.read_text("utf-8")).get(key, [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a file of {of_what}: {error}") from error
    return found


def names(pattern: str, case: str, ids: Iterable[str]) -> bool:
    """True when a pattern of case names, or a requirement id, is about a case that carries these ids."""
    return pattern in ids if _REQUIREMENT.fullmatch(pattern) else matches(pattern, case)


def matches(pattern: str, text: str) -> bool:
    """As in a shell, but brackets are themselves: case names are full of them."""
    parts = ({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in pattern)
    return re.fullmatch("".join(parts), text) is not None
