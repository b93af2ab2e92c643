"""What a run says while it goes on, and the table at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vlmqual_contract.records import Measurement
from vlmqual_perf.plan import Cell


class Reporter:
    """A bar on a terminal, a line for each cell elsewhere."""

    def __init__(self, total: int, done: int, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stdout, highlight=False)
        self._total = total
        self._done = done
        self._started = time.monotonic()
        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, completed=done)
        if done:
            self.console.print(f"{done} of {total} cells were measured before and are kept", soft_wrap=True)

    def update(self, cell: Cell, row: Measurement | None) -> None:
        """Before a cell without, after it with its row."""
        if row is None:
            self._bar.update(self._task, description=cell.case[-40:])
            return
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        said = f"{milliseconds(row)} ms{_mark(row)}" if row.values_s else "no value"
        tail = "" if row.state == "valid" else f"  {row.state}: {row.reason}"
        if not self.console.is_terminal or row.state == "failed":
            self.console.print(f"[{self._done}/{self._total}] {row.case}  {said}{tail}", soft_wrap=True, markup=False)

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
    """Medians, by scenario and phase over tensor-parallel sizes; buckets and padding of fixed shapes."""
    sizes = sorted({row.tp for row in rows})
    shown = Table(title="median in ms", title_justify="left", box=None, pad_edge=False)
    shown.add_column("scenario", overflow="fold")
    shown.add_column("phase")
    for size in sizes:
        shown.add_column(f"TP={size}", justify="right")
    fixed = any("bucket" in row.checks for row in rows)
    if fixed:
        shown.add_column("bucket")
        shown.add_column("padding", justify="right")
    found = {(row.scenario, row.phase, row.tp): row for row in rows}
    for scenario, phase in dict.fromkeys((row.scenario, row.phase) for row in rows):
        same = [found.get((scenario, phase, size)) for size in sizes]
        shown.add_row(scenario, phase, *[_cell(row) for row in same], *(_padding(same) if fixed else ()))
    console.print(shown)
    marks = {row.state for row in rows} - {"valid"}
    if marks:
        console.print("marks: ~ noisy, ! not steady, FAILED see above", markup=False)


def _cell(row: Measurement | None) -> str:
    if row is None:
        return "-"
    if row.state == "failed":
        return "FAILED"
    return milliseconds(row) + {"noisy": " ~", "not-steady": " !"}.get(row.state, "") + _mark(row)


def _mark(row: Measurement) -> str:
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
