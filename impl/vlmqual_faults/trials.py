"""One variant under the suite: which of its cases failed, and what they named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmqual_conformance import sessions
from vlmqual_conformance.policy import data_order
from vlmqual_conformance.sessions import Session
from vlmqual_faults.catalogue import Variant

#: Requirements by whose cases every variant of a family is judged, beside those that it declares: of its preprocessing,
#: of the model, and what honest variants have to pass besides.
CORE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "idefics": (
        ("IDEFICS-FILE-003", "IDEFICS-FILE-005"),
        ("IDEFICS-TOWER-001", "IDEFICS-CROSS-005", "IDEFICS-MASK-001", "IDEFICS-DEC-004"),
        ("IDEFICS-DEC-001", "IDEFICS-MASK-005"),
    ),
    "idefics3": (
        ("IDEFICS3-FILE-003", "IDEFICS3-FILE-005"),
        ("IDEFICS3-VIS-003", "IDEFICS3-TEXT-001", "IDEFICS3-TEXT-010", "IDEFICS3-DEC-002"),
        ("IDEFICS3-DEC-001", "IDEFICS3-TEXT-012"),
    ),
    "mllama": (
        ("MLLAMA-FILE-003", "MLLAMA-FILE-006"),
        ("MLLAMA-TOWER-001", "MLLAMA-DECODER-001", "MLLAMA-MASK-001", "MLLAMA-DEC-002"),
        ("MLLAMA-DEC-001", "MLLAMA-MASK-005"),
    ),
}
_BEFORE_THE_MODEL = ("images", "prompts")
_BAD = ("fail", "error")


@dataclass(frozen=True)
class Trial:
    """What the suite said of a variant that offers a profile of itself.

    Attributes:
        family: `model_type`.
        variant: its name.
        kind: "fault" or "honest".
        level: where it does its damage.
        profile: what the target offered.
        caught: a case failed.
        declared: a case of every declared requirement failed.
        expected_by: declared requirements.
        by: requirements of the cases that failed.
        missed: declared requirements of which no case failed.
        cases: how many failed, of how many that applied.
        component: the first component that left its budget, over all cases; "" for none.
        expected: what the table says that it should be; "" where no tap can show it.
        worst: the largest error over budget among cases that passed and failed.
        reason: of the first case that failed, or why the trial itself went wrong.
        seconds: that it took.
    """

    family: str
    variant: str
    kind: str
    level: str
    profile: str
    caught: bool
    declared: bool
    expected_by: tuple[str, ...]
    by: tuple[str, ...]
    missed: tuple[str, ...]
    cases: tuple[int, int]
    component: str
    expected: str
    worst: float | None
    reason: str
    seconds: float = field(default=0.0, compare=False)

    def plain(self) -> dict[str, Any]:
        """As JSON would have it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Trial:
        """What `plain` made."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("expected_by", "by", "missed", "cases")}})


def run(
    variant: Variant,
    profile: str,
    requirements: Sequence[str],
    folder: Path,
    timeout_s: float,
    python: str | None = None,
) -> Trial:
    """Judge a variant by the cases of some requirements, all of its family where none are named.

    Args:
        variant: a fault or an honest variant.
        profile: one of `target.PROFILES`.
        requirements: ids.
        folder: for the results file, empty.
        timeout_s: seconds for one answer of the target.
        python: what starts the target's worker, None for this interpreter.
    """
    ended = sessions.run(
        Session(
            kind="target",
            subject=f"faulty:fault={variant.name},offers={profile},dtype={variant.dtype},threads=1",
            results=folder,
            timeout_s=timeout_s,
            python=python,
            families=(variant.family,),
            requirements=tuple(requirements),
            fresh=True,
        ),
        quiet=True,
    )
    rows = Path(ended.path).read_text("utf-8").splitlines() if ended.path else []
    return judged(variant, profile, [row for row in map(json.loads, rows) if "outcome" in row], ended.said)


def wanted(variant: Variant) -> tuple[str, ...]:
    """Ids of the requirements by which a variant is judged in a quick run: its own and the core."""
    before, model, honest = CORE[variant.family]
    core = before if variant.level in _BEFORE_THE_MODEL else model
    more = (*before, *honest) if variant.kind == "honest" else ()
    return tuple(dict.fromkeys((*variant.requirements, *core, *more)))


def judged(variant: Variant, profile: str, verdicts: Sequence[Mapping[str, Any]], said: str) -> Trial:
    """A trial from the verdicts of its cases; without any it went wrong, and nothing was caught."""
    bad = [row for row in verdicts if row["outcome"] in _BAD]
    applied = [row for row in verdicts if row["outcome"] != "not-applicable"]
    components = sorted({row["component"] for row in bad if row.get("component")}, key=data_order)
    by = {name for row in bad for name in row["requirements"]}
    missed = tuple(name for name in variant.requirements if name not in by)
    worst = [row["worst"] for row in verdicts if row.get("worst") is not None]
    reason = bad[0]["reason"] if bad else "" if verdicts else f"no verdicts: {' '.join(said.split())[-300:]}"
    return Trial(
        family=variant.family,
        variant=variant.name,
        kind=variant.kind,
        level=variant.level,
        profile=profile,
        caught=bool(bad),
        declared=not missed,
        expected_by=variant.requirements,
        by=tuple(sorted(by)),
        missed=missed,
        cases=(len(bad), len(applied)),
        component=components[0] if components else "",
        expected=variant.component,
        worst=max(worst, default=None),
        reason=reason,
    )
