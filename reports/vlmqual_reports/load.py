"""From directories and files to the runs that a page is about.

Of every run that was made again (same kind, subject, plan, version, device, dtype and machine) the newest one counts;
the older ones are only listed. A file that is damaged or was never finished is kept and says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Measurement, Run, Verdict, read
from vlmqual_reports import gates, proofs, selfchecks
from vlmqual_reports.gates import Gate
from vlmqual_reports.proofs import Proof
from vlmqual_reports.selfchecks import SelfCheck

_STATES = ("valid", "too-few", "noisy", "not-steady", "throttled", "wrong-bucket", "failed")


@dataclass(frozen=True)
class Results:
    """What was found.

    Attributes:
        newest: the runs that the page is about, conformance first, by subject.
        older: runs that a newer one replaces, newest first.
        problems: one sentence for every file that cannot be used.
        proofs: what `vlmqual proof` found, in the order in which they were named.
        gates: what `vlmqual gate` found, likewise.
        checks: what `vlmqual perf --self-check` found, likewise.
    """

    newest: tuple[Run, ...]
    older: tuple[Run, ...] = ()
    problems: tuple[str, ...] = ()
    proofs: tuple[Proof, ...] = ()
    gates: tuple[Gate, ...] = ()
    checks: tuple[SelfCheck, ...] = ()


def load(paths: Sequence[Path]) -> Results:
    """Read results files, and those that lie directly in directories; also `selfcheck.json` there, and `proof.json` and
    `gate.json` there or in `proof` and `gate` there.

    Raises:
        UsageError: a path does not exist, a directory holds no results file, or no file can be used.
    """
    found: list[Run] = []
    proven: list[Proof] = []
    gated: list[Gate] = []
    checks: list[SelfCheck] = []
    problems: list[str] = []
    for path in _files(paths):
        try:
            if path.name == gates.NAME:
                gated.append(gates.read(path))
            elif path.name == selfchecks.NAME:
                checks.append(selfchecks.read(path))
            elif path.suffix == ".json":
                proven.append(proofs.read(path))
            else:
                found.append(_checked(read(path)))
        except UsageError as error:
            problems.append(str(error))
    if not (found or proven or gated or checks):
        raise UsageError("; ".join(problems) or "no results file was named; name at least one directory of results")
    newest: dict[tuple[str, ...], Run] = {}
    older: list[Run] = []
    for run in sorted(found, key=_age, reverse=True):
        if newest.setdefault(_key(run), run) is not run:
            older.append(run)
    order = sorted(
        newest.values(), key=lambda run: (run.header.kind, is_library(run), run.header.subject, str(run.path))
    )
    return Results(tuple(order), tuple(older), tuple(problems), tuple(proven), tuple(gated), tuple(checks))


_SCOPE = ("families", "levels", "select", "scenarios", "phases", "tp", "checkpoint", "rehearsal")


def is_library(run: Run) -> bool:
    """True when the subject is a library, False when it is a target."""
    return run.header.subject.startswith("library ")


def subject_key(run: Run) -> tuple[str, ...]:
    """What makes two runs be about the same thing: subject, version, device, dtype, and the machine."""
    info = [str(run.header.info.get(name, "")) for name in ("version", "device", "dtype")]
    machine = [str(run.header.machine.get(name, "")) for name in ("host", "processor", "architecture")]
    return (run.header.subject, *info, *machine)


def why_incomplete(run: Run) -> str:
    """One clause that says why a run is incomplete, "" for a complete one."""
    if run.complete:
        return ""
    rows = len(run.verdicts) + len(run.measurements)
    parts = []
    if run.footer is None:
        parts.append(f"it was stopped or is still running after {_count(rows, 'row')}")
    if run.damaged:
        parts.append(f"{_count(run.damaged, 'line')} of its file cannot be read")
    if run.footer is not None and run.footer.rows != rows:
        parts.append(f"its footer counts {_count(run.footer.rows, 'row')}, its file has {rows}")
    return " and ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _files(paths: Iterable[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            whole = [path / proofs.NAME, path / "proof" / proofs.NAME, path / gates.NAME, path / "gate" / gates.NAME]
            inside = [*sorted(path.glob("*.jsonl")), *filter(Path.is_file, [*whole, path / selfchecks.NAME])]
            if not inside:
                raise UsageError(
                    f"results directory {path} holds no results file (*.jsonl, {proofs.NAME}, {gates.NAME})"
                )
        elif path.exists():
            inside = [path]
        else:
            raise UsageError(f"results directory {path} does not exist")
        for file in inside:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _key(run: Run) -> tuple[str, ...]:
    # What a run is about, not what it was made with: a later run of other fixtures or code replaces an earlier one.
    scope = {key: run.header.plan.get(key) for key in _SCOPE}
    return (run.header.kind, *subject_key(run), json.dumps(scope, sort_keys=True, default=str))


def _age(run: Run) -> tuple[str, bool, int, str]:
    # Two copies of one run, one of them taken while it was written: the fuller one counts.
    return (run.header.started, run.complete, len(run.verdicts) + len(run.measurements), str(run.path))


def _checked(run: Run) -> Run:
    """Take out rows whose values have the wrong type; they count as damaged lines."""
    header = run.header
    texts = (header.subject, header.suite, header.command, header.run, header.started)
    mappings = (header.info, header.machine, header.plan)
    if (
        header.kind not in ("conformance", "perf")
        or not all(isinstance(item, str) for item in texts)
        or not all(isinstance(item, Mapping) for item in mappings)
    ):
        raise UsageError(f"{run.path}: its header is damaged (a field has the wrong type)")
    verdicts = tuple(row for row in run.verdicts if _verdict_is_sound(row))
    measurements = tuple(row for row in run.measurements if _measurement_is_sound(row))
    lost = len(run.verdicts) + len(run.measurements) - len(verdicts) - len(measurements)
    return replace(run, verdicts=verdicts, measurements=measurements, damaged=run.damaged + lost)


def _verdict_is_sound(row: Verdict) -> bool:
    texts = (row.case, row.family, row.level, row.reason, row.component, row.dtype, *row.requirements)
    return (
        all(isinstance(item, str) for item in texts)
        and (row.worst is None or _is_number(row.worst))
        and isinstance(row.details, Mapping)
    )


def _measurement_is_sound(row: Measurement) -> bool:
    texts = (row.case, row.scenario, row.family, row.phase, row.dtype, row.reason, row.tokens_digest)
    return (
        all(isinstance(item, str) for item in texts)
        and row.state in _STATES
        and all(isinstance(item, int) and item > 0 for item in (row.tp, row.batch))
        and all(_is_number(value) and value >= 0 for repetition in row.values_s for value in repetition)
        and isinstance(row.shape, Mapping)
        and isinstance(row.checks, Mapping)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
