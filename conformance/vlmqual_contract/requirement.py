"""Requirements: one normative sentence each, with the documents that say it and the documents that disagree."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import FAMILIES, Capability

Keyword = Literal["MUST", "SHOULD"]
Subject = Literal["target", "library"]
Level = Literal[
    "api", "images", "prompts", "vision", "prefill", "decode", "masks", "generation", "parallel", "artifact"
]

LEVELS: tuple[str, ...] = get_args(Level)
_ID = re.compile(r"[A-Z0-9]+-[A-Z]+-\d{3}")


@dataclass(frozen=True)
class Citation:
    """A place in a document.

    Attributes:
        document: name of the document, for example "Idefics3 documentation".
        version: version of the library or date that the document describes.
        section: where in the document.
        agrees: False for a source that says something else than the requirement.
        note: for a source that disagrees: what it says and why it is not normative.
    """

    document: str
    version: str
    section: str
    agrees: bool = True
    note: str = ""


@dataclass(frozen=True)
class Requirement:
    """One sentence that a target or a library has to meet.

    Attributes:
        id: `FAMILY-AREA-NNN`; never renumbered, never reused.
        family: `model_type`.
        level: the part of the suite that its tests belong to.
        keyword: MUST or SHOULD.
        subject: "target" is checked on every target, "library" once per library.
        statement: the sentence.
        citations: at least one that agrees.
        needs: capabilities without which it is not applicable.
        untested: why no test can exist here, "" for everything that has a test.
    """

    id: str
    family: str
    level: Level
    keyword: Keyword
    subject: Subject
    statement: str
    citations: tuple[Citation, ...]
    needs: frozenset[Capability] = frozenset()
    untested: str = ""


def load_requirements(paths: Iterable[Path]) -> dict[str, Requirement]:
    """Read requirement files; ids to requirements in file order.

    Raises:
        UsageError: a table is damaged, an id is malformed or stands twice, or nothing is cited.
    """
    found: dict[str, Requirement] = {}
    for path in paths:
        try:
            tables = tomllib.loads(path.read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path.name}: cannot be read as a requirements file: {error}") from error
        for table in tables.get("requirement", []):
            requirement = _requirement(table, path.name)
            if requirement.id in found:
                raise UsageError(f"{path.name}: {requirement.id} stands twice; ids are never reused")
            found[requirement.id] = requirement
    return found


def _requirement(table: Mapping[str, Any], file: str) -> Requirement:
    name = str(table.get("id", "a table without id"))
    if not _ID.fullmatch(name):
        raise UsageError(f"{file}: {name} is no requirement id; ids look like IDEFICS3-IMG-016")
    known = {"id", "family", "level", "keyword", "subject", "statement", "citation", "needs", "untested"}
    if unknown := sorted(set(table) - known):
        raise UsageError(
            f"{file}: {name} has the unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    for key, valid in (
        ("family", FAMILIES),
        ("level", LEVELS),
        ("keyword", get_args(Keyword)),
        ("subject", get_args(Subject)),
    ):
        if table.get(key) not in valid:
            raise UsageError(f"{file}: {name} has {key} {table.get(key)!r}; valid are {', '.join(valid)}")
    if not str(table.get("statement", "")).strip():
        raise UsageError(f"{file}: {name} has no statement")
    try:
        citations = tuple(Citation(**citation) for citation in table.get("citation", []))
        needs = frozenset(Capability(need) for need in table.get("needs", []))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file}: {name}: {error}") from error
    if not any(citation.agrees for citation in citations):
        raise UsageError(f"{file}: {name} cites no source that agrees with it")
    return Requirement(
        id=name,
        family=table["family"],
        level=table["level"],
        keyword=table["keyword"],
        subject=table["subject"],
        statement=table["statement"],
        citations=citations,
        needs=needs,
        untested=str(table.get("untested", "")),
    )
