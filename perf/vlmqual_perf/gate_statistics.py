"""Is the candidate slower than the baseline? Numbers only; nothing here knows of files or targets.

The unit is the launch: one fresh start of the workers gives one value for each cell, the logarithm of its median time.
Launches are made in blocks A B B A or B A A B, so that every launch has a neighbour of the other arm. A neighbours'
difference of logarithms is a log-ratio; a steady drift of the machine enters the two of a block with opposite signs:
it leaves their mean alone and can only widen the interval.

After each block the log-ratios so far are looked at with Student's t, one-sided, three times:

- slower: the candidate's times are longer (against: not longer);
- faster: they are shorter (against: not shorter);
- same: they differ by less than the margin in either direction (two one-sided tests; the larger p-value counts).

A look may use up a share of the error that is allowed (`Rule.spent`); the shares of all looks sum to 1. A p-value is
divided by its look's share, and the smallest so far counts. By the union bound this is a p-value again, whatever the
looks have to do with each other and whenever one stops. Over the cells of a matrix the rule of Benjamini and Hochberg
is applied to it, in each direction with half of the error. It needs tests that are independent or positively
dependent; one-sided tests of cells that share the luck of their launches are that. (The rule of Benjamini and Yekutieli
would bear any dependence, for a threshold that is 4.7 times smaller over 60 cells; `perf/benchmarks/gate_power.py`
counts what the first lets through over cells that share their launches.)

A direction needs a p-value of at most half of the error in any case, so that the false alarms of a cell are at most
`Rule.alpha` however many other cells really changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

Floats = npt.NDArray[np.float64]
Word = Literal["regressed", "unchanged", "improved", "cannot tell"]
#: What the codes of `decide` mean.
WORDS: tuple[Word, ...] = ("cannot tell", "unchanged", "regressed", "improved")
UNDECIDED, UNCHANGED, REGRESSED, IMPROVED = range(4)

#: Fewest log-ratios of a look: three blocks. With fewer, Student's t asks for more than any change brings.
FEWEST = 6
_EXPONENT = 2.0


@dataclass(frozen=True)
class Rule:
    """When something is said of a cell.

    Attributes:
        pairs: largest number of log-ratios, which is the largest number of launches of an arm.
        margin: relative change that does not matter, 0.03 for 3 %.
        alpha: largest probability of "regressed" or "improved" for a cell without a change; half of it for each, and
            for "unchanged" of a cell that changed by the margin or more.
    """

    pairs: int = 20
    margin: float = 0.03
    alpha: float = 0.01

    def spent(self, pairs: int) -> float:
        """Share of the error that the looks up to a number of log-ratios may use: 0 before the first, 1 at the end."""
        return 0.0 if pairs < FEWEST else min(1.0, pairs / self.pairs) ** _EXPONENT

    def ends(self) -> tuple[int, ...]:
        """Numbers of log-ratios after each block, when none is missing."""
        return tuple(range(2, self.pairs + 1, 2))


@dataclass(frozen=True)
class Estimate:
    """How much a cell changed.

    Attributes:
        change: relative, of the geometric mean; positive when the candidate is slower.
        low: lower end of an interval that holds the truth at every look at once with probability 1 - alpha.
        high: upper end.
        noise: standard deviation of a log-ratio; of a launch in an unpaired comparison.
        pairs: log-ratios, or launches of the smaller arm, that it stands on.
    """

    change: float
    low: float
    high: float
    noise: float
    pairs: int


def launch_value(values_s: Sequence[Sequence[float]]) -> float:
    """Logarithm of the median over all steps of all repetitions of a launch, in log seconds.

    The median, since single hiccups of a busy machine are not the cell's; what slows fewer than half of the steps is
    not seen by it.

    Raises:
        ValueError: there is no value, or the median is not positive.
    """
    values = [value for steps in values_s for value in steps]
    middle = float(np.median(values)) if values else 0.0
    if not middle > 0:
        raise ValueError(f"the median of {len(values)} values is {middle:g} s")
    return float(np.log(middle))


def block(flipped: bool) -> tuple[str, str, str, str]:
    """The order of the arms in a block."""
    return ("B", "A", "A", "B") if flipped else ("A", "B", "B", "A")


def orders(blocks: int, seed: int) -> list[tuple[str, str, str, str]]:
    """The orders of all blocks: of each two neighbours one of either kind, the first of them drawn.

    So what bends in time (a machine that warms up) hits both arms alike as well.
    """
    draws = np.random.Generator(np.random.PCG64(seed)).random((blocks + 1) // 2) < 0.5
    return [block(bool(draws[index // 2]) != bool(index % 2)) for index in range(blocks)]


# one cell ------------------------------------------------------------------------------------------------------------


def paired(ratios: Floats, ends: Sequence[int], rule: Rule) -> Floats:
    """P-values of a cell after each block.

    Args:
        ratios: (..., n) log-ratios, candidate over baseline, in the order in which they were made.
        ends: how many of them there were after each block; does not fall.
        rule: margin and shares.

    Returns:
        (..., len(ends), 3) p-values of slower, faster and same, each the smallest so far; 1 before the first look.
    """
    shape = ratios.shape[:-1]
    found = np.ones((*shape, len(ends), 3))
    before, smallest = 0.0, np.ones((*shape, 3))
    for index, count in enumerate(ends):
        share = rule.spent(count) - before
        if share > 0:
            before += share
            part = ratios[..., :count]
            error = part.std(axis=-1, ddof=1) / count**0.5
            smallest = np.minimum(smallest, _three(part.mean(axis=-1), error, count - 1.0, rule.margin) / share)
        found[..., index, :] = smallest
    return found


def unpaired(a: Floats, b: Floats, ends: Sequence[int], rule: Rule, session: float) -> Floats:
    """The same for arms that were not launched side by side: Welch's t over launches.

    Args:
        a: (..., n) log values of the baseline's launches, all there from the start; at least 2.
        b: (..., m) of the candidate's, in the order in which they were made.
        ends: how many of these there were at each look.
        rule: margin and shares; `pairs` is the number of the candidate's launches at the last look.
        session: standard deviation of what a session adds to the logarithms of all its launches; it cannot be had from
            the launches, since each arm saw one session only.

    Returns:
        (..., len(ends), 3) p-values as of `paired`.
    """
    shape = b.shape[:-1]
    found = np.ones((*shape, len(ends), 3))
    before, smallest = 0.0, np.ones((*shape, 3))
    for index, count in enumerate(ends):
        share = rule.spent(count) - before
        if share > 0:
            before += share
            middle, error, freedom = _welch(a, b[..., :count], session)
            smallest = np.minimum(smallest, _three(middle, error, freedom, rule.margin) / share)
        found[..., index, :] = smallest
    return found


def estimate(ratios: Floats, ends: Sequence[int], rule: Rule) -> Estimate | None:
    """The change that paired log-ratios (n,) show; None where there was no look."""
    looked = _last(ends, rule)
    if looked is None:
        return None
    count, share = looked
    part = ratios[:count]
    noise = float(part.std(ddof=1))
    return _estimate(float(part.mean()), noise / count**0.5, count - 1.0, share, rule, noise, count)


def estimate_unpaired(a: Floats, b: Floats, ends: Sequence[int], rule: Rule, session: float) -> Estimate | None:
    """The change that launches show which were not made side by side; see `unpaired`."""
    looked = _last(ends, rule)
    if looked is None or len(a) < 2:
        return None
    count, share = looked
    middle, error, freedom = map(float, _welch(a, b[:count], session))
    noise = float(np.hypot(a.std(ddof=1), b[:count].std(ddof=1)) / 2**0.5)
    return _estimate(middle, error, freedom, share, rule, noise, min(len(a), count))


def _last(ends: Sequence[int], rule: Rule) -> tuple[int, float] | None:
    """The last look that had a share: its number of log-ratios, and that share."""
    before, found = 0.0, None
    for count in ends:
        share = rule.spent(count) - before
        if share > 0:
            before, found = before + share, (count, share)
    return found


def _estimate(
    middle: float, error: float, freedom: float, share: float, rule: Rule, noise: float, count: int
) -> Estimate:
    reach = float(-stdtrit(freedom, share * rule.alpha / 2)) * error
    ends = np.expm1([middle, middle - reach, middle + reach])
    return Estimate(float(ends[0]), float(ends[1]), float(ends[2]), noise, count)


def _welch(a: Floats, b: Floats, session: float) -> tuple[Floats, Floats, Floats]:
    """Difference of means, its standard error, and degrees of freedom (the session's part is known, not estimated)."""
    parts = [each.var(axis=-1, ddof=1) / each.shape[-1] for each in (a, b)]
    whole = parts[0] + parts[1] + 2 * session**2
    spread = parts[0] ** 2 / (a.shape[-1] - 1) + parts[1] ** 2 / (b.shape[-1] - 1)
    most = float(a.shape[-1] + b.shape[-1] - 2)
    freedom = np.divide(whole**2, spread, out=np.full_like(whole, most), where=spread > 0)
    return b.mean(axis=-1) - a.mean(axis=-1), whole**0.5, freedom


def _three(middle: Floats, error: Floats, freedom: Floats | float, margin: float) -> Floats:
    """(..., 3) p-values of slower, faster and same, from means (...) and their standard errors."""
    edge = np.log1p(margin)
    low, high = _above(middle + edge, error, freedom), _above(edge - middle, error, freedom)
    slower, faster = _above(middle, error, freedom), _above(-middle, error, freedom)
    return np.stack([slower, faster, np.maximum(low, high)], axis=-1)


def _above(middle: Floats, error: Floats, freedom: Floats | float) -> Floats:
    """One-sided p-values of "greater than 0"; launches that are all equal leave no doubt."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.divide(middle, error), nan=0.0, posinf=np.inf, neginf=-np.inf)
    found: Floats = np.asarray(stdtr(freedom, -ratio))
    return found


# a matrix of cells ---------------------------------------------------------------------------------------------------


def decide(values: Floats, rule: Rule) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Verdicts over a matrix of cells; a cell is decided at the first look that suffices, and stays so.

    Where a cell is within the margin and slower (or faster) at the same look, it is unchanged: what is known to be
    smaller than what matters is no regression.

    Args:
        values: (..., cells, looks, 3) p-values of `paired`.
        rule: the error that is allowed.

    Returns:
        (..., cells) codes, see `WORDS`; and the index of the deciding look, -1 for an undecided cell.
    """
    from scipy.stats import false_discovery_control  # takes a second, and `vlmqual --help` comes by here

    half = rule.alpha / 2
    codes = np.zeros(values.shape[:-2], np.int8)
    looks = np.full(values.shape[:-2], -1)
    current = np.ones((*values.shape[:-2], 3))
    for index in range(values.shape[-2]):
        left = codes == UNDECIDED
        current = np.where(left[..., None], np.minimum(values[..., index, :], 1.0), current)
        slower = false_discovery_control(current[..., 0], axis=-1) <= half
        faster = false_discovery_control(current[..., 1], axis=-1) <= half
        same = current[..., 2] <= half
        new = np.select([same, slower & ~faster, faster & ~slower], [UNCHANGED, REGRESSED, IMPROVED], UNDECIDED)
        codes = np.where(left, new, codes).astype(np.int8)
        looks = np.where(left & (new != UNDECIDED), index, looks)
    return codes, looks
