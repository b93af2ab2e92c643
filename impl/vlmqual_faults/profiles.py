"""What a device that shows less of itself would have been told, derived from the run with taps.

A narrower profile changes three things, and nothing in the implementation under test: cases that need what is not
offered are not applicable, hidden states are not compared, and a case goes on where such a comparison would have ended
it. Which cases and comparisons those are is not guessed: an honest target is asked in every profile first. Where the
run with taps cannot tell how a case would have gone on, that case alone is run again in the narrower profile, so that a
derived trial says what a real one would have said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmqual_conformance.policy import data_order

Row = Mapping[str, Any]
NOT_APPLICABLE = "not-applicable"
_NOT_TRIED = "not tried"  # cases behind several that hung: how many hang depends on how many are tried


@dataclass(frozen=True)
class Asked:
    """What an honest target is asked in one profile.

    Attributes:
        comparisons: of every case that applies.
        rules: of comparison that look at each of these cases, see `vlmqual_conformance.rules`.
    """

    comparisons: Mapping[str, frozenset[str]]
    rules: Mapping[str, tuple[str, ...]]


def asked(rows: Sequence[Row]) -> Asked:
    """From the verdicts of an honest target."""
    applied = [row for row in rows if row["outcome"] != NOT_APPLICABLE]
    return Asked(
        {row["case"]: frozenset(row["details"].get("ratios", ())) for row in applied},
        {row["case"]: tuple(row["details"].get("rules", {}).get("looked", ())) for row in applied},
    )


def derived(rows: Sequence[Row], wide: Asked, narrow: Asked) -> tuple[list[Row], list[str]]:
    """Verdicts in a narrower profile, and the cases of which they cannot be told.

    Args:
        rows: verdicts of a target in a profile.
        wide: what an honest one is asked in that profile.
        narrow: what it is asked in the narrower one.
    """
    if any(row["reason"].startswith(_NOT_TRIED) for row in rows):
        return [], [row["case"] for row in rows]
    found: list[Row] = []
    unsure: list[str] = []
    for row in rows:
        case = row["case"]
        kept = narrow.comparisons.get(case)
        if row["outcome"] == NOT_APPLICABLE or kept == wide.comparisons.get(case):
            found.append(row)
        elif kept is None:
            reason = "the target does not show what the case needs"
            found.append({**row, "outcome": NOT_APPLICABLE, "reason": reason, "worst": None, "component": ""})
        elif (less := _without(row, kept)) is not None:
            found.append(less)
        else:
            unsure.append(case)
    return found, unsure


def _without(row: Row, kept: frozenset[str]) -> Row | None:
    """A verdict over some of its comparisons, None where these do not decide it."""
    ratios = {name: ratio for name, ratio in row["details"].get("ratios", {}).items() if name in kept}
    # A ratio that is no number is infinite: it stands as None in a file.
    out = sorted((name for name, ratio in ratios.items() if ratio is None or ratio > 1), key=data_order)
    finite = [ratio for ratio in ratios.values() if ratio is not None]
    worst = None if len(finite) < len(ratios) else max(finite, default=None)
    if row["outcome"] == "pass":
        shown = max(ratios, key=lambda name: ratios[name], default="")
        return {**row, "worst": worst, "component": shown}
    if row["outcome"] == "fail" and out:
        times = "far more than" if ratios[out[0]] is None else f"{ratios[out[0]]:.3g} times"
        return {**row, "worst": worst, "component": out[0], "reason": f"{out[0]} is {times} its budget"}
    return None
