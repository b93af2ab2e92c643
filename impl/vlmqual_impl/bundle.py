"""Compiled forms of one model in one directory: what `save_pretrained` of the RBLN classes writes, and loading checks.

Files lie in a folder of their part. The record, a JSON file in the root, is written last: a directory without it is no
compiled model, whatever else it holds.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmqual_impl.artifacts import FORMAT, code, file_digest
from vlmqual_impl.entries import Entry

RECORD = "rbln_config.json"
KEY = "compiled"
FOLDERS: Mapping[str, str] = {"vision": "vision_model", "connector": "", "cross": "text_model", "text": "text_model"}


@dataclass(frozen=True)
class Bundle:
    """A directory of compiled forms.

    Attributes:
        folder: the directory.
        entries: what it holds, by the entry's name: engine and tensors.
        closed: nothing can be added.
        made_s: seconds that it took to make a form, by the entry's name.
    """

    folder: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    closed: bool = False
    made_s: dict[str, float] = field(default_factory=dict)

    def place(self, entry: Entry, engine: str, make: Callable[[Path], None]) -> Path:
        """The folder that an entry's compiled form lies in; made now in a bundle that is not closed.

        Args:
            entry: what is compiled.
            engine: name and version.
            make: writes its files into a folder.

        Raises:
            ValueError: a closed bundle has no such entry, or has it from another engine or with other tensors.
        """
        folder = self.folder / FOLDERS[entry.name.partition("-")[0]]
        tensors = [str(spec) for spec in (*entry.inputs, *entry.outputs, *entry.states)]
        if self.closed:
            self._check(entry.name, {"engine": engine, "tensors": tensors})
        elif entry.name not in self.entries:
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            make(folder)
            self.made_s[entry.name] = time.perf_counter() - start
            self.entries[entry.name] = {"engine": engine, "tensors": tensors}
        return folder

    def _check(self, name: str, wanted: Mapping[str, Any]) -> None:
        if name not in self.entries:
            raise ValueError(
                f"{name} was not compiled, and a compiled model compiles nothing; there are {', '.join(self.entries)}"
            )
        for key, value in wanted.items():
            found = self.entries[name].get(key)
            if found != value:
                told = _difference(found, value)
                raise ValueError(f"{self.folder / RECORD}: {key} of {name} is {told}; export the model again")

    def seal(self, values: Mapping[str, Any]) -> None:
        """Write the record: these values, and what was made, with a digest of every file that is here."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name != RECORD]
        compiled = {
            **_versions(),
            "entries": self.entries,
            "files": {path.relative_to(self.folder).as_posix(): file_digest(path) for path in files},
        }
        write_json(self.folder / RECORD, {**values, KEY: compiled})


def read(folder: Path) -> tuple[dict[str, Any], Bundle]:
    """What a directory's record says, and its compiled forms, looked at.

    Raises:
        ValueError: it holds no compiled model, a file is missing, was changed or truncated, or it was made by other
            versions; names the file and what differs.
    """
    path = folder / RECORD
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no compiled model: there is no {RECORD}; export=True compiles a checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    compiled = values.get(KEY) if isinstance(values, dict) else None
    if not isinstance(compiled, dict) or not all(isinstance(compiled.get(key), dict) for key in ("entries", "files")):
        raise ValueError(f"{path} was not written by vlmqual: it does not say what was compiled ({KEY!r})")
    for key, here in _versions().items():
        if compiled.get(key) != here:
            raise ValueError(f"{path}: {key} is {compiled.get(key)!r}, here {here!r}; export the model again")
    for name, known in compiled["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {RECORD} names")
        if file_digest(file) != known:
            raise ValueError(f"{file} is truncated or was changed: it is not the file that {RECORD} names")
    return values, Bundle(folder, compiled["entries"], closed=True)


def publish(source: Path, target: Path, changes: Callable[[Path], None]) -> None:
    """Copy a compiled model into a directory, which is made where it is missing; other files there stay.

    Args:
        source: a directory that was sealed.
        target: what an earlier model left in it is replaced. Without all files it has no record.
        changes: writes what is not in the record into the copy.

    Raises:
        ValueError: the target is no directory.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a model is saved into a directory")
    target.mkdir(parents=True, exist_ok=True)
    known = json.loads((source / RECORD).read_text("utf-8"))[KEY]["files"]
    names = [*known, RECORD]
    draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        for name in names:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, draft / name)
        changes(draft)
        (target / RECORD).unlink(missing_ok=True)
        for folder in {target / folder for folder in FOLDERS.values()}:
            for path in folder.glob("*.rbln"):
                path.unlink()
        made = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
        for name in sorted(made, key=lambda path: path.name == RECORD):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).replace(target / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a mapping."""
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _versions() -> dict[str, Any]:
    return {"format": FORMAT, "torch": torch.__version__, "code": code()}


def _difference(found: object, wanted: object) -> str:
    if isinstance(found, list) and isinstance(wanted, Sequence):
        pairs = [(one, two) for one, two in zip(found, wanted, strict=False) if one != two]
        if pairs:
            return f"{pairs[0][0]!r}, here {pairs[0][1]!r}"
        return f"{len(found)} tensors, here {len(wanted)}"
    return f"{found!r}, here {wanted!r}"
