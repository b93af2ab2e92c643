"""A clock that replays measured values, so that pytest-benchmark shows exactly what the worker measured.

pytest-benchmark takes its timer by name, so the values to replay are kept in this module.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable

_TICK_S = 1e-9
_times: deque[float] = deque()
_ticks = itertools.count()


def load(seconds: Iterable[float]) -> None:
    """Queue one value for each round that follows."""
    for value in seconds:
        _times.extend((0.0, value))  # from zero, so that the difference is the value to the last bit


def clock() -> float:
    """Called before and after a round, it lets exactly the round's recorded seconds pass.

    While nothing is queued it ticks in nanoseconds, which pytest-benchmark needs to look at its timer's precision.
    """
    return _times.popleft() if _times else next(_ticks) * _TICK_S
