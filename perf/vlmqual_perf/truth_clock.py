"""Time that is known: work is booked, takes as long as it was told to, and what it really took is written down.

A sleep is never exactly as long as it was meant to be, least of all on a busy machine, so the truth is the log and not
the intention: every piece of work is logged with the moment at which it began and the moment at which it was seen done.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmqual_contract.errors import UsageError

#: The end of a wait is spun, since a sleep wakes up late by some ten microseconds or more.
_SPIN_S = 2e-4
_RAMP_S = 2.0
_MISS = 2.0


@dataclass(frozen=True)
class Pace:
    """How long things take.

    Attributes:
        seconds: of a call by phase: "preprocess", "vision", "prefill", "decode".
        jitter: relative standard deviation of a call, drawn for each rank.
        straggler: factor by which one rank, another at every call, is slower.
        cold_s: what the first call of a phase takes besides, and every cold start.
        cold: probability of a cold start of a later call.
        bucket_miss: probability that a call runs in a bucket that is too large, which takes twice as long.
        throttle: relative slowdown that is reached after two seconds of work.
        seed: of everything that is drawn.
    """

    seconds: dict[str, float]
    jitter: float = 0.0
    straggler: float = 1.0
    cold_s: float = 0.0
    cold: float = 0.0
    bucket_miss: float = 0.0
    throttle: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Entry:
    """One piece of work that was done.

    Attributes:
        phase: of the call, or "load".
        rank: that did it.
        began_s: when it was asked for, or when the work before it was done; monotonic clock of this machine.
        ended_s: when it was seen done.
        disturbed: "" or "cold" or "miss".
    """

    phase: str
    rank: int
    began_s: float
    ended_s: float
    disturbed: str = ""

    @property
    def seconds(self) -> float:
        """What it really took."""
        return self.ended_s - self.began_s


class Clock:
    """The device of one rank: a queue of work.

    Args:
        pace: how long things take.
        rank: this rank.
        ranks: how many there are.
        queued: calls only book work, and waiting does it; without, every call waits.
    """

    def __init__(self, pace: Pace, rank: int, ranks: int, *, queued: bool) -> None:
        self._done: list[tuple[str, float, str]] = []
        self._ended: list[float] = []
        self._told = True
        self._pace = pace
        self._rank = rank
        self._ranks = ranks
        self._queued = queued
        self._waiting: list[tuple[str, float, float, str]] = []
        self._ready_s = 0.0
        self._busy_s = 0.0
        self._seen: set[str] = set()
        self._own = np.random.Generator(np.random.PCG64([pace.seed, 1 + rank]))
        self._shared = np.random.Generator(np.random.PCG64([pace.seed, 0]))  # the same draws on every rank

    def now(self) -> float:
        """This moment, in seconds."""
        return time.perf_counter()

    def book(self, phase: str, now: float) -> str:
        """Ask for one call's work; how it is disturbed.

        Args:
            phase: of the call.
            now: when the call began; drawing numbers is part of what it takes.
        """
        began = max(now, self._ready_s)
        seconds, disturbed = self._takes(phase)
        self._ready_s = began + seconds
        self._waiting.append((phase, began, self._ready_s, disturbed))
        return disturbed

    def leave(self) -> None:
        """The call is about to return: wait for its work, unless it is queued."""
        if not self._queued:
            self.wait()

    def wait(self) -> None:
        """Return when all work is done.

        Work ends when the host learns of it: for a call that waited by itself, at the wait that follows it.
        """
        if self._waiting:
            waiting, self._waiting, self._told = self._waiting, [], self._queued
            for phase, began, ready, disturbed in waiting:
                _until(ready)
                self._done.append((phase, began, disturbed))
                self._ended.append(time.perf_counter())
        elif not self._told:
            self._told = True
            self._ended[-1] = time.perf_counter()

    def pause(self, phase: str, seconds: float) -> None:
        """Take this long now."""
        began = time.perf_counter()
        _until(began + seconds)
        self._done.append((phase, began, ""))
        self._ended.append(time.perf_counter())

    @property
    def log(self) -> list[Entry]:
        """What was done so far, in order."""
        done = zip(self._done, self._ended, strict=True)
        return [Entry(phase, self._rank, began, ended, disturbed) for (phase, began, disturbed), ended in done]

    @property
    def latest_s(self) -> float:
        """What the latest piece of work really took."""
        return self._ended[-1] - self._done[-1][1]

    def _takes(self, phase: str) -> tuple[float, str]:
        pace = self._pace
        seconds = pace.seconds[phase] * float(np.exp(pace.jitter * self._own.standard_normal()))
        slow, cold, miss = self._shared.random(3)
        if self._ranks > 1 and int(slow * self._ranks) == self._rank:
            seconds *= pace.straggler
        seconds *= 1.0 + pace.throttle * min(1.0, self._busy_s / _RAMP_S)
        disturbed = ""
        if miss < pace.bucket_miss:
            seconds, disturbed = _MISS * seconds, "miss"
        if phase not in self._seen or cold < pace.cold:
            seconds, disturbed = seconds + pace.cold_s, "cold" if pace.cold_s else disturbed
        self._seen.add(phase)
        self._busy_s += seconds
        return seconds, disturbed


def _until(moment_s: float) -> None:
    left = moment_s - time.perf_counter()
    if left > _SPIN_S:
        time.sleep(left - _SPIN_S)
    while time.perf_counter() < moment_s:
        pass


def write(folder: Path, log: list[Entry]) -> None:
    """Write a session's log as JSON lines, in a file of its own.

    Raises:
        UsageError: the folder cannot be written.
    """
    if not log:
        return
    rank, lines = log[0].rank, [json.dumps(list(vars(entry).values())) for entry in log]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"truth-{rank}-{os.getpid()}-{log[0].began_s:.9f}.jsonl"
        path.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise UsageError(f"log {folder}: {error.strerror or error}") from error


def read(folder: Path) -> dict[int, list[Entry]]:
    """The logs in a folder: by rank, all sessions one after the other."""
    found: dict[int, list[Entry]] = {}
    for entry in _entries(folder):
        found.setdefault(entry.rank, []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: entry.began_s)
    return found


def _entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("truth-*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            yield Entry(*json.loads(line))
