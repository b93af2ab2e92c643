"""The sentences behind requirement ids, found through entry points and read without importing the suite."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path

from vlmqual_contract.discovery import REQUIREMENTS, installed
from vlmqual_contract.errors import UsageError
from vlmqual_contract.requirement import Requirement, load_requirements


@dataclass(frozen=True)
class Statements:
    """Requirements by id.

    Attributes:
        by_id: every requirement whose file is installed here.
        problems: one sentence for every file or entry point that cannot be read.
    """

    by_id: Mapping[str, Requirement] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def text(self, name: str) -> str:
        """The sentence of a requirement, "" where its file is not installed."""
        return self.by_id[name].statement if name in self.by_id else ""


def installed_statements() -> Statements:
    """Read the requirement files of every package that registers them under `vlmqual.requirements`.

    The entry point's value names a package whose folder holds `*.toml`. The folder is looked up, no code of it runs.
    """
    found: dict[str, Requirement] = {}
    problems: list[str] = []
    files: dict[Path, None] = {}
    for point in installed(REQUIREMENTS).values():
        folder = _folder(point)
        if folder is None:
            problems.append(f"requirements {point.name}: the package {point.value!r} is not installed")
            continue
        files.update(dict.fromkeys(sorted(folder.glob("*.toml"))))
    for file in files:
        try:
            found |= load_requirements([file])
        except UsageError as error:
            problems.append(str(error))
    return Statements(found, tuple(problems))


def _folder(point: EntryPoint) -> Path | None:
    top, *rest = point.value.partition(":")[0].strip().split(".")
    try:
        spec = importlib.util.find_spec(top)  # a top-level package is found without being imported
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location, *rest)
        if folder.is_dir():
            return folder
    return None
