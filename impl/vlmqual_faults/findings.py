"""What trials prove: kill rates by profile, the matrix of faults and requirements, and everything that is wrong."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmqual_conformance.catalogue import requirements
from vlmqual_conformance.rules import BUDGET, RULES
from vlmqual_faults.catalogue import Variant
from vlmqual_faults.trials import COMPARED, Trial

FORMAT = 2
#: The profile that shows everything; only here every declared requirement has to catch its fault.
WHOLE = "taps"
#: Where rules of comparison are compared: what a harness sees of a device, features and logits.
_HARNESS = "all-logits"
_TITLES = {
    BUDGET: "budgets, on what the rules below look at",
    "cosine": "cosine of whole tensors >= 0.99",
    "top-5": "top 5 log-probabilities",
    "exact-text": "exact text",
    "torch-close": "torch.testing's tolerances of the dtype",
    "numpy-close": "numpy.allclose's tolerances",
}


def show(trials: Sequence[Trial], uncovered: Iterable[str], console: Console) -> bool:
    """Print what was found; True when nothing is wrong.

    Args:
        trials: of any families and profiles.
        uncovered: requirements without a fault, see `without_fault`.
        console: where to.
    """
    for family in dict.fromkeys(trial.family for trial in trials):
        own = [trial for trial in trials if trial.family == family]
        console.print(_profiles(family, own))
        if any(trial.derived for trial in own):
            console.print("  * derived from the trials with taps; --full or --profile runs it", markup=False)
        if (table := _rules(family, own)) is not None:
            console.print(table)
        counts = Counter(name for trial in own if trial.kind == "fault" and trial.profile == WHOLE for name in trial.by)
        text = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        console.print(f"  faults that the cases of a requirement caught: {text or 'none'}", markup=False)
    wrong = [*map(_wrong, trials), *(f"UNPROVEN  {name} is a MUST of which no fault is known" for name in uncovered)]
    for line in filter(None, [*wrong, *map(_doubtful, trials)]):
        console.print(line, markup=False, soft_wrap=True)
    return not any(wrong)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    return table


def _profiles(family: str, own: Sequence[Trial]) -> Table:
    table = _table(
        family, "what a target shows", "faults caught", "by all they declare", "component named", "honest rejected"
    )
    for profile in dict.fromkeys(trial.profile for trial in own):
        found = rates(own, profile)
        mark = "*" if any(trial.derived for trial in own if trial.profile == profile) else ""
        table.add_row(
            profile + mark,
            _share(found.caught, found.faults),
            _share(found.declared, found.faults),
            _share(found.named, found.expected) if found.expected else "",
            f"{found.rejected} of {found.honest}",
        )
    return table


def _rules(family: str, own: Sequence[Trial]) -> Table | None:
    found = compared(own)
    if not found:
        return None
    title = f"{family}: rules of comparison, on the same faults of the levels {', '.join(COMPARED)}"
    table = _table(title, "rule", "faults caught", "honest rejected")
    for each in found:
        table.add_row(each.title, _share(each.caught, each.faults), f"{each.rejected} of {each.honest}")
    return table


@dataclass(frozen=True)
class Compared:
    """How a rule of comparison did.

    Attributes:
        rule: one of `vlmqual_conformance.rules.RULES`, or "suite PROFILE" for all cases of the suite.
        title: the rule in words.
        faults: those of the levels `COMPARED`.
        caught: those that failed by the rule.
        honest: honest variants.
        rejected: those that failed by the rule.
    """

    rule: str
    title: str
    faults: int
    caught: int
    honest: int
    rejected: int


def compared(trials: Iterable[Trial]) -> list[Compared]:
    """The rules over the trials of one family, where some rule looked at something; the suite comes first."""
    own = [trial for trial in trials if trial.kind == "honest" or trial.level in COMPARED]
    profiles = list(dict.fromkeys(trial.profile for trial in own))
    if not any(trial.rules for trial in own):
        return []
    seen = _HARNESS if _HARNESS in profiles else profiles[0]
    failed = {f"suite {profile}": [(t.kind, t.caught) for t in _of(own, profile)] for profile in profiles}
    failed |= {rule: [(t.kind, t.rules.get(rule, False)) for t in _of(own, seen)] for rule in RULES}
    return [
        Compared(
            rule=rule,
            title=_TITLES.get(rule, f"the suite, {rule.removeprefix('suite ')}"),
            faults=sum(kind == "fault" for kind, _ in said),
            caught=sum(bad for kind, bad in said if kind == "fault"),
            honest=sum(kind == "honest" for kind, _ in said),
            rejected=sum(bad for kind, bad in said if kind == "honest"),
        )
        for rule, said in failed.items()
    ]


def _of(trials: Iterable[Trial], profile: str) -> list[Trial]:
    return [trial for trial in trials if trial.profile == profile]


@dataclass(frozen=True)
class Rates:
    """Counts over the trials of one family in one profile.

    Attributes:
        faults: trials of faults.
        caught: those in which a case failed.
        declared: those in which a case of every declared requirement failed.
        expected: caught ones whose component the table knows; none in profiles without taps.
        named: those of them whose component was named.
        honest: trials of honest variants.
        rejected: those in which a case failed.
        derived: some trials were derived from those with taps.
    """

    faults: int
    caught: int
    declared: int
    expected: int
    named: int
    honest: int
    rejected: int
    derived: bool


def rates(trials: Iterable[Trial], profile: str) -> Rates:
    """Count the trials of a profile."""
    own = _of(trials, profile)
    faults = [trial for trial in own if trial.kind == "fault"]
    honest = [trial for trial in own if trial.kind == "honest"]
    known = [trial for trial in faults if trial.caught and trial.expected and profile == WHOLE]
    return Rates(
        faults=len(faults),
        caught=sum(trial.caught for trial in faults),
        declared=sum(trial.declared for trial in faults),
        expected=len(known),
        named=sum(trial.component == trial.expected for trial in known),
        honest=len(honest),
        rejected=sum(trial.caught for trial in honest),
        derived=any(trial.derived for trial in own),
    )


def write_summary(
    trials: Sequence[Trial], uncovered: Sequence[str], folder: Path, about: Mapping[str, Any], says: Mapping[str, Any]
) -> Path:
    """`proof.json`, for a report: rates by family and profile, every trial, and the requirements without a fault.

    Args:
        trials: of any families and profiles.
        uncovered: requirements without a fault.
        folder: where to.
        about: what the proof was made with, see `proof`.
        says: families to names of variants to what each of them is.
    """
    families = dict.fromkeys(trial.family for trial in trials)
    profiles = dict.fromkeys(trial.profile for trial in trials)
    own = {family: [trial for trial in trials if trial.family == family] for family in families}
    whole = {
        "format": FORMAT,
        **about,
        "rates": {
            family: {profile: asdict(rates(own[family], profile)) for profile in profiles} for family in families
        },
        "comparison": {family: [asdict(each) for each in compared(own[family])] for family in families},
        "unproven": list(uncovered),
        "wrong": [line for line in map(_wrong, trials) if line],
        "doubtful": [line for line in map(_doubtful, trials) if line],
        "variants": says,
        "trials": [trial.plain() for trial in trials],
    }
    path = folder / "proof.json"
    path.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    return path


def _wrong(trial: Trial) -> str:
    """One line for a trial that must not end like this, "" for one that may."""
    name = f"{trial.family} {trial.variant} ({trial.profile})"
    if not trial.cases[1]:
        # What a device does not show cannot be judged there: that is a rate, not a mistake.
        return f"BROKEN    {name}: {trial.reason}" if trial.profile == WHOLE else ""
    if trial.kind == "honest":
        return f"REJECTED  {name}: {trial.reason}" if trial.caught else ""
    if trial.profile != WHOLE or trial.declared:
        return ""
    if not trial.caught:
        return f"SURVIVED  {name}"
    return f"MISSED    {name}: not caught by {', '.join(trial.missed)}, but by {', '.join(trial.by[:4])}"


def _doubtful(trial: Trial) -> str:
    """One line for a fault that was blamed on another component than the table expects."""
    if trial.kind != "fault" or trial.profile != WHOLE or not trial.caught or trial.expected in ("", trial.component):
        return ""
    return f"COMPONENT {trial.family} {trial.variant}: {trial.component or 'none'} was named, not {trial.expected}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def without_fault(families: Iterable[str], faults: Iterable[Variant]) -> list[str]:
    """Every MUST about targets of these families that no fault declares."""
    declared = {name for fault in faults for name in fault.requirements}
    wanted = set(families)
    return [
        name
        for name, each in requirements().items()
        if (each.subject, each.keyword) == ("target", "MUST") and each.family in wanted and name not in declared
    ]


def write_matrix(trials: Sequence[Trial], folder: Path) -> list[Path]:
    """A table for each family and profile: a row for each fault, a column for each requirement.

    A cell is "caught" for a declared requirement whose cases failed, "missed" for one whose cases did not, "also" for
    another whose cases failed, and empty otherwise.
    """
    written = []
    for family, profile in dict.fromkeys((trial.family, trial.profile) for trial in trials):
        own = [t for t in trials if (t.family, t.profile, t.kind) == (family, profile, "fault")]
        columns = sorted({name for trial in own for name in (*trial.by, *trial.expected_by)})
        path = folder / f"matrix-{family}-{profile}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["fault", "level", "component", *columns])
            for trial in own:
                cells: Mapping[str, str] = _cells(trial)
                rows.writerow([trial.variant, trial.level, trial.component, *(cells.get(c, "") for c in columns)])
        written.append(path)
    return written


def _cells(trial: Trial) -> dict[str, str]:
    caught = {name: "caught" if name in trial.expected_by else "also" for name in trial.by}
    return caught | dict.fromkeys(trial.missed, "missed")
