"""What a run says while it goes on and when it ends. On a terminal a bar, otherwise a line for each level."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from vlmqual_conformance import waivers
from vlmqual_contract.records import Outcome, Verdict
from vlmqual_contract.requirement import LEVELS

_SHOWN = 20
_COLUMNS = (
    (Outcome.PASS, "pass"),
    (Outcome.FAIL, "fail"),
    (Outcome.ERROR, "error"),
    (Outcome.EXPECTED_FAIL, "expected"),
    (Outcome.NOT_APPLICABLE, "n/a"),
)


class Reporter:
    """Shows the progress of one subject.

    Attributes:
        width: columns of a line.
    """

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._total = total
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._level = ""
        self._rows: list[Verdict] = []
        self._bad = 0
        self.width = 80
        if self._stream.isatty():
            console = Console(file=self._stream)
            self.width = console.width
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=total)
        self._say(title)

    def starting(self, level: str) -> None:
        """A case of this level begins; where there are several families, the level with its family before it."""
        if self._bar is not None and self._task is not None:
            bad = f", {self._bad} not as required" if self._bad else ""
            self._bar.update(self._task, description=f"{level}{bad}")
        elif level != self._level:
            self._flush()
        self._level = level

    def ended(self, verdict: Verdict) -> None:
        """A case came to its verdict."""
        self._bad += verdict.outcome in (Outcome.FAIL, Outcome.ERROR)
        self._rows.append(verdict)
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        else:
            self._flush()

    def _flush(self) -> None:
        if self._rows and self._level:
            seconds = sum(row.seconds for row in self._rows)
            self._say(f"  {self._level:<12}{' ' * (len(self._level) > 11)}{counted(self._rows)} ({seconds:.1f} s)")
        self._rows = []

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)


def counted(rows: Iterable[Verdict]) -> str:
    """Outcomes that occur, as words."""
    rows = list(rows)
    counts = Counter(row.outcome for row in rows)
    words = {outcome: f"{counts[outcome]} {outcome}" for outcome, _ in _COLUMNS if counts[outcome]}
    if waived := sum(map(waivers.is_used, rows)):
        words[Outcome.PASS] += f" ({waived} by a waiver)"
    return ", ".join(words.values()) or "nothing"


def summary(verdicts: Sequence[Verdict], width: int = 80) -> str:
    """A table of levels and outcomes by family, the cases that are not as required, and what the target computes in."""
    levels = [*LEVELS, *sorted({row.level for row in verdicts} - set(LEVELS))]
    families = sorted({row.family for row in verdicts})
    several = len({*families} - {""}) > 1
    groups: list[tuple[str, list[Verdict]]] = []
    for family in families if several else [""]:
        for level in levels:
            chosen = [row for row in verdicts if row.level == level and (not several or row.family == family)]
            groups.append((f"{family} {level}".strip(), chosen))
    wide = 21 if several else 12
    lines = ["  " + f"{'level':<{wide}}" + "".join(f"{word:>9}" for _, word in _COLUMNS) + f"{'worst':>10}"]
    for name, rows in groups:
        if not rows:
            continue
        counts = Counter(row.outcome for row in rows)
        cells = "".join(f"{counts[outcome] or '-':>9}" for outcome, _ in _COLUMNS)
        ratios = [row.worst for row in rows if row.worst is not None]
        lines.append(f"  {name:<{wide}}{cells}{_ratio(max(ratios)) if ratios else '':>10}")
    waived = Counter((row.details["waiver"], row.details["waiver expires"]) for row in verdicts if waivers.is_used(row))
    for (reason, until), count in waived.items():
        text = f"WAIVED {count} {'case' if count == 1 else 'cases'} until {until}: {reason}"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent=" " * 8)
    bad = [row for row in verdicts if row.outcome in (Outcome.FAIL, Outcome.ERROR)]
    for row in bad[:_SHOWN]:
        case = f"{row.outcome.upper():<6}{row.case}"
        for text, indent in ((case, "  "), (row.reason, "        ")):
            lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=" " * 8)
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more; the results file has all")
    for row in verdicts:
        if row not in bad and isinstance(seems := row.details.get("precision"), Mapping):
            text = f"{row.family} {seems.get('says', '')}"
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent=" " * 8)
    return "\n".join(lines)


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.1e}"
