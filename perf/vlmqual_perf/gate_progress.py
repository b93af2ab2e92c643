"""What a gate says while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmqual_perf.gate_journal import Journal
from vlmqual_perf.gate_launches import Launch


class Reporter:
    """A bar on a terminal, elsewhere a line when a block begins. A context manager.

    Args:
        total: launches that are made at most.
        blocks: that these are made in.
        journal: has those that were made earlier.
    """

    def __init__(self, total: int, blocks: int, journal: Journal) -> None:
        self.console = Console(highlight=False)
        self._journal = journal
        done = len(journal.launches)
        self._left = total - done
        self._blocks = blocks
        self._seconds: list[float] = []
        self._said = -1
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total} launches at most"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, completed=done)
        if done:
            self.say(f"{counted(done, 'launch')} made before are kept")

    def say(self, text: str) -> None:
        """Print a line as it is, however long."""
        self.console.print(text, soft_wrap=True, markup=False)

    def update(self, block: int, launch: Launch | None, cells: int) -> None:
        """Before a launch without it, after it with it."""
        if launch is None:
            self._bar.update(self._task, description=f"block {block + 1}, {counted(cells, 'cell')} open")
            if block != self._said and not self.console.is_terminal:
                self._said = block
                left = (
                    f", at most {_duration(self._left * float(np.mean(self._seconds)))} left" if self._seconds else ""
                )
                self.say(f"block {block + 1} of at most {self._blocks}: {counted(cells, 'cell')} open{left}")
            return
        self._left -= 1
        self._seconds.append(launch.wall_s)
        self._bar.advance(self._task)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            made = counted(len(self._journal.launches), "launch")
            self.say(f"interrupted; the same command goes on after {made}: {self._journal.path}")


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
