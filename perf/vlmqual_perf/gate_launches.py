"""One launch: workers are started afresh, some cells are measured, workers are ended. Also what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from vlmqual_contract.errors import TargetFailure, Unsupported, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Measurement
from vlmqual_contract.remote import RemoteTarget
from vlmqual_perf.bench import Bench
from vlmqual_perf.gate_statistics import Floats, launch_value
from vlmqual_perf.plan import Cell

Name = Literal["A", "B"]
#: States of a measurement that say that its values are not those of the cell. A noisy one, or one of few repetitions,
#: counts: the launch is the unit, and what it is worth shows in how launches differ.
NOT_COUNTED = ("failed", "not-steady", "throttled", "wrong-bucket")


@dataclass(frozen=True)
class Settings:
    """How launches are made, the same for both arms.

    Attributes:
        threads: compute threads of each rank.
        repeats: least number of counted repetitions of a cell.
        cell_s: seconds to spend on a cell beyond that.
        limits: time limits of a call.
        checkpoint: the user's own checkpoint instead of the scenarios'.
    """

    threads: int
    repeats: int = 7
    cell_s: float = 0.5
    limits: Limits = field(default_factory=Limits)
    checkpoint: Path | None = None

    def plain(self) -> dict[str, Any]:
        """What has to be equal for launches to be comparable."""
        return {"threads": self.threads, "repeats": self.repeats, "cell_s": self.cell_s}


@dataclass(frozen=True)
class Arm:
    """One side of a comparison that can be launched.

    Attributes:
        name: "A" is the baseline, "B" the candidate.
        target: target string.
        python: interpreter of its environment, None for this one.
    """

    name: Name
    target: str
    python: str | None = None


@dataclass(frozen=True)
class Reading:
    """One cell in one launch.

    Attributes:
        state: of its measurement.
        reason: for anything but valid.
        values_s: seconds; for each repetition after warm-up a value for each step.
        tokens_digest: of the generated token ids, "" where none are generated.
    """

    state: str
    reason: str = ""
    values_s: tuple[tuple[float, ...], ...] = ()
    tokens_digest: str = ""

    @property
    def counts(self) -> bool:
        """It has a value that may be compared."""
        return self.state not in NOT_COUNTED and bool(self.values_s)

    @property
    def value(self) -> float:
        """Logarithm of its median time, in log seconds."""
        return launch_value(self.values_s)


@dataclass(frozen=True)
class Launch:
    """One launch and what it gave.

    Attributes:
        arm: whose.
        tp: tensor-parallel size.
        block: number of its block, from 0.
        place: in the block, from 0.
        began: ISO time, UTC.
        wall_s: host time that it took altogether.
        cells: names of cells to readings.
    """

    arm: Name
    tp: int
    block: int
    place: int
    began: str
    wall_s: float
    cells: Mapping[str, Reading]

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From plain data.

        Raises:
            KeyError, TypeError, ValueError: it is not that of a launch.
        """
        cells = {
            str(name): Reading(
                state=str(one["state"]),
                reason=str(one["reason"]),
                values_s=tuple(tuple(float(value) for value in steps) for steps in one["values_s"]),
                tokens_digest=str(one["tokens_digest"]),
            )
            for name, one in data["cells"].items()
        }
        if data["arm"] not in ("A", "B"):
            raise ValueError(f"arm {data['arm']!r}")
        numbers = {name: int(data[name]) for name in ("tp", "block", "place")}
        return cls(**numbers, arm=data["arm"], began=str(data["began"]), wall_s=float(data["wall_s"]), cells=cells)


def launch(arm: Arm, tp: int, block: int, place: int, cells: Sequence[Cell], settings: Settings) -> Launch:
    """Start, measure, end. Whatever goes wrong is in the readings.

    Args:
        arm: what is started.
        tp: tensor-parallel size, that of all cells.
        block: number of the block.
        place: in it.
        cells: what is measured, in this order.
        settings: how.
    """
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    found: dict[str, Reading] = {}
    scenarios = list({cell.scenario.id: cell.scenario for cell in cells}.values())
    why = ""
    try:
        with RemoteTarget(
            arm.target, tp=tp, python=arm.python, threads=settings.threads, limits=settings.limits
        ) as target:
            bench = Bench(
                target,
                tp,
                scenarios,
                checkpoint=settings.checkpoint,
                repeats=settings.repeats,
                cell_s=settings.cell_s,
                threads=settings.threads,
            )
            for cell in cells:
                try:
                    found[cell.case] = reading(bench.measure(cell))
                except (TargetFailure, Unsupported, UsageError) as failure:
                    found[cell.case] = Reading("failed", str(failure))
                    if not target.alive:
                        why = f"the launch had ended at {cell.case}: {failure}"
                        break
    except (TargetFailure, Unsupported, UsageError) as failure:
        why = f"the launch failed: {failure}"
    missing = {cell.case: Reading("failed", why) for cell in cells if cell.case not in found}
    return Launch(arm.name, tp, block, place, began, round(time.monotonic() - start, 3), {**found, **missing})


def reading(row: Measurement) -> Reading:
    """What a gate keeps of a measurement; values that the clock could not tell from 0 do not count."""
    values = [value for steps in row.values_s for value in steps]
    if row.state not in NOT_COUNTED and (not values or not float(np.median(values)) > 0):
        return Reading("failed", "no positive time was measured", row.values_s, row.tokens_digest)
    return Reading(row.state, row.reason, row.values_s, row.tokens_digest)


def values(launches: Sequence[Launch], arm: Name, case: str) -> Floats:
    """Log values of a cell in those launches of an arm that count, in order."""
    found = [one.cells[case] for one in launches if one.arm == arm and case in one.cells]
    return np.array([each.value for each in found if each.counts])


def ratios(launches: Sequence[Launch], case: str, blocks: int) -> tuple[Floats, list[int]]:
    """Log-ratios of neighbours, candidate over baseline, and how many there were after each of so many blocks."""
    placed = {(one.block, one.place): one for one in launches if case in one.cells}
    found: list[float] = []
    ends: list[int] = []
    for block in range(blocks):
        for first in (0, 2):
            pair = [placed[key] for key in ((block, first), (block, first + 1)) if key in placed]
            if len(pair) == 2 and all(one.cells[case].counts for one in pair):
                signs = [1.0 if one.arm == "B" else -1.0 for one in pair]
                found.append(sum(sign * one.cells[case].value for sign, one in zip(signs, pair, strict=True)))
        ends.append(len(found))
    return np.array(found), ends
