"""Compiled forms on disk: each in a directory of its own, with a record of what it was made from and by.

The directory's name is the digest of that record, so that another weight, shape or version never finds it. A directory
appears whole or not at all, and several processes may make the same one at once: the first to finish is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from vlmqual_impl.entries import Entry

RECORD = "artifact.json"
FORMAT = 2
REUSE = ("yes", "no", "only")
_DRAFT = ".making-"


@dataclass(frozen=True)
class Shelf:
    """Where compiled forms of one checkpoint are kept.

    Attributes:
        folder: of all of them.
        checkpoint: directory of the model.
        settings: what changes the functions besides their shapes, for example the kind of attention.
        reuse: "yes" takes what is there and makes what is not, "no" makes everything anew, "only" makes nothing.
        made_s: seconds that it took to make what was not there, by the entry's name.
    """

    folder: Path
    checkpoint: Path
    settings: tuple[tuple[str, str], ...] = ()
    reuse: str = "yes"
    made_s: dict[str, float] = field(default_factory=dict, compare=False)

    @cached_property
    def weights(self) -> str:
        """Digest of the checkpoint's configuration and weights."""
        whole = hashlib.sha256()
        for path in sorted(self.checkpoint.iterdir()):
            if path.name == "config.json" or path.suffix == ".safetensors":
                whole.update(f"{path.name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def record(self, entry: Entry, engine: str) -> dict[str, Any]:
        """What an artefact of this entry is made from and by."""
        return {
            "format": FORMAT,
            "entry": entry.name,
            "engine": engine,
            "torch": torch.__version__,
            "code": code(),
            "weights": self.weights,
            "settings": dict(self.settings),
            "tensors": [str(spec) for spec in (*entry.inputs, *entry.outputs, *entry.states)],
        }

    def place(self, entry: Entry, engine: str, make: Callable[[Path], None]) -> Path:
        """The directory of an entry's compiled form, made now where it is not there.

        Args:
            entry: what is compiled.
            engine: name and version.
            make: writes its files into an empty directory.

        Raises:
            ValueError: what is there is damaged or foreign, or there is nothing and nothing may be made.
        """
        record = self.record(entry, engine)
        target = self.folder / f"{entry.name}-{digest(record)[:16]}"
        if target.is_dir() and self.reuse != "no":
            check(target, record)
            return target
        if self.reuse == "only":
            raise ValueError(self._missing(entry, record))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        draft, start = self._draft(), time.perf_counter()
        try:
            make(draft)
            files = {path.name: file_digest(path) for path in sorted(draft.iterdir())}
            (draft / RECORD).write_text(json.dumps({**record, "files": files}, indent=2) + "\n", "utf-8")
            self._publish(draft, target, record)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self.made_s[entry.name] = time.perf_counter() - start
        return target

    def _publish(self, draft: Path, target: Path, record: Mapping[str, Any]) -> None:
        """Give a finished draft its name, unless another process was faster."""
        if self.reuse == "no" and target.is_dir():
            old = self._draft()
            target.replace(old)
            shutil.rmtree(old)
        try:
            draft.replace(target)
        except OSError:  # a directory that is not empty cannot be replaced
            check(target, record)

    def _draft(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{platform.node()}-{os.getpid()}-", dir=self.folder))

    def _sweep(self) -> None:
        """Remove drafts of processes that were killed on this machine."""
        mine = f"{_DRAFT}{platform.node()}-"
        for path in self.folder.glob(f"{mine}*"):
            if not _alive(int(path.name.removeprefix(mine).partition("-")[0])):
                shutil.rmtree(path, ignore_errors=True)

    def _missing(self, entry: Entry, record: Mapping[str, Any]) -> str:
        """Why nothing fits: what there is instead, or what differs in the nearest."""
        said = f"{self.folder} holds no compiled {entry.name}"
        found = [read(path.parent) for path in sorted(self.folder.glob(f"[!.]*/{RECORD}"))]
        others = [other for other in found if other.get("entry") == entry.name]
        if not others:
            names = sorted({str(other.get("entry")) for other in found})
            there = f"; there are {', '.join(names)}" if names else ""
            return f"{said}, and nothing may be compiled (reuse=only){there}"
        away = [[key for key in record if other.get(key) != record[key]] for other in others]
        keys, other = min(zip(away, others, strict=True), key=lambda pair: len(pair[0]))
        told = "; ".join(f"{key} is {_short(other.get(key))}, here {_short(record[key])}" for key in keys)
        return f"{said} that fits, and nothing may be compiled (reuse=only): {told}"


def read(folder: Path) -> dict[str, Any]:
    """The record of an artefact.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no artefact of vlmqual: {RECORD} cannot be read: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise ValueError(f"{folder} is no artefact of vlmqual: {RECORD} names no files")
    return record


def check(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse an artefact that is not what was asked for, or not whole.

    Raises:
        ValueError: names the file, or what differs.
    """
    record = read(folder)
    for key, value in wanted.items():
        if record.get(key) != value:
            raise ValueError(f"{folder}: {key} is {_short(record.get(key))}; here it has to be {_short(value)}")
    for name, known in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder}: {name} is missing; delete the directory and it is compiled again")
        if file_digest(path) != known:
            raise ValueError(f"{path} is truncated or was changed; delete the directory and it is compiled again")


@cache
def code() -> str:
    """Digest of the source that defines what entries compute."""
    here = Path(__file__).parent
    names = ("cache", "configs", "entries", "graphs", "layers", "models", "paged", "weights")
    whole = hashlib.sha256()
    found = [path for name in names for path in (*here.glob(f"{name}.py"), *here.glob(f"{name}/*.py"))]
    for path in sorted(found):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def digest(record: Mapping[str, Any]) -> str:
    """Of a record's content."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def file_digest(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
