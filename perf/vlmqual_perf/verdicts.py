"""What a measurement says of itself: whether its figures may be used, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmqual_contract.records import State
from vlmqual_perf import statistics

#: Fewer repetitions say nothing of their spread.
LEAST = 5
#: A single value this many times its own usual one is no jitter: a compilation, a cold cache, another bucket.
STRAY = 1.5
#: What a stray value has to be above its usual one, so that a few microseconds of the host do not count.
STRAY_S = 1e-4
#: Relative loss of clock frequency during a measurement that counts as throttling.
SLOWER = 0.05


@dataclass(frozen=True)
class Seen:
    """What is known of a measurement when it is judged.

    Attributes:
        values_s: a list for each counted repetition, in it a value for each step.
        warm: the warm-up came to its end.
        buckets: for each counted repetition the fixed shapes of its calls; empty where there are none.
        compiled: functions that were compiled while it was counted.
        before: the host's readings when counting began (`sensors.host`).
        after: and when it ended.
    """

    values_s: Sequence[Sequence[float]]
    warm: bool = True
    buckets: Sequence[Sequence[str]] = ()
    compiled: int = 0
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None


def judge(seen: Seen) -> tuple[State, str]:
    """The state of a measurement, and one sentence for anything but a valid one.

    The first that applies: too few values, wrong bucket, throttled, not steady, noisy.
    """
    values = statistics.medians(seen.values_s)
    if len(values) < LEAST:
        return "too-few", f"{len(values)} repetitions say nothing of the spread"
    shapes = list(dict.fromkeys(bucket for buckets in seen.buckets for bucket in buckets))
    if len(shapes) > 1:
        return "wrong-bucket", f"equal calls ran in {len(shapes)} buckets: {', '.join(shapes)}"
    if seen.compiled:
        return "wrong-bucket", f"{seen.compiled} functions were compiled while it was measured"
    if (lost := _lost(seen)) > SLOWER:
        return "throttled", f"the clock frequency fell by {lost:.0%} while it was measured"
    if not seen.warm:
        return "not-steady", "warm-up windows did not come to agree"
    if slope := statistics.drift(values):
        if slope > 0:
            return "throttled", f"it became slower by {slope:.0%} while it was measured"
        return "not-steady", f"it became faster by {-slope:.0%} while it was measured"
    if strays := stray(seen.values_s):
        count = sum(len(steps) for steps in seen.values_s)
        return "noisy", f"{len(strays)} of {count} values stand far off, the worst at {max(strays):.1f} times the usual"
    found = statistics.resolution(values)
    if found > statistics.NOISE_LIMIT:
        return "noisy", f"a change below {found:.0%} could not have been seen"
    return "valid", ""


def stray(values_s: Sequence[Sequence[float]]) -> list[float]:
    """Values that are more than `STRAY` times the usual one, as such ratios.

    The usual value of a step is the median of that step over the repetitions: later steps read a longer cache.
    """
    table = np.asarray(values_s, dtype=np.float64)
    usual = np.median(table, axis=0)
    far = (table > STRAY * usual) & (table > usual + STRAY_S)
    ratios = table / np.where(usual > 0, usual, 1.0)
    return [float(ratio) for ratio in ratios[far]]


def _lost(seen: Seen) -> float:
    """Relative loss of the host's mean clock frequency, 0 where it is not readable."""
    before, after = (readings.get("frequency_hz") if readings else None for readings in (seen.before, seen.after))
    return 1.0 - after / before if before and after else 0.0
