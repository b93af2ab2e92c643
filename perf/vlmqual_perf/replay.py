"""A clock that replays measured values, so that pytest-benchmark shows exactly what the worker measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class ReplayClock:
    """Called before and after a round, it lets exactly the round's recorded seconds pass.

    While nothing is loaded it ticks in nanoseconds, which is what pytest-benchmark needs to look at its precision.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self._idle_s = 0.0

    def load(self, seconds: Iterable[float]) -> None:
        """Queue one value for each round."""
        for value in seconds:
            self._times += (0.0, value)  # from zero, so that the difference is the value to the last bit

    def __call__(self) -> float:
        """The next point in time."""
        if self._times:
            return self._times.popleft()
        self._idle_s += 1e-9
        return self._idle_s


clock = ReplayClock()
