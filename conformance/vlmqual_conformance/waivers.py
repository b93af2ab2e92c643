"""Waivers: what a budget may be exceeded by, or what budgets may have become, why, and until when.

A file holds tables `[[waiver]]`, each with `reason` and `expires` (a date), and one of

- `case` (a case name in which `*` and `?` stand for anything, or a requirement id) and `budget` (above 1): the case
  passes as long as its errors stay within that many times the budget. `component` (a pattern, `*` where it is left out)
  and `dtype` (a list of compute dtypes) narrow it down. Such a pass is marked in the results and in every report.
- `golden` (a pattern such as `mllama/*`), `old` and `new`: derived budgets that differ from `budgets.lock`, with the
  digests that `python -m vlmqual_conformance.budgets --check` prints.

`waivers.toml` beside this module holds those of the suite, `--waivers FILE` names a user's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from vlmqual_conformance import patterns
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Verdict

OURS = Path(__file__).resolve().with_name("waivers.toml")
_SHARED = {"reason", "expires"}
_KINDS = {"case": _SHARED | {"case", "budget", "component", "dtype"}, "golden": _SHARED | {"golden", "old", "new"}}


@dataclass(frozen=True)
class Waiver:
    """One waiver.

    Attributes:
        reason: one sentence.
        expires: last day on which it holds.
        file: name of the file that it stands in.
        case: pattern of case names, or a requirement id; "" for a waiver of changed budgets.
        component: pattern of the components that may exceed their budgets.
        dtypes: compute dtypes in which they may, empty for all.
        budget: multiple of the budget that is lived with.
        golden: pattern of goldens whose budgets have changed; "" for a waiver of cases.
        old: digest of their budgets in the lock.
        new: digest of what they have become.
    """

    reason: str
    expires: date
    file: str
    case: str = ""
    component: str = "*"
    dtypes: tuple[str, ...] = ()
    budget: float = 1.0
    golden: str = ""
    old: str = ""
    new: str = ""

    def names(self, case: str, ids: Iterable[str]) -> bool:
        """True when it is about this case."""
        return bool(self.case) and patterns.names(self.case, case, ids)

    def allows(self, component: str, ratio: float, dtype: str) -> bool:
        """True when an error of this many times the budget is lived with."""
        fits = not self.dtypes or dtype in self.dtypes
        return fits and ratio <= self.budget and patterns.matches(self.component, component)

    def has_expired(self, today: date) -> bool:
        """True after the last day."""
        return self.expires < today

    def plain(self) -> dict[str, Any]:
        """As it stands in the header of a results file."""
        shown = {"case": self.case, "component": self.component, "dtype": list(self.dtypes), "budget": self.budget}
        about = shown if self.case else {"golden": self.golden}
        return {**about, "reason": self.reason, "expires": self.expires.isoformat(), "file": self.file}


def load(paths: Iterable[Path]) -> list[Waiver]:
    """Read files of waivers.

    Raises:
        UsageError: a file or a table in it is damaged.
    """
    return [_waiver(table, path.name) for path in paths for table in patterns.tables(path, "waiver", "waivers")]


def load_live(paths: Iterable[Path], today: date) -> list[Waiver]:
    """Read a user's files of waivers; all have to hold today.

    Raises:
        UsageError: a file is damaged, or a waiver has expired.
    """
    found = load(paths)
    for waiver in found:
        if waiver.has_expired(today):
            about = waiver.case or waiver.golden
            until = waiver.expires.isoformat()
            raise UsageError(
                f"{waiver.file}: the waiver of {about!r} expired on {until} ({waiver.reason}); renew or remove it"
            )
    return found


def _waiver(table: Mapping[str, Any], file: str) -> Waiver:
    given = [kind for kind in _KINDS if table.get(kind)]
    name = f"{file}: the waiver of {table.get('case') or table.get('golden') or 'nothing'!r}"
    if len(given) != 1:
        raise UsageError(f"{name} has to have one of case and golden")
    kind = given[0]
    if unknown := sorted(set(table) - _KINDS[kind]):
        raise UsageError(
            f"{name} has the unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KINDS[kind]))}"
        )
    for key in ("reason", kind, *(("old", "new") if kind == "golden" else ())):
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise UsageError(f"{name} lacks {key}, a string")
    if type(table.get("expires")) is not date:
        raise UsageError(f"{name} lacks expires, a date such as 2026-06-30")
    about = {
        key: table[key] for key in ("reason", "expires", "case", "component", "golden", "old", "new") if key in table
    }
    if kind == "golden":
        return Waiver(file=file, **about)
    budget, dtypes = table.get("budget"), table.get("dtype", [])
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 1:
        raise UsageError(f"{name} has budget {budget!r}; a multiple of the derived budget above 1 is valid")
    if not isinstance(dtypes, list) or not all(isinstance(dtype, str) for dtype in dtypes):
        raise UsageError(f"{name} has dtype {dtypes!r}; a list of names is valid")
    return Waiver(file=file, budget=float(budget), dtypes=tuple(dtypes), **about)


def is_used(verdict: Verdict) -> bool:
    """True when a case passed by a waiver only."""
    return "waiver" in verdict.details


def used(waived: Sequence[tuple[str, Waiver]]) -> dict[str, Any]:
    """What a verdict says of the waivers that it passed by; nothing where it needed none.

    Args:
        waived: components that exceeded their budgets, each with its waiver.
    """
    if not waived:
        return {}
    first = waived[0][1]
    components = [component for component, _ in waived]
    return {"waiver": first.reason, "waiver expires": first.expires.isoformat(), "waived": components}
