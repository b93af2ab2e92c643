"""How long a run will take: by what the same cells took before, else what their phase took, else the run's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from vlmqual_contract.records import Measurement, runs
from vlmqual_perf.plan import ONCE, Cell


class Forecast:
    """What the cells of a run will take; it learns from those that are done.

    Args:
        cells: of the run.
        earlier: seconds that cells took in an earlier run, by case.
        cell_s: seconds that are spent on counting and warming up a cell of short repetitions, as the run is set.
    """

    def __init__(self, cells: Sequence[Cell], earlier: Mapping[str, float], cell_s: float) -> None:
        self._left = {cell.case: cell for cell in cells}
        self._known = dict(earlier)
        self._cell_s = cell_s
        self._phases: dict[str, list[float]] = {}
        for cell in cells:
            if cell.case in earlier:
                self._phases.setdefault(cell.phase, []).append(earlier[cell.case])

    def seconds(self, cell: Cell) -> float:
        """What a cell will take."""
        if cell.case in self._known:
            return self._known[cell.case]
        if cell.phase in self._phases:
            return median(self._phases[cell.phase])
        return 0.0 if cell.phase in ONCE else self._cell_s

    def knows(self, cell: Cell) -> bool:
        """True when an earlier run had this cell."""
        return cell.case in self._known

    def done(self, case: str, seconds: float | None = None) -> None:
        """A cell has its row; `seconds` when it was measured just now."""
        cell = self._left.pop(case, None)
        if cell is not None and seconds is not None:
            self._phases.setdefault(cell.phase, []).append(seconds)

    def left_s(self) -> float:
        """Seconds for all cells that have no row yet."""
        return sum(map(self.seconds, self._left.values()))


def earlier(directory: Path, subject: str, plan: Mapping[str, object]) -> dict[str, float]:
    """Seconds that cells took in earlier runs of the same target, checkpoint and repetitions; the newest run's count.

    Args:
        directory: of results files; it need not exist.
        subject: target string.
        plan: of the run's header.
    """
    if not directory.is_dir():
        return {}
    same = [
        run
        for run in runs(directory, quiet=True)
        if run.header.subject == subject
        and all(run.header.plan.get(key) == plan.get(key) for key in ("checkpoint", "repeats", "cell_s", "threads"))
    ]
    rows = [row for run in sorted(same, key=lambda run: run.header.started) for row in run.measurements]
    return {row.case: busy_s(row) for row in rows if row.values_s and row.state != "failed"}


def busy_s(row: Measurement) -> float:
    """Seconds that the repetitions of a row took, warm-up included."""
    if len(row.began_s) < 2:
        return _sum(row.values_s) + _sum(row.warmup_s)
    # What is not timed (the prefill before a decode) lies between the starts of repetitions.
    each = (row.began_s[-1] - row.began_s[0]) / (len(row.began_s) - 1)
    return each * (len(row.values_s) + len(row.warmup_s))


def shown(seconds: float) -> str:
    """As a clock: 0:07, 2:31, 1:02:31."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _sum(repetitions: Iterable[Iterable[float]]) -> float:
    return sum(sum(steps) for steps in repetitions)
