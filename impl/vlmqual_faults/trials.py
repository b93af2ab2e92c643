"""One variant under the suite: which of its cases failed, and what they named."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmqual_conformance import sessions
from vlmqual_conformance.catalogue import Case
from vlmqual_conformance.policy import data_order
from vlmqual_conformance.sessions import Session
from vlmqual_contract.requirement import Requirement
from vlmqual_faults import cases
from vlmqual_faults.catalogue import Variant
from vlmqual_faults.profiles import NOT_APPLICABLE, Asked, Row

#: Requirements by whose cases every variant of a family is judged, beside those that it declares: of its preprocessing,
#: of the model, and what honest variants have to pass besides.
CORE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "idefics": (
        ("IDEFICS-FILE-003", "IDEFICS-FILE-005"),
        ("IDEFICS-TOWER-001", "IDEFICS-CROSS-005", "IDEFICS-MASK-001", "IDEFICS-DEC-004"),
        ("IDEFICS-DEC-001", "IDEFICS-MASK-005", "IDEFICS-PREC-001"),
    ),
    "idefics3": (
        ("IDEFICS3-FILE-003", "IDEFICS3-FILE-005"),
        ("IDEFICS3-VIS-003", "IDEFICS3-TEXT-001", "IDEFICS3-TEXT-002", "IDEFICS3-TEXT-010", "IDEFICS3-DEC-002"),
        ("IDEFICS3-DEC-001", "IDEFICS3-TEXT-012", "IDEFICS3-PREC-001"),
    ),
    "mllama": (
        ("MLLAMA-FILE-003", "MLLAMA-FILE-006"),
        ("MLLAMA-TOWER-001", "MLLAMA-DECODER-001", "MLLAMA-MASK-001", "MLLAMA-DEC-002"),
        ("MLLAMA-DEC-001", "MLLAMA-MASK-005", "MLLAMA-PREC-001"),
    ),
}
#: Logits of the steps after a prompt. Rules of comparison are compared by what a harness looks at: image features and
#: logits at the end of every golden prompt, which the core has, and sixteen steps after each of `PROMPTS`.
STEPS: Mapping[str, str] = {
    "idefics": "IDEFICS-DEC-001",
    "idefics3": "IDEFICS3-DEC-001",
    "mllama": "MLLAMA-DEC-001",
}
PROMPTS = ("batch-left", "photo", "photo-one-tile", "photo-whole", "text-beside-image", "text-only", "two-images")
#: Levels whose faults change what a model answers when it is fed golden tensors: here rules of comparison compete.
COMPARED = ("vision", "prefill", "decode", "masks")
_BEFORE_THE_MODEL = ("images", "prompts")
_BAD = ("fail", "error")
_NO_ANSWER = ("raised ", "refused: ")


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
        rules: other rules of comparison by name, with True for one that would have failed; without those that looked at
            nothing. See `vlmqual_conformance.rules`.
        derived: from the trial with taps, see `profiles`.
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
    rules: Mapping[str, bool] = field(default_factory=dict)
    derived: bool = field(default=False, compare=False)
    seconds: float = field(default=0.0, compare=False)

    def plain(self) -> dict[str, Any]:
        """As JSON would have it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Trial:
        """What `plain` made."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("expected_by", "by", "missed", "cases")}})


@dataclass(frozen=True)
class Bench:
    """Where trials are made.

    Attributes:
        worker: what starts the targets' workers, None for this interpreter.
        suite: what starts pytest, None for this interpreter.
        timeout_s: seconds for one answer of a target.
    """

    worker: str | None = None
    suite: str | None = None
    timeout_s: float = 60.0


def observe(variant: Variant, profile: str, cases: Sequence[str], bench: Bench) -> tuple[list[Row], str]:
    """Run cases against a variant: their verdicts, and what the session complained of.

    Args:
        variant: a fault or an honest variant.
        profile: one of `target.PROFILES`.
        cases: names.
        bench: where.
    """
    with tempfile.TemporaryDirectory(prefix="vlmqual-trial-") as folder:
        session = Session(
            kind="target",
            subject=f"faulty:fault={variant.name},offers={profile},dtype={variant.dtype},threads=1",
            results=Path(folder),
            timeout_s=bench.timeout_s,
            python=bench.worker,
            families=(variant.family,),
            cases=tuple(cases),
            fresh=True,
            rules=True,
        )
        ended = sessions.run(session, quiet=True, python=bench.suite or sys.executable)
        rows = Path(ended.path).read_text("utf-8").splitlines() if ended.path else []
    return [row for row in map(json.loads, rows) if "outcome" in row], ended.said


def wanted(variant: Variant) -> tuple[str, ...]:
    """Ids of the requirements by which a variant is judged in a quick run: its own and the core."""
    before, model, honest = CORE[variant.family]
    core = before if variant.level in _BEFORE_THE_MODEL else model
    more = (*before, *honest) if variant.kind == "honest" else ()
    return tuple(dict.fromkeys((*variant.requirements, *core, *more)))


def asked_of(variant: Variant, every: Sequence[Case], known: Mapping[str, Requirement]) -> tuple[str, ...]:
    """Names of the cases by which a variant is judged in a quick run: of `wanted`, and what rules are compared by.

    Args:
        variant: a fault or an honest variant.
        every: case of the suite.
        known: all requirements.
    """
    own = cases.names(every, known, variant.family, wanted(variant))
    if variant.level not in COMPARED:
        return own
    steps = cases.names(every, known, variant.family, [STEPS[variant.family]])
    return tuple(dict.fromkeys((*own, *filter(_is_compared, steps))))


def _is_compared(case: str) -> bool:
    return case.endswith(tuple(f"[{name}]" for name in PROMPTS))


def judged(
    variant: Variant,
    profile: str,
    verdicts: Sequence[Row],
    said: str,
    honest: Asked | None = None,
    *,
    derived: bool = False,
) -> Trial:
    """A trial from the verdicts of its cases; without any it went wrong, and nothing was caught.

    Args:
        variant: the fault or honest variant.
        profile: what its target offered.
        verdicts: of its cases.
        said: what the session complained of.
        honest: what an honest target is asked, so that rules of comparison also count answers that did not come.
        derived: see `Trial`.
    """
    bad = [row for row in verdicts if row["outcome"] in _BAD]
    applied = [row for row in verdicts if row["outcome"] != NOT_APPLICABLE]
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
        rules=_rules(verdicts, honest),
        derived=derived,
    )


def _rules(verdicts: Sequence[Row], honest: Asked | None) -> dict[str, bool]:
    """Rules of comparison to whether one of the cases would have failed by them; no answer fails by all that look."""
    found: dict[str, bool] = {}
    for row in verdicts:
        if not set(STEPS.values()).isdisjoint(row["requirements"]) and not _is_compared(row["case"]):
            continue  # a few variants are judged by the steps after every prompt, which is no merit of a rule
        said = row.get("details", {}).get("rules", {"looked": (), "failed": ()})
        silent = row["outcome"] == "error" or (row["outcome"] == "fail" and row["reason"].startswith(_NO_ANSWER))
        lost = honest.rules.get(row["case"], ()) if honest is not None and silent else ()
        for rule in (*said["looked"], *lost):
            found[rule] = found.get(rule, False) or rule in said["failed"] or rule in lost
    return found
