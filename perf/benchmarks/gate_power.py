"""What the gate finds and what it invents, by simulation, beside three other rules on the same launches.

    python perf/benchmarks/gate_power.py                     # assumed noise: session 1 %, launch 1 %, iteration 2 %
    python perf/benchmarks/gate_power.py --recorded perf/benchmarks/recorded_eager.json    # or any baseline file

Everything here is simulated, and says so. A row is a rule; of a cell without a change it counts false alarms (said to
be slower or faster), of a cell that became slower by 3 % how often that is found, with 95 % Monte-Carlo intervals
(Wilson's), and how many launches of each arm were needed.

The sessions: a level that neighbouring launches share and that jumps (on average every eight launches), or one that
wanders (autocorrelation 0.9 from launch to launch). The other rules get all launches of the gate's largest number, in
the same order; the rule of pytest-benchmark also as it is used, with one launch now and one of another session.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy import stats

from vlmqual_perf import gate_recorded
from vlmqual_perf.gate_statistics import IMPROVED, REGRESSED, UNCHANGED, UNDECIDED, Rule, decide, orders, paired

Floats = npt.NDArray[np.float64]
SLOWER = 0.03
FEWEST_RECORDED = 12
CHUNK = 2000


def sessions(kind: str, shape: tuple[int, int], generator: np.random.Generator) -> Floats:
    """(runs, launches) what the session adds, standard deviation 1."""
    draws = generator.standard_normal(shape)
    if kind == "wander":
        for index in range(1, shape[1]):
            draws[:, index] = 0.9 * draws[:, index - 1] + (1 - 0.9**2) ** 0.5 * draws[:, index]
        return draws
    jumps = np.cumsum(generator.random(shape) < 1 / 8, axis=1, dtype=np.int64)
    levels: Floats = np.take_along_axis(draws, jumps - jumps[:, :1], axis=1)
    return levels


def assumed(kind: str, repeats: int, generator: np.random.Generator) -> Callable[[int, int], Floats]:
    """(runs, launches, repeats) logarithms of times without a change: noise 1 % / 1 % / 2 %."""

    def draw(runs: int, launches: int) -> Floats:
        shared = 0.01 * sessions(kind, (runs, launches), generator)
        own = 0.01 * generator.standard_normal((runs, launches))
        return (shared + own)[..., None] + 0.02 * generator.standard_normal((runs, launches, repeats))

    return draw


def recorded(path: Path, case: str, repeats: int, generator: np.random.Generator) -> Callable[[int, int], Floats]:
    """The same from recorded launches of one cell: stretches of neighbours, each with some of its own repetitions.

    A stretch begins anywhere, runs in a circle, and has 8 launches on average, so that what neighbours share is kept.
    """
    kept = [one.cells[case] for one in gate_recorded.read("A", path, None).launches if case in one.cells]
    rows = [np.log([np.median(steps) for steps in each.values_s]) for each in kept if each.counts]
    count = min(len(row) for row in rows)
    table = np.array([row[:count] for row in rows])
    table -= np.median(table)

    def draw(runs: int, launches: int) -> Floats:
        begins = generator.integers(0, len(table), (runs, launches))
        breaks = generator.random((runs, launches)) < 1 / 8
        breaks[:, 0] = True
        last = np.maximum.accumulate(np.where(breaks, np.arange(launches), 0), axis=1)
        rows_ = (np.take_along_axis(begins, last, axis=1) + np.arange(launches) - last) % len(table)
        picked = generator.integers(0, count, (runs, launches, repeats))
        times: Floats = table[rows_[..., None], picked]
        return times

    return draw


def cells_of(path: Path) -> list[str]:
    """Names of the cells of a baseline file that have at least `FEWEST_RECORDED` launches that count."""
    launches = gate_recorded.read("A", path, None).launches
    names = dict.fromkeys(case for one in launches for case in one.cells)
    return [
        name
        for name in names
        if sum(name in one.cells and one.cells[name].counts for one in launches) >= FEWEST_RECORDED
    ]


# the rules: logarithms of times of both arms (runs, launches, repeats), in the order in which they were made --------


def gate(a: Floats, b: Floats, rule: Rule) -> tuple[Floats, Floats]:
    """+1 slower, -1 faster, 0 else; and launches of an arm."""
    ratios = np.median(b, axis=-1) - np.median(a, axis=-1)
    codes, looks = decide(paired(ratios, rule.ends(), rule)[:, None], rule)
    used = np.where(looks[:, 0] < 0, rule.pairs, np.array(rule.ends())[looks[:, 0]])
    word = codes[:, 0]
    return np.select([word == REGRESSED, word == IMPROVED, word == UNCHANGED], [1.0, -1.0, 0.0], np.nan), used


def mean_rule(a: Floats, b: Floats) -> Floats:
    """`--benchmark-compare-fail=mean:5%`: the mean of all repetitions grew by more than 5 %; it knows no faster."""
    before, after = (np.exp(each).mean(axis=(1, 2)) for each in (a, b))
    return np.where(after > 1.05 * before, 1.0, 0.0)


def two_sided(p: Floats, middle: Floats) -> Floats:
    """At the gate's level."""
    return np.where(p <= 0.01, np.sign(middle), 0.0)


def mann_whitney(a: Floats, b: Floats) -> Floats:
    """Over all repetitions, as if they were independent."""
    flat = [each.reshape(len(each), -1) for each in (a, b)]
    p = stats.mannwhitneyu(flat[1], flat[0], axis=1, method="asymptotic").pvalue
    return two_sided(p, np.median(flat[1], axis=1) - np.median(flat[0], axis=1))


def t_test(a: Floats, b: Floats) -> Floats:
    """Over all repetitions, as if they were independent."""
    flat = [np.exp(each).reshape(len(each), -1) for each in (a, b)]
    found = stats.ttest_ind(flat[1], flat[0], axis=1)
    return two_sided(found.pvalue, found.statistic)


# tables --------------------------------------------------------------------------------------------------------------


def arms(draw: Callable[[int, int], Floats], runs: int, rule: Rule, seed: int, change: float) -> tuple[Floats, Floats]:
    """Times of both arms, launched in blocks, and neighbours at the same place; the candidate is slower by `change`."""
    blocks = orders(rule.pairs // 2, seed)
    names = np.array([name for block in blocks for name in block])
    times = draw(runs, len(names))
    return times[:, names == "A"], times[:, names == "B"] + np.log1p(change)


def measure(
    draw: Callable[[int, int], Floats], rule: Rule, runs: int, change: float
) -> dict[str, tuple[Floats, Floats]]:
    """What each rule says in each run, and launches of an arm that it used."""
    found: dict[str, list[tuple[Floats, Floats]]] = {}
    for index in range(0, runs, CHUNK):
        count = min(CHUNK, runs - index)
        a, b = arms(draw, count, rule, index, change)
        whole, one = np.full(count, float(rule.pairs)), np.full(count, 1.0)
        then = draw(count, 1)  # another session's launch
        said = {
            "vlmqual gate": gate(a, b, rule),
            "mean:5%, one launch each": (mean_rule(then, b[:, :1]), one),
            "mean:5%, all launches": (mean_rule(a, b), whole),
            "Mann-Whitney on iterations": (mann_whitney(a, b), whole),
            "t-test on iterations": (t_test(a, b), whole),
        }
        for name, values in said.items():
            found.setdefault(name, []).append(values)
    return {
        name: (np.concatenate([v for v, _ in rows]), np.concatenate([n for _, n in rows]))
        for name, rows in found.items()
    }


def share(hits: npt.NDArray[np.bool_]) -> str:
    """Percentage with its 95 % interval (Wilson)."""
    found = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return f"{100 * hits.mean():.2f} ({100 * found.low:.2f} to {100 * found.high:.2f})"


def table(
    title: str, draw: Callable[[int, int], Floats], rule: Rule, runs: int, wanted: float, console: Console
) -> bool:
    """Print one table; False when the gate has more false alarms than allowed, or finds less than `wanted`."""
    same, slower = (measure(draw, rule, runs, change) for change in (0.0, SLOWER))
    shown = Table(title=f"simulated: {title}; {runs} runs", title_justify="left", box=None, pad_edge=False)
    shown.add_column("rule")
    for name in ("false alarms %", f"+{100 * SLOWER:g} % found %", "launches"):
        shown.add_column(name, justify="right")
    for name in same:
        alarms, found = np.nan_to_num(same[name][0]) != 0, slower[name][0] == 1
        launches = f"{same[name][1].mean():.1f} / {slower[name][1].mean():.1f}"
        shown.add_row(name, share(alarms), share(found), launches)
    console.print(shown)
    own = same["vlmqual gate"][0]
    console.print(
        f"the gate without a change: {share(own == 0)} % unchanged, {share(np.isnan(own))} % cannot tell; "
        "launches of an arm without / with the change",
        soft_wrap=True,
    )
    console.print()
    return bool(np.mean(np.nan_to_num(own) != 0) <= rule.alpha and np.mean(slower["vlmqual gate"][0] == 1) >= wanted)


def other_noises(rule: Rule, runs: int, generator: np.random.Generator, console: Console) -> bool:
    """False alarms of the gate where launches are not normal; a normal part of 0.2 % is added to each."""
    shape = (runs, 2 * rule.pairs)
    launches = {
        "two modes 5 % apart, as often": 0.05 * (generator.random(shape) < 0.5),
        "two modes 20 % apart, as often": 0.20 * (generator.random(shape) < 0.5),
        "one launch in ten 20 % slower": 0.20 * (generator.random(shape) < 0.1),
        "Student's t, 3 degrees of freedom": 0.01 * generator.standard_t(3, shape),
        "exponential": 0.01 * generator.exponential(size=shape),
    }
    shown = Table(
        title=f"simulated: the gate over other noises; {runs} runs", title_justify="left", box=None, pad_edge=False
    )
    shown.add_column("launches")
    for name in ("false alarms %", "unchanged %", "cannot tell %"):
        shown.add_column(name, justify="right")
    fine = True
    for name, drawn in launches.items():
        times = drawn + 0.002 * generator.standard_normal(shape)
        codes = decide(paired(times[:, ::2] - times[:, 1::2], rule.ends(), rule)[:, None], rule)[0][:, 0]
        alarms = (codes == REGRESSED) | (codes == IMPROVED)
        shown.add_row(name, share(alarms), share(codes == UNCHANGED), share(codes == UNDECIDED))
        fine = fine and float(alarms.mean()) <= rule.alpha
    console.print(shown)
    console.print()
    return fine


def matrix(rule: Rule, runs: int, generator: np.random.Generator, console: Console, repeats: int = 7) -> bool:
    """False discoveries among 30 cells that share their launches' luck; 6 of them became slower by 3 %, or none."""
    cells, changed, chunk = 30, 6, 200
    change = np.where(np.arange(cells) < changed, np.log1p(SLOWER), 0.0)[:, None]
    names = np.array([name for block in orders(rule.pairs // 2, 1) for name in block])
    discoveries: list[Floats] = []
    found: list[Floats] = []
    alarmed: list[npt.NDArray[np.bool_]] = []
    for _ in range(0, runs, chunk):
        shape = (chunk, cells, len(names))
        shared = 0.01 * sessions("jump", (chunk, len(names)), generator)
        luck = 0.01 * 0.5**0.5 * generator.standard_normal((chunk, len(names)))  # half of a launch's variance
        own = 0.01 * 0.5**0.5 * generator.standard_normal(shape)
        rest = np.median(0.02 * generator.standard_normal((*shape, repeats)), axis=-1)
        times = (shared + luck)[:, None] + own + rest
        ratios = times[..., names == "B"] - times[..., names == "A"]
        said = _alarms(ratios + change, rule)
        discoveries.append(said[:, changed:].sum(axis=1) / np.maximum(1, said.sum(axis=1)))
        found.append(said[:, :changed].mean(axis=1))
        alarmed.append(np.any(_alarms(ratios, rule), axis=1))
    rate, complete, any_alarm = np.concatenate(discoveries), np.concatenate(found), np.concatenate(alarmed)
    console.print(
        f"simulated: {cells} cells that share half of a launch's luck, {len(rate)} runs\n"
        f"  {changed} of them slower by 3 %: false-discovery rate {100 * rate.mean():.2f} %, "
        f"{100 * complete.mean():.2f} % of the slower ones found\n"
        f"  none changed: {share(any_alarm)} % of the gates have any false alarm",
        soft_wrap=True,
    )
    return bool(rate.mean() <= rule.alpha and any_alarm.mean() <= rule.alpha)


def _alarms(ratios: Floats, rule: Rule) -> npt.NDArray[np.bool_]:
    """(runs, cells) said to be slower or faster."""
    return np.isin(decide(paired(ratios, rule.ends(), rule), rule)[0], (REGRESSED, IMPROVED))


def main() -> int:
    """Print the tables; 1 when the gate does not do what is asked of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=20000, help="of each row (20000)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions in a launch (7)")
    parser.add_argument("--launches", type=int, default=20, help="of each arm at most (20)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--recorded",
        type=Path,
        metavar="FILE",
        help=f"a baseline file; cells with at least {FEWEST_RECORDED} launches that count",
    )
    args = parser.parse_args()
    generator = np.random.Generator(np.random.PCG64(args.seed))
    console, rule, start = Console(width=100, highlight=False), Rule(pairs=args.launches), time.monotonic()
    if args.recorded:
        names = cells_of(args.recorded)
        sources = {
            f"noise recorded of {name}": recorded(args.recorded, name, args.repeats, generator) for name in names
        }
    else:
        said = "session 1 %, launch 1 %, iteration 2 %"
        sources = {
            f"{said}, sessions jump": assumed("jump", args.repeats, generator),
            f"{said}, sessions wander": assumed("wander", args.repeats, generator),
        }
    wanted = 0.0 if args.recorded else 0.99  # a machine's noise is what it is
    fine = [table(title, draw, rule, args.runs, wanted, console) for title, draw in sources.items()]
    if not args.recorded:
        fine.append(other_noises(rule, args.runs, generator, console))
        fine.append(matrix(rule, args.runs // 4, generator, console, args.repeats))
    console.print(f"{time.monotonic() - start:.0f} s")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
