"""Waivers: budgets that a run was allowed to exceed or had changed, why, until when, and which cases needed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from vlmqual_contract.records import Run, Verdict


@dataclass(frozen=True)
class Waiver:
    """A waiver that a run was made with.

    Attributes:
        run: number of the run.
        about: the cases that may exceed their budgets, or the goldens whose budgets were changed, as patterns.
        allows: what it allows, in words.
        reason: why, in one sentence.
        expires: last day, in ISO form, "" where the file does not say.
        expired: True when that day has passed.
        cases: those that passed by it only.
    """

    run: int
    about: str
    allows: str
    reason: str
    expires: str
    expired: bool
    cases: tuple[Verdict, ...]


def waivers(runs: Sequence[Run], today: date) -> tuple[Waiver, ...]:
    """The waivers of all runs, in the order of the runs.

    Args:
        runs: conformance runs.
        today: the day against which expiries are judged.
    """
    return tuple(_waiver(number, run, entry, today) for number, run in enumerate(runs) for entry in _listed(run))


def is_waived(verdict: Verdict) -> bool:
    """True for a case that passed by a waiver only."""
    return bool(verdict.details.get("waiver"))


def has_expired(verdict: Verdict, today: date) -> bool:
    """True for a case that passed by a waiver that has expired since."""
    return is_waived(verdict) and _past(str(verdict.details.get("waiver expires", "")), today)


def _listed(run: Run) -> list[Mapping[str, Any]]:
    listed = run.header.plan.get("waivers")
    return [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []


def _waiver(number: int, run: Run, entry: Mapping[str, Any], today: date) -> Waiver:
    reason, expires = str(entry.get("reason", "")), str(entry.get("expires", ""))
    about = str(entry.get("case") or entry.get("golden") or "")
    mine = (reason, expires)
    used = (row for row in run.verdicts if is_waived(row))
    return Waiver(
        run=number,
        about=about,
        allows=_allows(entry),
        reason=reason,
        expires=expires,
        expired=_past(expires, today),
        cases=tuple(row for row in used if (row.details["waiver"], row.details.get("waiver expires")) == mine),
    )


def _allows(entry: Mapping[str, Any]) -> str:
    if not entry.get("case"):
        return "budgets that were changed"
    component, dtypes = str(entry.get("component", "*")), entry.get("dtype") or ()
    within = "" if component == "*" else f" at {component}"
    only = f" in {', '.join(map(str, dtypes))}" if isinstance(dtypes, list) and dtypes else ""
    return f"{entry.get('budget', '?')} times the budget{within}{only}"


def _past(expires: str, today: date) -> bool:
    try:
        return date.fromisoformat(expires) < today
    except ValueError:
        return False
