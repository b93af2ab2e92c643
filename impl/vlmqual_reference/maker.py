"""Makes a reference: gold for every prompt in float32, then arms in every dtype, block by block."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmqual_contract.discovery import LIBRARIES, code_digest, installed
from vlmqual_contract.errors import UsageError
from vlmqual_contract.questions import Question
from vlmqual_contract.target import Model, Options
from vlmqual_impl.target import checked, package_version
from vlmqual_impl.target_session import EagerSession
from vlmqual_impl.weights import unfilled
from vlmqual_reference.arms import PLAIN, Arm, arms
from vlmqual_reference.folder import FORMAT, Entry, Folder, sha256
from vlmqual_reference.lockstep import Lockstep, Run, together
from vlmqual_reference.passes import errors, walk
from vlmqual_reference.shelf import Shelf

GOLD = "float32"
MAKER = "vlmqual_impl"


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        directory: of the checkpoint.
        family: its `model_type`.
        digest: of the checkpoint.
        prompts: with names.
        steps: decode steps after each prompt.
        dtypes: that noise is wanted of.
        arms: so many of each dtype.
        memory: bytes that weights may take at most.
        together: prompts that go through the model at one time.
    """

    directory: Path
    family: str
    digest: str
    prompts: Sequence[Question]
    steps: int
    dtypes: Sequence[str]
    arms: int
    memory: int
    together: int

    def record(self) -> dict[str, Any]:
        """What a finished reference of this checkpoint has to say to be this one; JSON."""
        return {
            "family": self.family,
            "maker": {"name": MAKER, "version": package_version("vlmqual"), "code": _code()},
            "dtype": GOLD,
            "steps": self.steps,
            "arms": {dtype: [arm.name for arm in arms(dtype, self.arms)] for dtype in self.dtypes},
            "prompts": [_about(item) for item in self.prompts],
        }


def _code() -> str:
    return code_digest(MAKER) if MAKER in installed(LIBRARIES) else ""


def _about(item: Question) -> dict[str, Any]:
    images = [{"file": Path(path).name, "sha256": sha256(Path(path))} for path in item.prompt.images]
    return {"name": item.name, "text": item.prompt.text, "images": images}


@dataclass(frozen=True)
class Told:
    """What a maker says while it works.

    Attributes:
        stage: called with words and the number of blocks before each group of prompts.
        block: called with the block's name and the number of runs after each block.
    """

    stage: Callable[[str, int], None]
    block: Callable[[str, int], None]


def make(wanted: Wanted, folder: Folder, told: Told) -> bool:
    """Make what is missing; False when everything was there.

    Raises:
        UsageError: the checkpoint or a prompt cannot be used, or the bound of memory is too low.
    """
    folder.claim(wanted.digest)
    record = wanted.record()
    if (said := folder.record()) is not None and folder.is_whole(said, record):
        return False
    start = time.monotonic()
    entries = [_entry(wanted, item) for item in wanted.prompts]
    for entry in entries:
        folder.fill(entry)
    folder.reopen()
    work = _Work(wanted, folder, told)
    fresh = [(entry, item) for entry, item in zip(entries, wanted.prompts, strict=True) if not entry.gold]
    if fresh:
        work.gold(fresh)
    for dtype in wanted.dtypes:
        work.noise(dtype, entries)
    folder.finish(
        {
            **record,
            "checkpoint": {"path": str(wanted.directory.resolve()), "digest": wanted.digest},
            "software": {name: package_version(name) for name in ("torch", "safetensors", "transformers", "numpy")},
            "paths": {item.name: [str(Path(path).resolve()) for path in item.prompt.images] for item in wanted.prompts},
            "together": wanted.together,
            "memory_bytes": wanted.memory,
            "peak_bytes": peak_bytes(),
            "read_bytes": work.read_bytes,
            "seconds": round(time.monotonic() - start, 1),
        },
        [entry.name for entry in entries],
    )
    return True


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _entry(wanted: Wanted, item: Question) -> Entry:
    about = _about(item)
    decides = [FORMAT, wanted.digest, about, wanted.steps, package_version("vlmqual"), _code(), torch.__version__]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    rows = [{"text": item.prompt.text, "images": [image["file"] for image in about["images"]]}]
    meta = {"title": item.name, "family": wanted.family, "checkpoint": wanted.directory.name, "rows": rows}
    return Entry(item.name, key, {**meta, "padding_side": "left", "steps": wanted.steps})


class _Work:
    """The passes through the model."""

    def __init__(self, wanted: Wanted, folder: Folder, told: Told) -> None:
        self._wanted = wanted
        self._folder = folder
        self._told = told
        self._last: Opened | None = None
        self._read_bytes = 0

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that were read so far."""
        return self._read_bytes + (self._last.shelf.read_bytes if self._last else 0)

    def _opened(self, dtype: str) -> Opened:
        """The checkpoint in a dtype; weights of the dtype before are dropped first."""
        if self._last is None or self._last.dtype != dtype:
            self._read_bytes = self.read_bytes
            if self._last is not None:
                self._last.shelf.clear()
            self._last = None
            self._last = Opened(self._wanted, dtype, self._told)
        return self._last

    def gold(self, fresh: Sequence[tuple[Entry, Question]]) -> None:
        """Run prompts in float32, and keep each as soon as it is done."""
        opened = self._opened(GOLD)
        for group in together(fresh, self._wanted.together):
            self._told.stage(f"{GOLD}, {_names(entry for entry, _ in group)}", opened.blocks(self._wanted.steps + 1))
            runs = []
            for entry, item in group:
                inputs = opened.session(1).preprocess([item.prompt])
                entry.gold = {f"inputs/{name}": value for name, value in inputs.items()}
                session = opened.session(inputs["input_ids"].shape[1] + self._wanted.steps)
                runs.append(Run(partial(self._gold, session, entry), PLAIN.modes, partial(self._folder.write, entry)))
            opened.lockstep.go(runs)

    def _gold(self, session: EagerSession, entry: Entry) -> None:
        entry.gold |= walk(session, entry.inputs, self._wanted.steps)

    def noise(self, dtype: str, entries: Sequence[Entry]) -> None:
        """Run the arms of a dtype that entries lack."""
        chosen = arms(dtype, self._wanted.arms)
        for entry in entries:
            held = entry.errors.setdefault(dtype, {})
            entry.errors[dtype] = {arm.name: held[arm.name] for arm in chosen if arm.name in held}
        if not (lacking := [entry for entry in entries if len(entry.errors[dtype]) < len(chosen)]):
            return
        opened = self._opened(dtype)
        for group in together(lacking, self._wanted.together):
            self._told.stage(f"{dtype}, {_names(group)}", opened.blocks(self._wanted.steps + 2))
            runs = []
            for entry in group:
                session = opened.session(entry.inputs["input_ids"].shape[1] + self._wanted.steps)
                missing = [arm for arm in chosen if arm.name not in entry.errors[dtype]]
                ended = partial(self._ended, entry, dtype, len(chosen))
                runs += [Run(partial(self._arm, session, entry, dtype, arm), arm.modes, ended) for arm in missing]
            opened.lockstep.go(runs)

    def _arm(self, session: EagerSession, entry: Entry, dtype: str, arm: Arm) -> None:
        made = walk(session, entry.inputs, self._wanted.steps, entry.gold)
        try:
            entry.errors[dtype][arm.name] = errors(made, entry.gold)
        except ValueError as error:
            raise UsageError(f"{entry.name} in {dtype}: {error}; leave {dtype} out of --dtypes") from error

    def _ended(self, entry: Entry, dtype: str, count: int) -> None:
        if len(entry.errors[dtype]) == count:
            self._folder.write(entry)


class Opened:
    """A checkpoint opened in one dtype, its blocks still on disk.

    Attributes:
        dtype: its name.
        shelf: holds the weights.
        lockstep: takes runs through the model; the model runs in no other way.
    """

    def __init__(self, wanted: Wanted, dtype: str, told: Told) -> None:
        self.dtype = dtype
        directory, values, config, family = checked(Model(str(wanted.directory), wanted.family), Options())
        kind: torch.dtype = getattr(torch, dtype)
        try:
            config = family.prepared(config, values, directory)
            with unfilled():
                network = family.network(config)
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from error
        runtime = family.runtime(network.eval(), "sdpa")
        ends = (runtime.table, runtime.lm_head)
        self.shelf = Shelf(network, directory, rename=family.rename, dtype=kind, memory=wanted.memory, ends=ends)
        self.lockstep = Lockstep(self.shelf, lambda unit, runs: told.block(unit.name, runs))
        self._make = partial(EagerSession, runtime, family, family.features(config), directory)

    def session(self, length: int) -> EagerSession:
        """A session with so many cache positions."""
        return self._make(Options(max_length=length))

    def blocks(self, passes: int) -> int:
        """About how many blocks so many passes through the text model run, and one through the vision model."""
        vision = sum("vision" in unit.name or "resampler" in unit.name for unit in self.shelf.units)
        return vision + passes * (len(self.shelf.units) - vision)


def _names(entries: Iterable[Entry]) -> str:
    return ", ".join(entry.name for entry in entries)
