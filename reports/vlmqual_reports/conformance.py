"""Conformance: what became of every case, every requirement and every level, for each run.

The five outcomes are never added together. A requirement's outcome is the worst of its cases: error, fail,
expected-fail, pass, not-applicable. In a run that did not come to its end a pass is only "so far".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from vlmqual_contract.records import Outcome, Run, Verdict
from vlmqual_contract.requirement import LEVELS, Requirement
from vlmqual_reports.load import is_library
from vlmqual_reports.statements import Statements

WORST_FIRST = (Outcome.ERROR, Outcome.FAIL, Outcome.EXPECTED_FAIL, Outcome.PASS, Outcome.NOT_APPLICABLE)

SO_FAR = "so-far"  # passed, in a run that did not come to its end
NOT_RUN = "not-run"  # a requirement of this subject without a case in the run
ELSEWHERE = "elsewhere"  # a library's requirement in a target's run, or the other way round


@dataclass(frozen=True)
class Mark:
    """A requirement in one run.

    Attributes:
        status: an `Outcome` value, or "so-far", "not-run", "elsewhere".
        worst: largest error divided by budget over its cases, None where nothing is compared numerically.
        component: the tensor that `worst` belongs to.
        cases: number of its cases.
        reasons: distinct reasons of the cases that have the status, at most three.
    """

    status: str
    worst: float | None = None
    component: str = ""
    cases: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A requirement over all runs, in the order of the runs."""

    id: str
    statement: str
    keyword: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Level:
    """One level of one family.

    Attributes:
        family: `model_type`.
        name: the level.
        counts: for each run the number of cases of each outcome that occurs.
        rows: its requirements, by id.
    """

    family: str
    name: str
    counts: tuple[Mapping[str, int], ...]
    rows: tuple[Row, ...]

    @property
    def failing(self) -> int:
        """Number of requirements that failed or ended in an error in at least one run."""
        return sum(any(mark.status in (Outcome.FAIL, Outcome.ERROR) for mark in row.marks) for row in self.rows)


@dataclass(frozen=True)
class Group:
    """Cases of one run that share outcome, reason and expiry.

    Attributes:
        run: number of the run.
        reason: why, in one sentence.
        expires: ISO date after which a known failure is one, "" where none is given.
        expired: True when that day has passed.
        cases: the verdicts.
        requirements: ids that they check, sorted.
    """

    run: int
    reason: str
    cases: tuple[Verdict, ...]
    requirements: tuple[str, ...]
    expires: str = ""
    expired: bool = False


@dataclass(frozen=True)
class Conformance:
    """Everything that the page says about conformance; tuples go in the order of `runs`."""

    runs: tuple[Run, ...]
    levels: tuple[Level, ...]
    groups: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)

    def not_run(self, number: int) -> list[str]:
        """Ids of the requirements without a case in a run."""
        return [row.id for level in self.levels for row in level.rows if row.marks[number].status == NOT_RUN]


def summarize(runs: Sequence[Run], statements: Statements, today: date) -> Conformance:
    """Bring runs of conformance and requirement files together.

    Args:
        runs: conformance runs, complete or not.
        statements: the requirements that are known here.
        today: the day against which expiries are judged.
    """
    groups = {
        str(outcome): tuple(group for number, run in enumerate(runs) for group in _groups(number, run, outcome, today))
        for outcome in WORST_FIRST
        if outcome != Outcome.PASS
    }
    return Conformance(tuple(runs), tuple(_levels(runs, statements)), groups)


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Number of cases of each outcome that occurs, worst first."""
    found = dict.fromkeys((str(outcome) for outcome in WORST_FIRST), 0)
    for verdict in verdicts:
        found[str(verdict.outcome)] += 1
    return {outcome: number for outcome, number in found.items() if number}


def expiry(verdict: Verdict) -> str:
    """The day until which a known failure is accepted, as written in the verdict; "" where none is given."""
    return str(verdict.details.get("expires") or verdict.details.get("expiry") or "")


def has_expired(verdict: Verdict, today: date) -> bool:
    """True for a known failure that was accepted until a day before `today`."""
    try:
        return verdict.outcome == Outcome.EXPECTED_FAIL and date.fromisoformat(expiry(verdict)[:10]) < today
    except ValueError:
        return False


def failed_requirements(run: Run) -> list[str]:
    """Ids with a case that failed or ended in an error, sorted."""
    bad = (Outcome.FAIL, Outcome.ERROR)
    return sorted({name for row in run.verdicts if row.outcome in bad for name in row.requirements})


def tightest(run: Run) -> Verdict | None:
    """The passed case that came closest to its budget, None where nothing is compared numerically."""
    passed = [row for row in run.verdicts if row.outcome == Outcome.PASS and row.worst is not None]
    return max(passed, key=lambda row: row.worst or 0.0, default=None)


def precisions(run: Run) -> tuple[tuple[str, str], ...]:
    """What the target seems to compute in: families and sentences, as the precision detective wrote them down."""
    seems = ((row.family, row.details.get("precision")) for row in run.verdicts)
    return tuple((family, str(found.get("says", ""))) for family, found in seems if isinstance(found, Mapping))


def families(run: Run) -> set[str]:
    """Families that a run covers: those of its plan and those of its cases."""
    planned = run.header.plan.get("families", ())
    names = [planned] if isinstance(planned, str) else planned if isinstance(planned, Sequence) else []
    return {str(name) for name in names} | {row.family for row in run.verdicts}


def _levels(runs: Sequence[Run], statements: Statements) -> list[Level]:
    covered = set().union(*(families(run) for run in runs))
    known = {name: item for name, item in statements.by_id.items() if item.family in covered}
    places: dict[str, tuple[str, str]] = {name: (item.family, item.level) for name, item in known.items()}
    by_id: list[dict[str, list[Verdict]]] = [{} for _ in runs]
    names: set[tuple[str, str]] = set(places.values())
    for number, run in enumerate(runs):
        for verdict in run.verdicts:
            names.add((verdict.family, verdict.level))
            for name in verdict.requirements:
                places.setdefault(name, (verdict.family, verdict.level))
                by_id[number].setdefault(name, []).append(verdict)
    levels = []
    for family, name in sorted(names, key=_level_order):
        rows = tuple(
            Row(
                id=id_,
                statement=statements.text(id_),
                keyword=known[id_].keyword if id_ in known else "",
                marks=tuple(
                    _mark(run, cases.get(id_, []), known.get(id_)) for run, cases in zip(runs, by_id, strict=True)
                ),
            )
            for id_ in sorted(places)
            if places[id_] == (family, name)
        )
        numbers = tuple(
            counts(row for row in run.verdicts if (row.family, row.level) == (family, name)) for run in runs
        )
        levels.append(Level(family, name, numbers, rows))
    return levels


def _level_order(place: tuple[str, str]) -> tuple[str, int, str]:
    family, level = place
    return (family, LEVELS.index(level) if level in LEVELS else len(LEVELS), level)


def _mark(run: Run, cases: Sequence[Verdict], requirement: Requirement | None) -> Mark:
    if not cases:
        return _mark_without_cases(run, requirement)
    outcome = next(outcome for outcome in WORST_FIRST if any(case.outcome == outcome for case in cases))
    measured = [case for case in cases if case.worst is not None]
    worst = max(measured, key=lambda case: case.worst or 0.0, default=None)
    reasons = dict.fromkeys(case.reason for case in cases if case.outcome == outcome and case.reason)
    return Mark(
        status=SO_FAR if outcome == Outcome.PASS and not run.complete else str(outcome),
        worst=worst.worst if worst else None,
        component=worst.component if worst else "",
        cases=len(cases),
        reasons=tuple(reasons)[:3],
    )


def _mark_without_cases(run: Run, requirement: Requirement | None) -> Mark:
    if requirement is None or requirement.family not in families(run):
        return Mark(NOT_RUN)
    if requirement.subject != ("library" if is_library(run) else "target"):
        return Mark(ELSEWHERE)
    return Mark(NOT_RUN, reasons=(requirement.untested,) if requirement.untested else ())


def _groups(number: int, run: Run, outcome: Outcome, today: date) -> list[Group]:
    shared: dict[tuple[str, ...], list[Verdict]] = {}
    for row in run.verdicts:
        if row.outcome == outcome:
            # A failure stands alone; a hundred cases that lack one capability are one line.
            alone = row.case if outcome in (Outcome.FAIL, Outcome.ERROR) else ""
            shared.setdefault((alone, row.reason, expiry(row)), []).append(row)
    return [
        Group(
            run=number,
            reason=reason,
            cases=tuple(cases),
            requirements=tuple(sorted({name for case in cases for name in case.requirements})),
            expires=until,
            expired=has_expired(cases[0], today),
        )
        for (_, reason, until), cases in shared.items()
    ]


def observed(verdict: Verdict) -> dict[str, Any]:
    """What a verdict recorded beside its reason, without expiry and precision, which are shown in their own places."""
    return {key: value for key, value in verdict.details.items() if key not in ("expires", "expiry", "precision")}
