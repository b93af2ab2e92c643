"""Subjects: what the runs are about, how they are told apart, and the verdict line of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Any

from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK
from vlmqual_contract.records import Outcome, Run
from vlmqual_contract.requirement import LEVELS
from vlmqual_reports import waivers
from vlmqual_reports.conformance import counts, failed_requirements, has_expired
from vlmqual_reports.load import is_library, subject_key, why_incomplete

_MOST_DIFFERENCES = 3
_LONGEST_VALUE = 40


class State(StrEnum):
    """The word that a verdict line begins with, best first."""

    OK = "as required"
    MEASURED = "measured"  # only performance was run: nothing was required of it
    INCOMPLETE = "incomplete"
    FAILED = "failed"


_BEST_FIRST = tuple(State)


@dataclass(frozen=True)
class Judgement:
    """A verdict line: its state and the whole line, which begins with the state's word."""

    state: State
    line: str


@dataclass(frozen=True)
class Subject:
    """A target or library on one machine, with its newest runs.

    Attributes:
        title: target string or "library NAME", with what tells it from other subjects of the same name.
        judgement: its verdict line.
        runs: numbers of its runs in the list that it was made from.
        library: True for a library.
        calibration: True when it is what the goldens were made with, so that its passes prove nothing about it.
        emulated: True when no figure of it says anything about a device.
    """

    title: str
    judgement: Judgement
    runs: tuple[int, ...]
    library: bool
    calibration: bool
    emulated: bool


def subjects(runs: Sequence[Run], today: date) -> list[Subject]:
    """Group runs by what they are about, in the order of their first runs."""
    numbers: dict[tuple[str, ...], list[int]] = {}
    for number, run in enumerate(runs):
        numbers.setdefault(subject_key(run), []).append(number)
    firsts = [runs[group[0]] for group in numbers.values()]
    return [
        Subject(
            title=title,
            judgement=judge([runs[number] for number in group], today),
            runs=tuple(group),
            library=is_library(runs[group[0]]),
            calibration=any(is_calibration(runs[number]) for number in group),
            emulated=any(is_emulated(runs[number]) for number in group),
        )
        for title, group in zip(titles(firsts, plan=False), numbers.values(), strict=True)
    ]


def is_calibration(run: Run) -> bool:
    """True when the run's subject is the library version that made the goldens."""
    return run.header.plan.get("calibration") is True


def is_emulated(run: Run) -> bool:
    """True when the run's target is emulated or rehearsed."""
    return any(
        bool(place.get(key)) for place in (run.header.info, run.header.plan) for key in ("emulated", "rehearsal")
    )


def titles(runs: Sequence[Run], *, plan: bool = True) -> list[str]:
    """A name for each run: its subject, and where several share it, the facts in which they differ.

    Args:
        runs: of one kind.
        plan: let the plan tell runs apart too.
    """
    named: list[str] = []
    for run in runs:
        same = [other for other in runs if other.header.subject == run.header.subject]
        facts = [_facts(other, plan) for other in same]
        mine = _facts(run, plan)
        different = [key for key in mine if len({other.get(key, "") for other in facts}) > 1]
        parts = [f"{key} {_short(mine[key])}" for key in different[:_MOST_DIFFERENCES]]
        named.append(" · ".join([run.header.subject, *parts]))
    return named


def judge(runs: Sequence[Run], today: date) -> Judgement:
    """The verdict line over all runs of a subject: the worst state, and what led to it."""
    judged = [_judge_run(run, today) for run in runs]
    state = max((item.state for item in judged), key=_BEST_FIRST.index)
    if state in (State.OK, State.MEASURED):
        if all(item.state == State.MEASURED for item in judged):
            return Judgement(state, "measured; conformance was not run")
        known = sum(row.outcome == Outcome.EXPECTED_FAIL for run in runs for row in run.verdicts)
        waived = sum(waivers.is_waived(row) for run in runs for row in run.verdicts)
        apart = [_many(known, "expected failure")] if known else []
        apart += [f"{_many(waived, 'case')} by a waiver"] if waived else []
        line = f"as required, with {' and '.join(apart)}" if apart else "as required"
        parts = [part for run in runs if (part := _part_only(run))]
        whole = any(run.header.kind == "conformance" and not _part_only(run) for run in runs)
        if parts and not whole:
            line += f" as far as it was run: {'; '.join(parts)} only"
        return Judgement(State.OK, line)
    told = dict.fromkeys(item.line for item in sorted(judged, key=lambda item: -_BEST_FIRST.index(item.state)))
    return Judgement(state, "; ".join(line for line in told if line not in (State.OK, State.MEASURED)))


def exit_code(found: Sequence[Subject], problems: Sequence[str]) -> int:
    """1 when a verdict failed, 3 when something is incomplete or a file cannot be used, 0 otherwise."""
    states = {subject.judgement.state for subject in found}
    if State.FAILED in states:
        return EXIT_FAILED
    if State.INCOMPLETE in states or problems:
        return EXIT_INCOMPLETE
    return EXIT_OK


def headline(found: Sequence[Subject]) -> str:
    """How many subjects have which state, worst first."""
    numbers = {state: sum(subject.judgement.state == state for subject in found) for state in reversed(_BEST_FIRST)}
    told = ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
    return f"{_many(len(found), 'subject')}: {told}" if told else ""


def _judge_run(run: Run, today: date) -> Judgement:
    failures = _conformance_failures(run, today) if run.header.kind == "conformance" else _perf_failures(run)
    missing = _what_is_missing(run)
    if failures:
        line = f"failed: {', '.join(failures)}"
        return Judgement(State.FAILED, f"{line}; and incomplete: {missing}" if missing else line)
    if missing:
        return Judgement(State.INCOMPLETE, f"incomplete: {missing}")
    state = State.OK if run.header.kind == "conformance" else State.MEASURED
    return Judgement(state, str(state))


def _conformance_failures(run: Run, today: date) -> list[str]:
    parts = []
    if names := failed_requirements(run):
        parts.append(_many(len(names), "requirement"))
    bad = [row for row in run.verdicts if row.outcome in (Outcome.FAIL, Outcome.ERROR) and not row.requirements]
    if bad:
        parts.append(f"{_many(len(bad), 'case')} without a requirement")
    if expired := sum(has_expired(row, today) for row in run.verdicts):
        parts.append(f"{_many(expired, 'expected failure')} past expiry")
    if expired := sum(waivers.has_expired(row, today) for row in run.verdicts):
        parts.append(f"{_many(expired, 'case')} by a waiver past expiry")
    return parts


def _part_only(run: Run) -> str:
    """What a conformance run was narrowed down to, "" for a whole one."""
    if run.header.kind != "conformance":
        return ""
    levels, chosen = run.header.plan.get("levels"), run.header.plan.get("select") or ""
    parts = []
    if isinstance(levels, (list, tuple)) and set(levels) < set(LEVELS):
        parts.append(f"levels {', '.join(map(str, levels))}")
    if chosen:
        parts.append(f"cases that match {chosen}")
    return ", ".join(parts)


def _perf_failures(run: Run) -> list[str]:
    failed = sum(row.state == "failed" for row in run.measurements)
    return [_many(failed, "measurement")] if failed else []


def _what_is_missing(run: Run) -> str:
    if reason := why_incomplete(run):
        return f"{run.header.kind}: {reason}"
    if run.header.kind == "perf" and not run.measurements:
        return "no measurement was made"
    if run.header.kind == "conformance" and not set(counts(run.verdicts)) - {Outcome.NOT_APPLICABLE}:
        return "no case could be judged"
    return ""


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _facts(run: Run, plan: bool) -> dict[str, str]:
    header = run.header
    found = {name: header.info.get(name, "") for name in ("version", "device", "dtype")}
    found |= {name: header.machine.get(name, "") for name in ("host", "processor", "architecture")}
    if plan:
        found |= {str(key): value for key, value in header.plan.items() if key != "calibration"}  # has a badge
    return {key: _text(value) for key, value in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
