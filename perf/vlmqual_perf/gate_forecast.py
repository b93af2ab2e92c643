"""What a gate will be able to see, said before it starts: the rule of `gate_statistics` over simulated launches.

Everything here is predicted from a noise that is assumed or was recorded earlier.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmqual_contract.errors import UsageError
from vlmqual_perf.gate_recorded import read
from vlmqual_perf.gate_statistics import REGRESSED, UNCHANGED, Floats, Rule, decide, paired, unpaired

Codes = npt.NDArray[np.int8]
WANTED = 0.99
_LARGEST = 0.5
_HALVINGS = 10


@dataclass(frozen=True)
class Noise:
    """What repeats of the same thing differ by, as standard deviations of logarithms.

    Attributes:
        launch: between launches, neighbours in time.
        iteration: between repetitions of one launch.
        session: between sessions; neighbours share it, so that it matters to unpaired comparisons only.
    """

    launch: float = 0.01
    iteration: float = 0.02
    session: float = 0.01

    def value(self, repeats: int) -> float:
        """Of a launch's value, which is the median of so many repetitions (the variance by its usual approximation)."""
        half_pi = np.pi / 2
        return float((self.launch**2 + self.iteration**2 * half_pi / (repeats + half_pi - 1)) ** 0.5)


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a gate.

    Attributes:
        smallest: the smallest slowdown that is called regressed in 99 of 100 gates, relative; infinite beyond 50 %.
        launches_same: expected launches of an arm until a cell without a change is decided.
        launches_slower: the same for a cell that became slower by `smallest`.
        settled: probability that a cell without a change is called unchanged.
    """

    smallest: float
    launches_same: float
    launches_slower: float
    settled: float


@cache
def forecast(spread: float, rule: Rule, cells: int = 1, runs: int = 1000, seed: int = 1) -> Forecast:
    """Of a paired gate.

    Args:
        spread: standard deviation of a launch's value (`Noise.value`).
        rule: as the gate will use it.
        cells: of the matrix; one of them changes, all others do not.
        runs: simulated gates.
        seed: of the simulation; the same numbers give the same forecast.
    """
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal((runs, rule.pairs))

    def outcome(change: float) -> tuple[Codes, Floats]:
        return _outcome(paired(normal * 2**0.5 * spread + np.log1p(change), rule.ends(), rule), rule, cells)

    return _search(outcome)


@cache
def forecast_unpaired(
    spread: float, recorded: int, session: float, rule: Rule, cells: int = 1, runs: int = 1000, seed: int = 1
) -> Forecast:
    """Of a candidate that is launched against launches recorded earlier, `recorded` of them; else as `forecast`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    a, b = generator.standard_normal((2, runs, max(recorded, rule.pairs)))
    shift = generator.standard_normal(runs) * 2**0.5 * session

    def outcome(change: float) -> tuple[Codes, Floats]:
        there = b * spread + (shift + np.log1p(change))[:, None]
        values = unpaired(a[:, :recorded] * spread, there[:, : rule.pairs], rule.ends(), rule, session)
        return _outcome(values, rule, cells)

    return _search(outcome)


def _outcome(values: Floats, rule: Rule, cells: int) -> tuple[Codes, Floats]:
    """Codes and launches of an arm for (runs, looks, 3) p-values of one cell among others that did not change."""
    alone = values * [cells, cells, 1]  # the smallest of so many p-values is held against the error divided by them
    codes, looks = decide(alone[:, None], rule)
    launches = np.where(looks[:, 0] < 0, rule.pairs, np.array(rule.ends())[looks[:, 0]])
    return codes[:, 0], launches


def _search(outcome: Callable[[float], tuple[Codes, Floats]]) -> Forecast:
    """The smallest change by bisection; detection rises with the change, since all changes see the same numbers."""

    def seen(change: float) -> float:
        return float(np.mean(outcome(change)[0] == REGRESSED))

    codes, launches = outcome(0.0)
    settled = float(np.mean(codes == UNCHANGED))
    if seen(_LARGEST) < WANTED:
        return Forecast(float("inf"), float(np.mean(launches)), float("nan"), settled)
    low, high = 0.0, _LARGEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) >= WANTED else (middle, high)
    return Forecast(high, float(np.mean(launches)), float(np.mean(outcome(high)[1])), settled)


def noise_of(text: str) -> Noise | float:
    """What `--noise` says: two percentages, or the typical spread of launches in a file.

    Args:
        text: "LAUNCH,ITERATION" in percent, or the path of a gate.json or a baseline file.

    Returns:
        The assumed noise, or the recorded standard deviation of a launch's value.

    Raises:
        UsageError: it is neither.
    """
    path = Path(text)
    if path.suffix == ".json":
        return _recorded_spread(path)
    try:
        launch, iteration = (float(part) / 100 for part in text.split(","))
    except ValueError:
        raise UsageError(f"--noise {text!r} is neither LAUNCH,ITERATION in percent, such as 1,2, nor a file") from None
    if not (0 <= launch < 1 and 0 <= iteration < 1 and math.hypot(launch, iteration) > 0):
        raise UsageError(f"--noise {text!r}: percentages between 0 and 100 are valid, not both 0")
    return Noise(launch, iteration)


def _recorded_spread(path: Path) -> float:
    """Median over cells of the standard deviation of a launch's value, from a gate or from a baseline's neighbours."""
    try:
        data = json.loads(path.read_text("utf-8"))
        spreads = [float(cell["noise"]) / 2**0.5 for cell in data.get("cells", []) if cell.get("noise")]
    except OSError as error:
        raise UsageError(f"--noise {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--noise {path} is no gate.json and no baseline file") from error
    if not spreads:
        recorded = read("A", path, None)
        for case in dict.fromkeys(case for one in recorded.launches for case in one.cells):
            kept = [one.cells[case] for one in recorded.launches if case in one.cells]
            found = np.array([each.value for each in kept if each.counts])
            if len(found) > 2:
                spreads.append(float(np.sqrt(np.mean(np.diff(found) ** 2) / 2)))
    if not spreads:
        raise UsageError(f"--noise {path} has no cell with several launches")
    return float(np.median(spreads))
