"""Performance: latency tables over TP for each scenario and phase.

Every value in a results file is already the slowest rank's, so ranks are never pooled here. Statistics are over
repetitions; for decode they are given twice, over all single steps (ITL) and over the mean step of each repetition
(TPOT). Quantiles interpolate linearly between order statistics. Units: milliseconds in the page, seconds in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from statistics import median as median_step
from typing import Any

import pandas as pd

from vlmqual_contract.records import Measurement, Run
from vlmqual_contract.scaling import Scaling, scaling, short

PHASES = ("load", "compile", "first-call", "preprocess", "vision", "prefill", "ttft", "decode")
ONCE = ("load", "compile", "first-call")  # one value each, which says nothing of how a size scales
STATES = ("failed", "wrong-bucket", "throttled", "not-steady", "noisy", "too-few", "valid")  # worst first
FEW = 20  # below this a 95th percentile is little more than the largest value
MANY = 1000  # from here on a 99th percentile has ten values behind it

_NAMES = {
    "load": "load checkpoint",
    "compile": "compile",
    "first-call": "first call",
    "preprocess": "preprocess",
    "vision": "vision",
    "prefill": "prefill",
    "ttft": "TTFT, request to first token",
}
_ITL = "decode ITL, every step"
_TPOT = "decode TPOT, mean step of a repetition"


@dataclass(frozen=True)
class Line:
    """A row of a latency table.

    Attributes:
        phase: name of the phase as in the file.
        name: for readers.
        tp: tensor-parallel size.
        median_ms: median, None without values.
        min_ms: smallest value.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile, None of fewer than 1,000 values.
        collectives: share of a call that the fastest and the slowest rank spend in collective operations.
        count: how many values the statistics are over.
        repetitions: how many repetitions were counted.
        scaling: the phase against TP=1; None at TP=1, without a TP=1 cell, when either failed, and for single values.
        tokens_per_s: batch divided by the median time per output token; TPOT only.
        state: the measurement's verdict on itself.
        reason: one sentence for anything but valid.
        bucket: fixed shapes that the request went into, "" where shapes are free.
        padding: share of what was computed there that nobody asked for.
        mbu: share of the memory's bandwidth that weights, keys and values took, None where it is not known.
        mfu: share of the peak of matrix products.
    """

    phase: str
    name: str
    tp: int
    median_ms: float | None
    min_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    collectives: tuple[float, float] | None
    count: int
    repetitions: int
    scaling: Scaling | None
    tokens_per_s: float | None
    state: str
    reason: str
    bucket: str = ""
    padding: float | None = None
    mbu: float | None = None
    mfu: float | None = None

    @property
    def why(self) -> str:
        """The reason in a few letters, "" unless it failed."""
        return short(self.reason) if self.state == "failed" else ""


@dataclass(frozen=True)
class Block:
    """A scenario of one run: what was fed, the latency table, the raw cells.

    Attributes:
        scenario: its id.
        family: `model_type`.
        batch: rows.
        dtype: declared compute dtype.
        shape: images, tiles, tokens and so on, where all phases agree.
        lines: the table, by phase and TP.
        cells: the measurements behind it, in the same order.
    """

    scenario: str
    family: str
    batch: int
    dtype: str
    shape: Mapping[str, int]
    lines: tuple[Line, ...]
    cells: tuple[Measurement, ...]

    def values_ms(self, phase: str) -> dict[int, list[float]]:
        """TP sizes to all values of a phase in milliseconds, cells that failed left out."""
        found: dict[int, list[float]] = {}
        for cell in self.cells:
            values = [value * 1e3 for repetition in cell.values_s for value in repetition]
            if cell.phase == phase and cell.state != "failed" and values:
                found.setdefault(cell.tp, []).extend(values)
        return dict(sorted(found.items()))

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that were tried, in order of a request."""
        return tuple(dict.fromkeys(cell.phase for cell in self.cells))

    @property
    def threads(self) -> str:
        """Compute threads of each rank, "" where no cell says."""
        found = {str(cell.checks["threads"]) for cell in self.cells if "threads" in cell.checks}
        return ", ".join(sorted(found))

    @property
    def fixed(self) -> bool:
        """True when a request went into fixed shapes."""
        return any(line.bucket for line in self.lines)

    @property
    def long(self) -> bool:
        """True when a phase has values enough for a 99th percentile."""
        return any(line.p99_ms is not None for line in self.lines)

    @property
    def collected(self) -> bool:
        """True when the time in collective operations was watched."""
        return any(line.collectives is not None for line in self.lines)

    @property
    def costed(self) -> bool:
        """True when a share of the device's ceilings is known."""
        return any(line.mbu is not None or line.mfu is not None for line in self.lines)

    @property
    def ceilings(self) -> tuple[str, ...]:
        """What the shares are of, in words."""
        return tuple(dict.fromkeys(text for cell in self.cells for text in _ceilings(cell)))

    @property
    def tables(self) -> tuple[tuple[str, tuple[Line, ...]], ...]:
        """The lines under their names, in order."""
        grouped: dict[str, list[Line]] = {}
        for line in self.lines:
            grouped.setdefault(line.name, []).append(line)
        return tuple((name, tuple(lines)) for name, lines in grouped.items())

    @property
    def states(self) -> dict[str, int]:
        """Number of measurements of each state that occurs, worst first."""
        return _states(self.cells)


@dataclass(frozen=True)
class Brief:
    """One TP size of a scenario in a single line: phases to the table rows whose medians stand for them."""

    block: Block
    tp: int
    lines: Mapping[str, Line]


def briefs(found: Sequence[Block]) -> list[Brief]:
    """One line for each scenario and TP size; TPOT stands for decode."""
    lines = []
    for block in found:
        for tp in sorted({line.tp for line in block.lines}):
            # TPOT comes after ITL, so it is the one that stays.
            lines.append(Brief(block, tp, {line.phase: line for line in block.lines if line.tp == tp}))
    return lines


def phases(found: Sequence[Block]) -> list[str]:
    """The phases that occur, in order of a request."""
    present = {phase for block in found for phase in block.phases}
    return [phase for phase in PHASES if phase in present] + sorted(present - set(PHASES))


def frame(measurements: Iterable[Measurement]) -> pd.DataFrame:
    """One row for every raw value: case, phase, repetition, step, seconds."""
    rows = [
        (cell.case, cell.phase, number, step, value)
        for cell in measurements
        for number, repetition in enumerate(cell.values_s)
        for step, value in enumerate(repetition)
    ]
    return pd.DataFrame(rows, columns=["case", "phase", "repetition", "step", "seconds"])


def blocks(run: Run) -> list[Block]:
    """The scenarios of a performance run, in the order of its plan, whatever order they were measured in."""
    grouped: dict[tuple[str, str, int, str], list[Measurement]] = {}
    for cell in run.measurements:
        grouped.setdefault((cell.scenario, cell.family, cell.batch, cell.dtype), []).append(cell)
    found = [
        Block(scenario, family, batch, dtype, _shape(cells), tuple(_lines(cells)), tuple(sorted(cells, key=_order)))
        for (scenario, family, batch, dtype), cells in grouped.items()
    ]
    planned = run.header.plan.get("scenarios")
    places = {name: place for place, name in enumerate(planned if isinstance(planned, list) else ())}
    return sorted(found, key=lambda block: places.get(block.scenario, len(places)))


def states(run: Run) -> dict[str, int]:
    """Number of measurements of each state that occurs."""
    return _states(run.measurements)


Series = dict[int, list[tuple[int, list[float]]]]


def prefill_by_image_tokens(found: Sequence[Block]) -> dict[str, Series]:
    """For each family TP sizes to (image tokens, prefill values in ms), scenarios of batch 1, by image tokens."""
    points: dict[str, Series] = {}
    for block in found:
        tokens = block.shape.get("image_tokens")
        if tokens is None or block.batch != 1:
            continue
        for tp, values in block.values_ms("prefill").items():
            points.setdefault(block.family, {}).setdefault(tp, []).append((int(tokens), values))
    return {name: {tp: sorted(series[tp]) for tp in sorted(series)} for name, series in sorted(points.items())}


def _states(cells: Iterable[Measurement]) -> dict[str, int]:
    found = dict.fromkeys(STATES, 0)
    for cell in cells:
        found[cell.state] += 1
    return {state: number for state, number in found.items() if number}


def _order(cell: Measurement) -> tuple[int, str, int]:
    return (PHASES.index(cell.phase) if cell.phase in PHASES else len(PHASES), cell.phase, cell.tp)


def _shape(cells: Sequence[Measurement]) -> dict[str, int]:
    seen: dict[str, set[int]] = {}
    for cell in cells:
        for key, value in cell.shape.items():
            if isinstance(value, (int, float)):
                seen.setdefault(str(key), set()).add(value)
    return {key: next(iter(values)) for key, values in seen.items() if len(values) == 1}


def _lines(cells: Sequence[Measurement]) -> list[Line]:
    data = frame(cells)
    steps = {str(case): group["seconds"] for case, group in data.groupby("case", sort=False)}
    means = {
        str(case): group.groupby("repetition")["seconds"].mean() for case, group in data.groupby("case", sort=False)
    }
    ordered = sorted(cells, key=_order)
    lines = []
    for phase in dict.fromkeys(cell.phase for cell in ordered):
        same = [cell for cell in ordered if cell.phase == phase]
        if phase == "decode":
            lines += [_line(cell, same, steps, _ITL) for cell in same]
            lines += [_line(cell, same, means, _TPOT, rate=True) for cell in same]
        else:
            lines += [_line(cell, same, steps, _NAMES.get(phase, phase)) for cell in same]
    return lines


def _line(
    cell: Measurement,
    same: Sequence[Measurement],
    series: Mapping[str, pd.Series[float]],
    name: str,
    rate: bool = False,
) -> Line:
    seconds = series.get(cell.case)
    median = None if seconds is None else float(seconds.median())
    return Line(
        phase=cell.phase,
        name=name,
        tp=cell.tp,
        median_ms=_ms(median),
        min_ms=None if seconds is None else _ms(float(seconds.min())),
        p95_ms=None if seconds is None else _ms(float(seconds.quantile(0.95))),
        p99_ms=None if seconds is None or len(seconds) < MANY else _ms(float(seconds.quantile(0.99))),
        collectives=None if rate else _collectives(cell),
        count=0 if seconds is None else len(seconds),
        repetitions=len(cell.values_s),
        scaling=_scaling(cell, same, fmean if rate else median_step),
        tokens_per_s=cell.batch / median if rate and median and cell.state != "failed" else None,
        state=cell.state,
        reason=cell.reason,
        bucket=str(cell.checks.get("bucket", "")),
        padding=_padding(cell),
        mbu=None if rate else _share(cell, "mbu"),
        mfu=None if rate else _share(cell, "mfu"),
    )


def _padding(cell: Measurement) -> float | None:
    asked, computed = (cell.checks.get(name) for name in ("asked", "computed"))
    if not isinstance(asked, int) or not isinstance(computed, int) or computed < 1:
        return None
    return 1 - asked / computed


def _collectives(cell: Measurement) -> tuple[float, float] | None:
    found = cell.checks.get("collectives")
    if not isinstance(found, Mapping):
        return None
    values = [found.get(name) for name in ("fastest_s", "slowest_s", "call_s")]
    known = [float(value) for value in values if isinstance(value, (int, float))]
    if len(known) < len(values) or not known[-1]:
        return None
    fastest, slowest, call = known
    return fastest / call, slowest / call


def _share(cell: Measurement, name: str) -> float | None:
    found = _card(cell).get(name)
    return float(found) if isinstance(found, int | float) and cell.state != "failed" else None


def _ceilings(cell: Measurement) -> list[str]:
    """The ceilings of a cost card, measured ones first, as the harness wrote them."""
    found = _card(cell).get("ceilings")
    lines = []
    for kind, one in found.items() if isinstance(found, Mapping) else ():
        figures = [
            f"{one[name] / scale:.3g} {unit}"
            for name, scale, unit in (
                ("bandwidth_bytes_per_s", 1e9, "GB/s"),
                ("flops_per_s", 1e12, f"TFLOP/s {one.get('dtype', '')}"),
            )
            if isinstance(one.get(name), int | float)
        ]
        if figures:
            lines.append(f"TP {cell.tp}, {kind}: {', '.join(figures)} ({one.get('source')})")
    return lines


def _card(cell: Measurement) -> Mapping[str, Any]:
    found = cell.checks.get("cost")
    return found if isinstance(found, Mapping) else {}


def _scaling(cell: Measurement, same: Sequence[Measurement], of: Callable[[Sequence[float]], float]) -> Scaling | None:
    base = [other for other in same if other.tp == 1]
    if cell.tp == 1 or cell.phase in ONCE or len(base) != 1:
        return None
    return scaling(base[0], cell, of)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
