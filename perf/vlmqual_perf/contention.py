"""What else the machine was doing while a cell was measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil


@dataclass
class Watch:
    """Cores that processes other than ours kept busy since `start`.

    The figure is of the whole machine, so in a container it covers the neighbours too.
    """

    _busy_s: float = 0.0
    _ours_s: float = 0.0
    _began_s: float = 0.0
    _process: psutil.Process = field(default_factory=psutil.Process)

    def start(self) -> None:
        """Begin an interval."""
        self._busy_s, self._ours_s, self._began_s = _busy_s(), self._own_s(), time.monotonic()

    def others(self) -> float:
        """Cores that others kept busy, on average over the interval; too short intervals give 0."""
        elapsed = time.monotonic() - self._began_s
        if elapsed < 0.1:  # the system counts in ticks of 10 ms
            return 0.0
        busy = _busy_s() - self._busy_s - (self._own_s() - self._ours_s)
        return max(0.0, busy / elapsed)

    def _own_s(self) -> float:
        total = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                used = process.cpu_times()
            except psutil.Error:  # it has just ended
                continue
            total += used.user + used.system
        return total


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
