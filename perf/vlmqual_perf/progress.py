"""What a run says while it goes on, and the table at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vlmqual_contract.records import Measurement
from vlmqual_contract.scaling import short
from vlmqual_perf.forecast import Forecast, shown
from vlmqual_perf.plan import Cell
from vlmqual_perf.shares import show

#: What stands behind a median whose measurement does not call itself valid.
MARKS: Mapping[str, tuple[str, str]] = {
    "noisy": ("~", "noisy"),
    "too-few": ("#", "too few values"),
    "not-steady": ("!", "not steady"),
    "throttled": ("v", "throttled"),
    "wrong-bucket": ("b", "wrong bucket"),
}


class Reporter:
    """A bar on a terminal, a line for each cell elsewhere; both say how much time is left.

    Args:
        cells: of the run.
        forecast: of these cells.
        done: cases that have their row from before.
        stream: where to write; standard output by default.
    """

    def __init__(
        self, cells: Sequence[Cell], forecast: Forecast, done: Iterable[str], stream: TextIO | None = None
    ) -> None:
        self.console = Console(file=stream or sys.stdout, highlight=False)
        self._forecast = forecast
        self._total = len(cells)
        for case in (before := set(done)):
            forecast.done(case)
        self._done = len(before)
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=self._total, completed=self._done, left=self._left())
        if before:
            self.console.print(f"{self._done} of {self._total} cells were measured before and are kept", soft_wrap=True)

    def update(self, cell: Cell, row: Measurement | None) -> None:
        """Before a cell without, after it with its row."""
        if row is None:
            self._began = time.monotonic()
            self._bar.update(self._task, description=cell.case[-40:])
            return
        self._done += 1
        self._forecast.done(cell.case, time.monotonic() - self._began if row.values_s else None)
        self._bar.update(self._task, completed=self._done, left=self._left())
        said = f"{milliseconds(row)} ms{mark(row)}" if row.values_s else "no value"
        tail = "" if row.state == "valid" else f"  {row.state}: {row.reason}"
        line = f"[{self._done}/{self._total}, {self._left()}] {row.case}  {said}{tail}"
        if not self.console.is_terminal or row.state == "failed":
            self.console.print(line, soft_wrap=True, markup=False)

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.console.print(sentence, soft_wrap=True, markup=False)

    def _left(self) -> str:
        return f"{shown(self._forecast.left_s())} left"

    def start(self) -> None:
        """Show the bar."""
        self._bar.start()

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def milliseconds(row: Measurement) -> str:
    """Median over all values of a row, in milliseconds, with four significant digits."""
    return f"{1e3 * float(np.median([value for steps in row.values_s for value in steps])):.4g}"


def table(rows: Sequence[Measurement], console: Console) -> None:
    """Medians, by scenario and phase over tensor-parallel sizes; buckets and padding of fixed shapes.

    Args:
        rows: of a run, in the order in which they are shown.
        console: is printed to.
    """
    sizes = sorted({row.tp for row in rows})
    grid = Table(title="median in ms", title_justify="left", box=None, pad_edge=False)
    grid.add_column("scenario", overflow="fold")
    grid.add_column("phase")
    for size in sizes:
        grid.add_column(f"TP={size}", justify="right")
    fixed = any("bucket" in row.checks for row in rows)
    if fixed:
        grid.add_column("bucket")
        grid.add_column("padding", justify="right")
    found = {(row.scenario, row.phase, row.tp): row for row in rows}
    for scenario, phase in dict.fromkeys((row.scenario, row.phase) for row in rows):
        same = [found.get((scenario, phase, size)) for size in sizes]
        grid.add_row(scenario, phase, *[_cell(row) for row in same], *(_padding(same) if fixed else ()))
    console.print(grid)
    occurring = [f"{sign} {words}" for state, (sign, words) in MARKS.items() if any(row.state == state for row in rows)]
    if any(row.state == "failed" for row in rows):
        occurring.append("a word instead of a figure: the cell failed")
    if occurring:
        console.print(f"marks: {', '.join(occurring)}", markup=False)
    show(rows, console)


def _cell(row: Measurement | None) -> str:
    if row is None:
        return "-"
    if row.state == "failed":
        return short(row.reason)
    doubt = MARKS[row.state][0] if row.state in MARKS else ""
    return f"{milliseconds(row)} {doubt}".rstrip() + mark(row)


def mark(row: Measurement) -> str:
    """What follows a figure that says nothing about a device."""
    if row.checks.get("emulated"):
        return " emulated"
    return " rehearsal" if row.checks.get("rehearsal") else ""


def _padding(rows: Sequence[Measurement | None]) -> tuple[str, str]:
    """The bucket, and the share of what was computed that nobody asked for."""
    for row in rows:
        if row is not None and "bucket" in row.checks:
            return str(row.checks["bucket"]), f"{100 * (1 - row.checks['asked'] / row.checks['computed']):.0f} %"
    return "", ""
