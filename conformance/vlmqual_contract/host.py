"""What the machine says of itself from moment to moment: load, clock frequency, temperature, energy; Linux's files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vlmqual_contract import sensors

_ROOT = Path("/")
_EVERY_S = 0.5


def readings(root: Path = _ROOT) -> dict[str, Any]:
    """The host at this moment.

    Args:
        root: where the file system begins.

    Returns:
        load (runnable processes, mean of the last minute), running (runnable threads now), frequency_hz (mean over the
        cores), temperature_c (of the hottest zone). A key is missing where the system does not say.
    """
    found: dict[str, Any] = {}
    words = _text(root / "proc/loadavg").split()
    if len(words) >= 4:
        found["load"] = float(words[0])
        found["running"] = int(words[3].partition("/")[0])
    clocks = [_number(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if known := [clock * 1e3 for clock in clocks if clock]:
        found["frequency_hz"] = sum(known) / len(known)
    zones = [_number(path) for path in root.glob("sys/class/thermal/thermal_zone*/temp")]
    if warm := [zone / 1e3 for zone in zones if zone]:
        found["temperature_c"] = max(warm)
    return found


@dataclass(frozen=True)
class Energy:
    """What was used over some time.

    Attributes:
        seconds: that it was watched.
        joules: by source: "rapl" is the processor's packages, anything else a device whose power was sampled.
        samples: how often power was read, 0 for counters.
    """

    seconds: float
    joules: Mapping[str, float]
    samples: int = 0


class Meter:
    """Watches energy while its context is open.

    The processor's packages count it (RAPL); of accelerators the power is sampled twice a second by their own tools and
    integrated. Where nothing can be read, `energy` has no joules.

    Attributes:
        energy: afterwards.
    """

    def __init__(self, root: Path = _ROOT) -> None:
        self.energy = Energy(0.0, {})
        self._root = root
        self._stop = threading.Event()
        self._power: list[tuple[float, dict[str, float]]] = []
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._before = _counters(self._root)
        self._start_s = time.monotonic()
        if _sample(self._power):  # no thread where no accelerator tells its power
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._start_s
        joules = used(self._before, _counters(self._root))
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            _sample(self._power)
            joules |= integrated(self._power)
        self.energy = Energy(seconds, joules, len(self._power))

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            _sample(self._power)


def _sample(power: list[tuple[float, dict[str, float]]]) -> bool:
    """Read the power of all accelerators; False where there is none to read."""
    watts = {one["device"]: one["power_w"] for one in sensors.readings() if one["power_w"] is not None}
    if watts:
        power.append((time.monotonic(), watts))
    return bool(watts)


def integrated(power: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Joules by device: the trapezoidal rule over (seconds, watts by device)."""
    joules: dict[str, float] = {}
    for (start_s, before), (end_s, after) in pairwise(power):
        for device in before.keys() & after.keys():
            joules[device] = joules.get(device, 0.0) + (end_s - start_s) * (before[device] + after[device]) / 2
    return joules


@dataclass(frozen=True)
class Counter:
    """An energy counter: microjoules, and the value behind which it begins again."""

    count_uj: float
    range_uj: float = field(default=0.0)


def _counters(root: Path) -> dict[str, Counter]:
    """Counters of the processor's packages; the parts of a package are in its own count."""
    found: dict[str, Counter] = {}
    for folder in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        count = _number(folder / "energy_uj")
        if folder.name.count(":") == 1 and count is not None and os.access(folder / "energy_uj", os.R_OK):
            found[folder.name] = Counter(count, _number(folder / "max_energy_range_uj") or 0.0)
    return found


def used(before: Mapping[str, Counter], after: Mapping[str, Counter]) -> dict[str, float]:
    """Joules between two readings of the same counters, each of which may have begun again once."""
    total, known = 0.0, before.keys() & after.keys()
    for name in known:
        gone = after[name].count_uj - before[name].count_uj
        total += (gone if gone >= 0 else gone + before[name].range_uj) / 1e6
    return {"rapl": total} if known else {}


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
