"""A reference on disk: one golden file for each prompt, and `reference.json`, which is written when all is there.

Arrays have the names of golden files (see `vlmqual_adapters.goldens`), in float32: `inputs/NAME`, `features/NAME`,
`prefill/logits` (1, V), `decode/tokens` (steps, 1), `decode/logits` (steps, 1, V), `arms/tensors`, `arms/DTYPE`,
`arms/DTYPE/errors`, `noise/DTYPE/TENSOR` and `meta`; beside them `noise/DTYPE/prefill/largest` and
`noise/DTYPE/decode/largest`, the largest difference of a single logit. Files appear whole or not at all, so an
interrupted run goes on with what it finds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array
from vlmqual_reference.passes import CHAIN, LOGITS, ROUNDING

RECORD = "reference.json"
FORMAT = 1


@dataclass
class Entry:
    """What is known of one prompt.

    Attributes:
        name: of the prompt.
        key: digest of all that decides its numbers but the arms.
        about: goes into `meta`.
        gold: tensors by name, with `inputs/NAME`; empty while it has not been run.
        errors: dtype to arm to tensor to its error against gold.
    """

    name: str
    key: str
    about: Mapping[str, Any]
    gold: dict[str, Array] = field(default_factory=dict)
    errors: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Array]:
        """The processor's tensors."""
        start = "inputs/"
        return {name.removeprefix(start): value for name, value in self.gold.items() if name.startswith(start)}

    def arrays(self) -> dict[str, Array]:
        """Everything as it stands in the file."""
        made: dict[str, Array] = dict(self.gold)
        judged = sorted(name for name in made if name != "decode/tokens" and not name.startswith("inputs/"))
        judged += [CHAIN] if any(name.startswith("features/") for name in judged) else []
        judged += LOGITS.values()
        made["arms/tensors"] = np.array(judged)
        for dtype, arms in self.errors.items():
            table = np.array([[found[name] for name in judged] for found in arms.values()])
            made[f"arms/{dtype}"] = np.array(list(arms))
            made[f"arms/{dtype}/errors"] = table
            noise = {name: max(float(worst), ROUNDING[dtype]) for name, worst in zip(judged, table.max(0), strict=True)}
            # A target in float64 is as far from gold as gold is from the truth.
            for kind in (dtype, "float64") if dtype == "float32" else (dtype,):
                made |= {f"noise/{kind}/{name}": np.array(value) for name, value in noise.items()}
        made["meta"] = np.array(json.dumps({**self.about, "case": self.name, "key": self.key}))
        return made


class Folder:
    """Holds a reference, or a part of one.

    Args:
        path: of the folder; it is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """Where the golden file of a prompt stands."""
        return self.path / f"{name}.npz"

    def record(self) -> dict[str, Any] | None:
        """What `reference.json` says; None where there is none, or one that cannot be read."""
        try:
            found = json.loads((self.path / RECORD).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("format") == FORMAT else None

    def claim(self, checkpoint: str) -> None:
        """Make the folder.

        Args:
            checkpoint: its digest.

        Raises:
            UsageError: it holds the reference of another checkpoint, or cannot be made.
        """
        said = self.record()
        if said is not None and said["checkpoint"]["digest"] != checkpoint:
            raise UsageError(f"{self.path} holds the reference of another checkpoint; choose another --output")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {self.path}: {error.strerror}") from error

    def is_whole(self, record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
        """Whether a record answers what is asked for, and every file is what it says."""
        return all(record.get(name) == value for name, value in wanted.items()) and all(
            self.file(name).is_file() and sha256(self.file(name)) == digest for name, digest in record["files"].items()
        )

    def fill(self, entry: Entry) -> None:
        """Take over what an earlier run left of an entry."""
        try:
            with self.file(entry.name).open("rb") as raw, np.load(raw) as file:
                if json.loads(str(file["meta"])).get("key") != entry.key:
                    return
                names = [str(name) for name in file["arms/tensors"]]
                prefixes = ("noise/", "arms/", "meta")
                entry.gold = {name: file[name] for name in file.files if not name.startswith(prefixes)}
                for dtype in ROUNDING:
                    if f"arms/{dtype}" in file.files:
                        rows = zip(file[f"arms/{dtype}"], file[f"arms/{dtype}/errors"], strict=True)
                        entry.errors[dtype] = {str(a): dict(zip(names, map(float, e), strict=True)) for a, e in rows}
        except (OSError, ValueError, KeyError, BadZipFile):
            entry.gold, entry.errors = {}, {}  # none, or damaged: made again

    def write(self, entry: Entry) -> None:
        """Write an entry's file."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = entry.arrays()
        np.savez_compressed(buffer, **arrays)
        _replace(self.file(entry.name), buffer.getvalue())

    def finish(self, record: Mapping[str, Any], names: Iterable[str]) -> None:
        """Write `reference.json` and remove golden files that it does not name."""
        files = {name: sha256(self.file(name)) for name in names}
        text = json.dumps({"format": FORMAT, **record, "files": files}, indent=2) + "\n"
        _replace(self.path / RECORD, text.encode())
        for path in self.path.glob("*.npz"):
            if path.stem not in files:
                path.unlink()

    def reopen(self) -> None:
        """Remove `reference.json`, since files will change."""
        (self.path / RECORD).unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
