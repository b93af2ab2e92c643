"""Small statistics on raw values; everything is computed again by whoever reads the results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

STEADY_TOLERANCE = 0.05
NOISE_LIMIT = 0.10
RESAMPLES = 2000
TREND = 0.01
_SEEN = 1.96 + 0.84
_BEHIND = 10


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


def drift(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Relative change from the first to the last repetition where there is a trend, 0 where there is none.

    There is one when Kendall's tau between values and their order is different from 0 at the level `TREND`, and the
    line through the medians of the two halves rises or falls by more than `STEADY_TOLERANCE` over the whole.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 5:
        return 0.0
    first, second = np.array_split(data, 2)
    change = 2.0 * float(np.median(second) / np.median(first) - 1.0)
    if abs(change) <= STEADY_TOLERANCE:
        return 0.0
    from scipy.stats import kendalltau  # a second of importing, which most commands and many runs have no use for

    return change if kendalltau(np.arange(len(data)), data).pvalue < TREND else 0.0


def percentile(values: Sequence[float] | npt.NDArray[np.float64], share: float) -> float | None:
    """The value that a share of all does not exceed, None where fewer than ten values stand behind what does.

    That is 1,000 values for the 99th percentile, 200 for the 95th.

    Args:
        values: single values, in any order.
        share: 0.99 for the 99th percentile.
    """
    if len(values) * (1.0 - share) < _BEHIND - 1e-9:
        return None
    return float(np.quantile(np.asarray(values, dtype=np.float64), share))


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
