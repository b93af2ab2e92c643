"""Launches that were made earlier, of one target on one machine: a baseline file, or results of `vlmqual perf`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmqual_contract import records
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Run
from vlmqual_perf import baselines
from vlmqual_perf.gate_launches import Launch, Name, reading

#: What makes two machines differ; other facts are reported only.
MACHINE = ("host", "architecture", "processor", "cores", "memory_bytes")
#: What is asked of a target before it is compared: other values may be the very change that is looked for.
_INFO = ("version", "device", "runtime", "dtype")


@dataclass(frozen=True)
class Recorded:
    """One side of a comparison that is on disk.

    Attributes:
        name: "A" is the baseline, "B" the candidate.
        source: the file or folder.
        subject: target string.
        info: what the target said of itself.
        machine: where it ran.
        fixtures: digest of the fixtures.
        plan: threads and, of a baseline file, how its launches were made.
        launches: with `arm` set to `name`.
        digest: of a baseline file, else "".
        signer: public key that vouches for it, "" for none.
    """

    name: Name
    source: Path
    subject: str
    info: Mapping[str, Any]
    machine: Mapping[str, Any]
    fixtures: str
    plan: Mapping[str, Any]
    launches: tuple[Launch, ...]
    digest: str = ""
    signer: str = ""


def read(name: Name, source: Path, trust: Path | None) -> Recorded:
    """Read what was recorded.

    Args:
        name: which side it is.
        source: a baseline file (.json), a results file of `vlmqual perf` (.jsonl; one launch), or a folder of those
            (each of them a launch).
        trust: public key that has to have signed it; results files are never signed.

    Raises:
        UsageError: it cannot be read, is not trusted, or a folder holds results of several targets or machines.
    """
    if source.suffix == ".json":
        found = baselines.read(source, trust)
        return Recorded(
            name=name,
            source=source,
            subject=found.subject,
            info=found.info,
            machine=found.machine,
            fixtures=found.fixtures,
            plan=found.plan,
            launches=tuple(replace(one, arm=name) for one in found.launches),
            digest=found.digest,
            signer=found.signer,
        )
    if trust is not None:
        raise UsageError(f"{source} cannot be signed; --trust {trust} asks for a baseline file")
    runs = list(records.runs(source)) if source.is_dir() else [records.read(source)]
    chosen = [run for run in runs if run.header.kind == "perf" and run.measurements]
    if not chosen:
        raise UsageError(f"{source} holds no measurements of `vlmqual perf`")
    first = chosen[0].header
    for run in chosen:
        if run.header.subject != first.subject:
            raise UsageError(f"{source} holds results of {first.subject} and of {run.header.subject}; name one of them")
        if found_differs := differences(first.machine, run.header.machine, MACHINE):
            raise UsageError(f"{source} holds results of several machines ({'; '.join(found_differs)})")
    return Recorded(
        name=name,
        source=source,
        subject=first.subject,
        info=first.info,
        machine=first.machine,
        fixtures=str(first.plan.get("fixtures", "")),
        plan={key: first.plan[key] for key in ("threads",) if key in first.plan},
        launches=tuple(launch for index, run in enumerate(chosen) for launch in _launches(name, index, run)),
    )


def _launches(name: Name, index: int, run: Run) -> list[Launch]:
    """A results file as launches, one for each tensor-parallel size."""
    sizes = dict.fromkeys(row.tp for row in run.measurements)
    return [
        Launch(
            arm=name,
            tp=size,
            block=index,
            place=0,
            began=run.header.started,
            wall_s=0.0,
            cells={row.case: reading(row) for row in run.measurements if row.tp == size},
        )
        for size in sizes
    ]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """One clause for everything that differs between two descriptions."""
    keys = names if names is not None else sorted({*a, *b})
    return [f"{key}: {a.get(key)!r} and {b.get(key)!r}" for key in keys if a.get(key) != b.get(key)]


def told(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What two targets say differently of themselves."""
    return differences(a, b, _INFO)
