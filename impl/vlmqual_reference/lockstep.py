"""Several runs of one model that go through it together, so that each block is read once for all of them.

A run is an ordinary function that calls the model. It has a thread of its own, of which only one is ever awake: when a
run calls a block it waits, and once every run waits the block that lies nearest in the data's order is read, computed
for all that wait for it, and dropped. Blocks are computed in the calling thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from vlmqual_reference.shelf import Shelf, Unit

Modes = Callable[[], AbstractContextManager[Any]]


class _Stopped(BaseException):
    """Raised in a waiting run that nobody wants to go on."""


@dataclass(frozen=True, eq=False)
class _Wish:
    """A block that a run waits for."""

    unit: int
    compute: Callable[[], Any]


@dataclass(eq=False)
class Run:
    """One run.

    Attributes:
        work: what it does; calls the model.
        modes: how its products are summed.
        ended: called in the calling thread when it has come to its end.
    """

    work: Callable[[], None]
    modes: Modes = nullcontext
    ended: Callable[[], None] = lambda: None
    _wish: _Wish | None = None
    _turn: tuple[int, int] = (0, -1)  # how often it has come back to an earlier unit, and the last unit
    _answers: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    _said: SimpleQueue[Any] = field(default_factory=SimpleQueue)


class Lockstep:
    """Lets runs go through a model together.

    Args:
        shelf: holds the model.
        passed: called with the unit and the number of runs after each block.
    """

    def __init__(self, shelf: Shelf, passed: Callable[[Unit, int], None] = lambda unit, runs: None) -> None:
        self._shelf = shelf
        self._passed = passed
        self._here = threading.local()
        for number, unit in enumerate(shelf.units):
            module: Any = unit.module
            module.forward = partial(self._meet, number, module.forward)

    def _meet(self, unit: int, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        run: Run = self._here.run
        run._said.put(_Wish(unit, partial(forward, *args, **named)))
        answer = run._answers.get()
        if isinstance(answer, _Stopped):
            raise answer
        return answer

    def go(self, runs: Iterable[Run]) -> None:
        """Bring runs to their ends.

        Raises:
            Exception: what one of them raised; the others are stopped.
        """
        waiting: list[Run] = []
        try:
            for run in runs:
                threading.Thread(target=self._work, args=(run,), daemon=True).start()
                waiting.append(run)
                self._listen(run, waiting)
            while waiting:
                self._pass(waiting)
        finally:
            for run in waiting:
                run._answers.put(_Stopped())

    def _pass(self, waiting: list[Run]) -> None:
        turn = min(map(_next, waiting))
        unit = self._shelf.units[turn[1]]
        now = [run for run in waiting if _next(run) == turn]
        with torch.no_grad(), self._shelf.loaded(unit):
            answers = [_computed(run) for run in now]
        self._passed(unit, len(now))
        for run in now:
            run._turn = turn
            run._answers.put(answers.pop(0))
            self._listen(run, waiting)

    def _listen(self, run: Run, waiting: list[Run]) -> None:
        """Wait until a run wants a block or ends."""
        run._wish = None
        said = run._said.get()
        if isinstance(said, _Wish):
            run._wish = said
            return
        waiting.remove(run)
        if said is not None:
            raise said
        run.ended()

    def _work(self, run: Run) -> None:
        self._here.run = run
        try:
            with run.modes():
                run.work()
        except _Stopped:
            return
        except BaseException as error:
            run._said.put(error)
        else:
            run._said.put(None)


def _next(run: Run) -> tuple[int, int]:
    """Place of a run's wish: a unit before the last one belongs to the next pass through the model."""
    assert run._wish is not None, "a run that waits has a wish"
    cycle, last = run._turn
    return (cycle + (run._wish.unit <= last), run._wish.unit)


def _computed(run: Run) -> Any:
    assert run._wish is not None, "a run that waits has a wish"
    with run.modes():
        return run._wish.compute()


def together(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Items in groups of at most `count`."""
    return [items[start : start + count] for start in range(0, len(items), count)]
