"""A user's own checkpoint in the place of the fixtures, with or without a reference that `vlmqual reference` made."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vlmqual_conformance.goldens import Golden
from vlmqual_contract import checkpoint
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Verdict
from vlmqual_contract.target import Model, Prompt

RECORD = "reference.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Reference:
    """A finished reference.

    Attributes:
        folder: that holds it.
        digest: of its record, which holds the digests of its files.
        record: content of its `reference.json`.
    """

    folder: Path
    digest: str
    record: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its prompts."""
        return tuple(self.record["files"])

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Compute dtypes that it has the noise of."""
        return (*self.record["arms"], "float64")

    @property
    def maker(self) -> tuple[str, str]:
        """Name and version of the library that made it."""
        return self.record["maker"]["name"], self.record["maker"]["version"]

    def golden(self, name: str) -> Golden:
        """The golden of a prompt, all of it in memory.

        Raises:
            UsageError: its file is missing, or not the one that was written.
        """
        path = self.folder / f"{name}.npz"
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != self.record["files"][name]:
                raise UsageError(f"{path} was changed since the reference was made; make the reference again")
            with np.load(io.BytesIO(data)) as file:
                arrays = {key: file[key] for key in file.files}
        except (OSError, ValueError, BadZipFile) as error:
            raise UsageError(f"{path}: {error}; make the reference again") from error
        return Golden(self.record["family"], name, frozenset(arrays), arrays)

    def prompt(self, name: str) -> Prompt | None:
        """A prompt with its image files, None where one of them is gone or was changed."""
        (about,) = (item for item in self.record["prompts"] if item["name"] == name)
        paths = [Path(path) for path in self.record["paths"][name]]
        for path, image in zip(paths, about["images"], strict=True):
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != image["sha256"]:
                return None
        return Prompt(about["text"], tuple(map(str, paths)))

    @cached_property
    def longest(self) -> int:
        """Cache positions of its longest prompt and all of its steps."""
        goldens = (self.golden(name) for name in self.names)
        return max(int(golden.mask.shape[1]) + len(golden.tokens) for golden in goldens)


def told(verdicts: Iterable[Verdict]) -> list[str]:
    """One line for each prompt: its smallest margin, and where greedy tokens part from the reference's."""
    margins: dict[str, str] = {}
    parts: dict[str, str] = {}
    for row in verdicts:
        name = row.case.partition("[")[2].rstrip("]")
        if found := row.details.get("margins"):
            gold, own = ([value for step in found[side] for value in step] for side in ("reference", "target"))
            least = gold.index(min(gold))
            margins[name] = f"smallest margin {gold[least]:.3g} at token {least}, the target's {own[least]:.3g}; "
        if "divergence" in row.details:
            place = row.details["divergence"]
            parts[name] = "the same greedy tokens" if place is None else _parting(place)
    return [f"  {name}: {margins.get(name, '')}{said}" for name, said in parts.items()]


def _parting(place: Mapping[str, Any]) -> str:
    return (
        f"parts at token {place['step']}, where the margin is {place['margin']:.3g} and {place['limit']:.3g} is noise"
    )


def read(folder: Path) -> Reference:
    """A finished reference.

    Raises:
        UsageError: there is none, it is not finished, damaged, or of another format.
    """
    path = folder / RECORD
    try:
        data = path.read_bytes()
    except OSError as error:
        some = "; one is begun, and the same `vlmqual reference` goes on with it" if [*folder.glob("*.npz")] else ""
        raise UsageError(f"--reference {folder}: there is no finished reference in it{some}") from error
    try:
        record = json.loads(data)
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UsageError(f"{path} is no reference of format {FORMAT}")
    wanted = {
        "family": str,
        "checkpoint": dict,
        "maker": dict,
        "arms": dict,
        "files": dict,
        "prompts": list,
        "paths": dict,
    }
    if damaged := [name for name, kind in wanted.items() if not isinstance(record.get(name), kind)]:
        raise UsageError(f"{path} is damaged: it lacks {damaged[0]}")
    return Reference(folder, hashlib.sha256(data).hexdigest(), record)


@dataclass(frozen=True)
class Over:
    """What a run over a user's checkpoint is about.

    Attributes:
        model: the checkpoint and its family.
        digest: of the checkpoint.
        reference: what targets are judged by, None for relations alone.
    """

    model: Model
    digest: str
    reference: Reference | None = None

    @property
    def paths(self) -> dict[str, str]:
        """Where checkpoint and reference are, "" for no reference."""
        folder = str(self.reference.folder.resolve()) if self.reference else ""
        return {"checkpoint": self.model.path, "reference": folder}

    @property
    def name(self) -> str:
        """As reports show it."""
        return f"checkpoint {Path(self.model.path).name} ({self.digest[:8]})"


def over(directory: Path | None, folder: Path | None) -> Over | None:
    """What a run is over, from its options; None for the fixtures.

    Args:
        directory: the checkpoint; None for the one that the reference was made of.
        folder: of the reference, or None.

    Raises:
        UsageError: one of them is not there or damaged, or the checkpoint is not the one of the reference.
    """
    if directory is None and folder is None:
        return None
    reference = None if folder is None else read(folder)
    place = directory
    if place is None:
        assert reference is not None, "there is one of the two"
        place = Path(str(reference.record["checkpoint"].get("path")))
        if not place.is_dir():
            raise UsageError(f"the checkpoint {place} of reference {folder} is gone; --checkpoint says where it is now")
    family, digest = checkpoint.family(place), checkpoint.digest(place)
    if reference is not None and reference.record["checkpoint"].get("digest") != digest:
        raise UsageError(f"--checkpoint {place} is not the checkpoint that {folder} is the reference of")
    return Over(Model(str(place.resolve()), family), digest, reference)
