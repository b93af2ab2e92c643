"""What one session does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmqual_conformance.catalogue import CHECKPOINT, FIXTURES, Scope
from vlmqual_conformance.references import Over


@dataclass(frozen=True)
class Plan:
    """What one session does, from its options.

    Attributes:
        target: target string, or "" for a library run.
        library: name of a library, or "".
        families: families to be judged.
        levels: levels to be judged, in the suite's order.
        results: folder of results files.
        python: interpreter of the subject's environment, or None.
        timeout_s: seconds for one answer.
        fresh: do not continue an unfinished run.
        known: further files of known failures.
        waivers: the user's files of waivers.
        command: command line, for the record.
        status: file that the outcome is written to for the caller, or None.
        keyword: pytest's `-k`.
        requirements: only cases that carry one of these ids, empty for all.
        cases: only the cases of exactly these names, empty for all.
        over: the user's checkpoint that is run instead of the fixtures, or None.
    """

    target: str
    library: str
    families: tuple[str, ...]
    levels: tuple[str, ...]
    results: Path
    python: str | None
    timeout_s: float
    fresh: bool
    known: tuple[Path, ...]
    command: str
    status: Path | None
    keyword: str
    requirements: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    over: Over | None = None
    waivers: tuple[Path, ...] = ()

    @property
    def scope(self) -> Scope:
        """Where tests and requirements are."""
        return FIXTURES if self.over is None else CHECKPOINT

    @property
    def subject(self) -> str:
        """As in the header of the results file."""
        return self.target or f"library {self.library}"

    @property
    def select(self) -> str:
        """What narrows the run down beside families and levels, in words; "" for nothing."""
        named = (("requirement", self.requirements), ("case", self.cases))
        words = [*([self.over.name] if self.over else [])]
        words += [f"{word} {' or '.join(names)}" for word, names in named if names]
        return " and ".join([*([self.keyword] if self.keyword else []), *words])
