"""Small statistics on raw values; everything is computed again by whoever reads the results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

STEADY_TOLERANCE = 0.05
NOISE_LIMIT = 0.10
RESAMPLES = 2000
_SEEN = 1.96 + 0.84


def medians(repetitions: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """One value for each repetition: the median of its steps."""
    return np.array([float(np.median(steps)) for steps in repetitions])


def steady(values: Sequence[float] | npt.NDArray[np.float64], window: int) -> bool:
    """True when the medians of the last two windows agree within `STEADY_TOLERANCE`.

    Args:
        values: one for each repetition, in order.
        window: repetitions in a window.
    """
    if len(values) < 2 * window:
        return False
    before = float(np.median(values[-2 * window : -window]))
    after = float(np.median(values[-window:]))
    return abs(after - before) <= STEADY_TOLERANCE * max(before, after)


def drifts(values: Sequence[float] | npt.NDArray[np.float64]) -> bool:
    """True when the second half's median left the first half's by more than both their spreads explain.

    The halves' medians have to differ by more than `STEADY_TOLERANCE` and by more than three times the larger of the
    halves' median absolute deviations.
    """
    if len(values) < 5:
        return False
    first, second = np.array_split(np.asarray(values, dtype=np.float64), 2)
    gap = abs(float(np.median(second)) - float(np.median(first)))
    spread = max(deviation(first), deviation(second))
    return gap > STEADY_TOLERANCE * float(np.median(first)) and gap > 3.0 * spread


def deviation(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Median absolute deviation."""
    return float(np.median(np.abs(np.asarray(values) - np.median(values))))


def _resampled(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.Generator(np.random.PCG64(0)).integers(0, len(data), (RESAMPLES, len(data)))
    medians_: npt.NDArray[np.float64] = np.median(data[draws], axis=1)
    return medians_


def resolution(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Smallest relative change that two such measurements would show in 8 of 10 cases at the 5 % level.

    That is (1.96 + 0.84) standard errors of a difference of two medians; the standard error comes from the bootstrap.
    """
    middle = float(np.median(values))
    return _SEEN * 2.0**0.5 * float(np.std(_resampled(values))) / middle if middle else 0.0
