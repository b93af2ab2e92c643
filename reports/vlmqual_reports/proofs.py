"""What `vlmqual proof` found: faults that the suite caught or did not, and honest variants that it rejected.

A proof is one file, `proof.json`. Rates are counted here from its trials.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError

NAME = "proof.json"
FORMAT = 2
#: The profile in which every declared requirement has to catch its fault.
WHOLE = "taps"
_TEXTS = ("family", "variant", "kind", "level", "profile", "component", "expected", "reason")


@dataclass(frozen=True)
class Trial:
    """What the suite said of a variant that offers a profile of itself; the names are those of the file."""

    family: str
    variant: str
    kind: str
    level: str
    profile: str
    caught: bool
    declared: bool
    derived: bool
    expected_by: tuple[str, ...]
    by: tuple[str, ...]
    missed: tuple[str, ...]
    component: str
    expected: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """How a rule of comparison did: caught of faults, rejected of honest variants."""

    title: str
    faults: int
    caught: int
    honest: int
    rejected: int


@dataclass(frozen=True)
class Rates:
    """Counts over the trials of one family in one profile.

    Attributes:
        profile: what targets offered.
        derived: they were derived from the trials with taps.
        faults: how many.
        caught: by any case.
        declared: by cases of every requirement that they declare.
        expected: caught ones of which the component is known.
        named: those whose component was named.
        honest: variants.
        rejected: by any case.
    """

    profile: str
    derived: bool
    faults: int
    caught: int
    declared: int
    expected: int
    named: int
    honest: int
    rejected: int


@dataclass(frozen=True)
class Line:
    """A fault in the matrix: what caught it and what should have.

    Attributes:
        name: of the fault.
        says: what is wrong in it.
        level: where it does its damage.
        component: that was named.
        expected: that should have been named, "" for the same or none.
        caught: declared requirements whose cases failed.
        missed: declared requirements whose cases did not.
        also: further requirements whose cases failed.
        cells: for each column of the family "caught", "missed", "also" or ""; equal neighbours together, with how many.
    """

    name: str
    says: str
    level: str
    component: str
    expected: str
    caught: tuple[str, ...]
    missed: tuple[str, ...]
    also: tuple[str, ...]
    cells: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class Family:
    """One family in a proof.

    Attributes:
        name: `model_type`.
        rates: by profile.
        rules: of comparison; empty where none was asked for.
        columns: requirements that are declared or caught a fault.
        lines: faults in the profile that shows most.
        profile: that profile.
        survived: names of faults that no case caught, by profile.
    """

    name: str
    rates: tuple[Rates, ...]
    rules: tuple[Rule, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    profile: str
    survived: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Proof:
    """A proof as the page shows it.

    Attributes:
        path: of its file.
        facts: what it was made with, in words or numbers.
        families: in the order of the file.
        wrong: one line for everything that must not be: faults that survived or were missed, rejected variants.
        unproven: ids of MUSTs without a fault.
        doubtful: faults that were blamed on another component.
    """

    path: Path
    facts: Mapping[str, Any]
    families: tuple[Family, ...]
    wrong: tuple[str, ...]
    unproven: tuple[str, ...]
    doubtful: tuple[str, ...]

    @property
    def fine(self) -> bool:
        """Nothing is wrong."""
        return not (self.wrong or self.unproven)


def read(path: Path) -> Proof:
    """Read a `proof.json`.

    Raises:
        UsageError: it cannot be read, is of another format, or is damaged.
    """
    try:
        whole = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no proof, it is not JSON") from error
    if not isinstance(whole, dict) or "format" not in whole or "trials" not in whole:
        raise UsageError(f"{path}: no proof, it has no format and trials")
    if whole["format"] != FORMAT:
        raise UsageError(f"{path}: its format is {whole['format']!r}; this report reads format {FORMAT}")
    try:
        return _proof(path, whole)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: damaged, {type(error).__name__} {error}") from error


def _proof(path: Path, whole: Mapping[str, Any]) -> Proof:
    trials = [_trial(values) for values in whole["trials"]]
    names = ("suite", "started", "mode", "command", "wall_s", "jobs", "cores", "made", "resumed", "machine")
    says = whole.get("variants", {})
    return Proof(
        path=path,
        facts={name: whole[name] for name in names if name in whole},
        families=tuple(
            _family(name, [trial for trial in trials if trial.family == name], whole["comparison"], says)
            for name in dict.fromkeys(trial.family for trial in trials)
        ),
        wrong=_texts(whole["wrong"]),
        unproven=_texts(whole["unproven"]),
        doubtful=_texts(whole.get("doubtful", [])),
    )


def _family(name: str, trials: Sequence[Trial], comparison: Mapping[str, Any], says: Mapping[str, Any]) -> Family:
    profiles = list(dict.fromkeys(trial.profile for trial in trials))
    profile = WHOLE if WHOLE in profiles else profiles[0]
    faults = [trial for trial in trials if trial.kind == "fault"]
    shown = [trial for trial in faults if trial.profile == profile]
    columns = tuple(sorted({each for trial in shown for each in (*trial.by, *trial.expected_by)}))
    sentences = says.get(name, {})
    return Family(
        name=name,
        rates=tuple(_rates(trials, each) for each in profiles),
        rules=tuple(_rule(values) for values in comparison.get(name, [])),
        columns=columns,
        lines=tuple(_line(trial, columns, str(sentences.get(trial.variant, ""))) for trial in shown),
        profile=profile,
        survived={
            each: missing
            for each in profiles
            if (missing := tuple(t.variant for t in faults if t.profile == each and not t.caught))
        },
    )


def _rates(trials: Iterable[Trial], profile: str) -> Rates:
    own = [trial for trial in trials if trial.profile == profile]
    faults = [trial for trial in own if trial.kind == "fault"]
    honest = [trial for trial in own if trial.kind == "honest"]
    known = [trial for trial in faults if trial.caught and trial.expected and profile == WHOLE]
    return Rates(
        profile=profile,
        derived=any(trial.derived for trial in own),
        faults=len(faults),
        caught=sum(trial.caught for trial in faults),
        declared=sum(trial.declared for trial in faults),
        expected=len(known),
        named=sum(trial.component == trial.expected for trial in known),
        honest=len(honest),
        rejected=sum(trial.caught for trial in honest),
    )


def _line(trial: Trial, columns: Sequence[str], says: str) -> Line:
    caught = tuple(name for name in trial.expected_by if name not in trial.missed)
    also = tuple(name for name in trial.by if name not in trial.expected_by)
    kinds = dict.fromkeys(also, "also") | dict.fromkeys(caught, "caught") | dict.fromkeys(trial.missed, "missed")
    cells: list[tuple[str, int, str]] = []
    for name in columns:
        kind = kinds.get(name, "")
        if not kind and cells and not cells[-1][0]:
            cells[-1] = ("", cells[-1][1] + 1, "")
        else:
            cells.append((kind, 1, name if kind else ""))
    other = "" if trial.expected == trial.component or not trial.caught else trial.expected
    return Line(trial.variant, says, trial.level, trial.component, other, caught, trial.missed, also, tuple(cells))


def _trial(values: Mapping[str, Any]) -> Trial:
    kinds = {str: _TEXTS, bool: ("caught", "declared", "derived")}
    found: dict[str, Any] = {name: _value(values, name, kind) for kind, names in kinds.items() for name in names}
    found |= {name: _texts(values[name]) for name in ("expected_by", "by", "missed")}
    return Trial(**found)


def _rule(values: Mapping[str, Any]) -> Rule:
    counts = {name: _value(values, name, int) for name in ("faults", "caught", "honest", "rejected")}
    return Rule(title=_value(values, "title", str), **counts)


def _value(values: Mapping[str, Any], name: str, kind: Callable[..., Any]) -> Any:
    value = values[name]
    if type(value) is not kind:
        raise TypeError(f"of {name}: it is {value!r}")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise TypeError(f"of a list of texts: it is {values!r}"[:120])
    return tuple(values)
