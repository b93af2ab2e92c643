"""What tensor parallelism is worth: speed-up, efficiency, their confidence intervals; and failures in a few letters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from vlmqual_contract.records import Measurement

LEAST = 5
_LEVEL = 0.95
#: What reasons say, as patterns, and what stands for them in a table.
_SHORT: Mapping[str, str] = {
    r"compared with TP=1": "no TP=1",
    r"(\w+) do(?:es)? not divide by (\d+)": r"\1 % \2",
    r"lacks tensor-parallel": "one device",
    r"tensor-parallel size \d+ is larger than": "too large",
    r"time limit of [^ ]+ s is over": "time limit",
    r"no answer to|did not take": "no answer",
    r"process ended|process has ended": "crashed",
    r"from TP=1's|than TP=1's|from TP=1 ": "not TP=1's",
    r"different tokens": "tokens vary",
    r"does not declare": "not offered",
}


@dataclass(frozen=True)
class Scaling:
    """How much faster a size is than one device.

    Attributes:
        tp: the size n.
        speedup: S(n) = T(1) / T(n).
        interval: 95 % confidence interval of the speed-up; None where one has fewer than `LEAST` repetitions.
    """

    tp: int
    speedup: float
    interval: tuple[float, float] | None

    @property
    def efficiency(self) -> float:
        """S(n) / n."""
        return self.speedup / self.tp

    @property
    def efficiency_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the efficiency: the speed-up's, divided by n."""
        return None if self.interval is None else (self.interval[0] / self.tp, self.interval[1] / self.tp)


def scaling(one: Measurement, many: Measurement, of: Callable[[Sequence[float]], float] = median) -> Scaling | None:
    """A size against one device; None where one of the two failed.

    T is the median over repetitions; of decode, whose repetitions have many steps, of their median step. The interval
    is Price and Bonett's for a ratio of two medians (Journal of Statistical Computation and Simulation 72, 2002,
    pp. 119-124): the standard error of the logarithm of each median comes from two of its order statistics, so nothing
    is assumed of the shape of the noise. It speaks of the repetitions of one launch of each size, not of how launches
    differ.

    Args:
        one: the cell at tensor-parallel size 1.
        many: the same cell at another size.
        of: what stands for the steps of a repetition.
    """
    if "failed" in (one.state, many.state):
        return None
    times = [[of(steps) for steps in cell.values_s if steps] for cell in (one, many)]
    if not all(times) or min(map(min, times)) <= 0:
        return None
    speedup = median(times[0]) / median(times[1])
    if min(map(len, times)) < LEAST:
        return Scaling(many.tp, speedup, None)
    error = math.hypot(*map(_log_error, times))
    factor = math.exp(NormalDist().inv_cdf((1 + _LEVEL) / 2) * error)
    return Scaling(many.tp, speedup, (speedup / factor, speedup * factor))


def _log_error(values: Sequence[float]) -> float:
    """Standard error of the logarithm of the median of positive values, from the c-th smallest and c-th largest."""
    ordered, n = sorted(values), len(values)
    c = max(1, round((n + 1) / 2 - math.sqrt(n)))
    outside = 2 * sum(math.comb(n, i) for i in range(c)) / 2**n
    z = NormalDist().inv_cdf(1 - outside / 2)
    return math.log(ordered[n - c] / ordered[c - 1]) / (2 * z)


def short(reason: str) -> str:
    """What went wrong in a few letters, for a table; "failed" for anything that is not known here."""
    for pattern, words in _SHORT.items():
        if found := re.search(pattern, reason):
            return found.expand(words)
    return "failed"
