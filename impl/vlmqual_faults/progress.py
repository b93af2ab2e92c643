"""How far a long run is: a bar on a terminal, otherwise a line for every tenth."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_WIDTH = 40


class Steps:
    """Counts steps that have been made, on standard error unless another stream is given."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what[:_WIDTH], total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        if self._bar.disable:
            self.say(f"{self._what}: 0 of {self._total}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def made(self, steps: int, last: str = "") -> None:
        """Count steps.

        Args:
            steps: how many were made.
            last: what the last one was about.
        """
        before, self._done = self._done, self._done + steps
        self._bar.update(self._task, completed=self._done, description=(last or self._what)[:_WIDTH])
        if self._bar.disable and self._done * 10 // self._total > before * 10 // self._total:
            self.say(f"{self._done} of {self._total}" + (f": {last}" if last else ""))

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, markup=False)
