"""Runs a gate: block after block of launches, a look after each, until every cell is decided or no launch is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlmqual_contract.errors import TargetFailure
from vlmqual_perf.gate_journal import Journal
from vlmqual_perf.gate_launches import Arm, Launch, Name, Settings, launch, ratios, values
from vlmqual_perf.gate_recorded import Recorded
from vlmqual_perf.gate_statistics import (
    FEWEST,
    UNDECIDED,
    WORDS,
    Estimate,
    Floats,
    Rule,
    Word,
    decide,
    estimate,
    estimate_unpaired,
    orders,
    paired,
    unpaired,
)
from vlmqual_perf.plan import Cell

#: A cell is given up once an arm has so many launches of it, more than half of which do not count.
GIVE_UP = 6
Progress = Callable[[int, Launch | None, int], None]


@dataclass(frozen=True)
class Outcome:
    """What is said of a cell.

    Attributes:
        case: its name.
        verdict: the word.
        reason: one sentence for "cannot tell", "" else.
        broken: too many launches of it failed.
        estimate: how much it changed, None before the first look.
        p: p-values of slower, faster and same at the last look.
        excluded: one sentence for every launch that did not count.
        notes: what else a reader has to know.
    """

    case: str
    verdict: Word
    reason: str = ""
    broken: bool = False
    estimate: Estimate | None = None
    p: tuple[float, float, float] = (1.0, 1.0, 1.0)
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two arms and how they are compared.

    Attributes:
        baseline: launched here, or recorded.
        candidate: launched here; recorded only where the baseline is.
        cells: of the matrix.
        rule: when something is said.
        settings: how launches are made.
        seed: of the order of the arms.
        session: what two sessions differ by; matters where an arm is recorded.
    """

    baseline: Arm | Recorded
    candidate: Arm | Recorded
    cells: tuple[Cell, ...]
    rule: Rule
    settings: Settings
    seed: int = 1
    session: float = 0.01

    @property
    def recorded(self) -> bool:
        """The arms are not launched side by side."""
        return isinstance(self.baseline, Recorded)

    def arms(self) -> list[tuple[Arm, ...]]:
        """Who is launched in each block, in this order."""
        blocks = self.rule.pairs // 2
        if isinstance(self.candidate, Recorded):
            return []
        if isinstance(self.baseline, Recorded):
            return [(self.candidate, self.candidate)] * blocks
        by_name: Mapping[str, Arm] = {"A": self.baseline, "B": self.candidate}
        return [tuple(by_name[name] for name in order) for order in orders(blocks, self.seed)]


@dataclass
class Table:
    """What is known so far: launches, and which cells are still open after each block.

    Attributes:
        comparison: what is compared.
        launches: of this gate, in the order in which they were made.
        blocks: that are complete.
        open: cells that more launches can say something of.
        given_up: cells to the number of blocks after which they were given up.
    """

    comparison: Comparison
    launches: list[Launch] = field(default_factory=list)
    blocks: int = 0
    open: list[Cell] = field(default_factory=list)
    given_up: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Before the first block everything is open."""
        self.open = list(self.comparison.cells)

    def close_block(self) -> None:
        """A block is complete: close the cells that are decided, and those whose launches fail."""
        self.blocks += 1
        codes, _ = decide(self._p(), self.comparison.rule)
        undecided = {cell.case for cell, code in zip(self.comparison.cells, codes, strict=True) if code == UNDECIDED}
        left = [cell for cell in self.open if cell.case in undecided]
        for cell in left:
            if any(_fails(self._launches(name), name, cell.case) for name in ("A", "B")):
                self.given_up[cell.case] = self.blocks
        self.open = [cell for cell in left if cell.case not in self.given_up]

    def outcomes(self) -> list[Outcome]:
        """What is said of every cell now."""
        found = self._p()
        codes, looks = decide(found, self.comparison.rule)
        return [
            self._outcome(cell, int(code), found[index, look if look >= 0 else -1])
            for index, (cell, code, look) in enumerate(zip(self.comparison.cells, codes, looks, strict=True))
        ]

    def _p(self) -> Floats:
        """(cells, blocks, 3) p-values; 1 for a cell that was given up, and before the first block."""
        blocks = max(1, self.blocks)
        found = np.ones((len(self.comparison.cells), blocks, 3))
        for index, cell in enumerate(self.comparison.cells):
            found[index] = self._values(cell.case, blocks)
            if cell.case in self.given_up:
                found[index, self.given_up[cell.case] - 1 :] = 1.0
        return found

    def _values(self, case: str, blocks: int) -> Floats:
        comparison = self.comparison
        if comparison.recorded:
            a, b, ends = self._arms(case, blocks)
            if len(a) < FEWEST:
                return np.ones((blocks, 3))
            return unpaired(a, b, ends, self._rule(b), comparison.session)
        found, ends = ratios(self.launches, case, blocks)
        return paired(found, ends, comparison.rule)

    def _arms(self, case: str, blocks: int) -> tuple[Floats, Floats, list[int]]:
        """Values of both arms, and how many of the candidate's there were after each block."""
        a, b = (values(self._launches(name), name, case) for name in ("A", "B"))
        if isinstance(self.comparison.candidate, Recorded):
            return a, b, [len(b)] * blocks
        ends = [len(values([one for one in self.launches if one.block <= k], "B", case)) for k in range(blocks)]
        return a, b, ends

    def _rule(self, b: Floats) -> Rule:
        """Where the candidate is recorded there is one look, at all of its launches."""
        rule = self.comparison.rule
        return replace(rule, pairs=max(FEWEST, len(b))) if isinstance(self.comparison.candidate, Recorded) else rule

    def _launches(self, name: Name) -> Sequence[Launch]:
        arm = self.comparison.baseline if name == "A" else self.comparison.candidate
        return arm.launches if isinstance(arm, Recorded) else self.launches

    def _estimate(self, case: str) -> Estimate | None:
        comparison = self.comparison
        if comparison.recorded:
            a, b, ends = self._arms(case, max(1, self.blocks))
            return estimate_unpaired(a, b, ends, self._rule(b), comparison.session)
        found, ends = ratios(self.launches, case, self.blocks)
        return estimate(found, ends, comparison.rule)

    def _outcome(self, cell: Cell, code: int, p: Floats) -> Outcome:
        case = cell.case
        excluded = tuple(line for name in ("A", "B") for line in _excluded(self._launches(name), name, case))
        reason = self._why(case, excluded) if code == UNDECIDED else ""
        digests = [
            {one.cells[case].tokens_digest for one in self._launches(name) if one.arm == name and case in one.cells}
            - {""}
            for name in ("A", "B")
        ]
        other = all(digests) and digests[0] != digests[1]
        return Outcome(
            case=case,
            verdict=WORDS[code],
            reason=reason,
            broken=case in self.given_up,
            estimate=self._estimate(case),
            p=(float(p[0]), float(p[1]), float(p[2])),
            excluded=excluded,
            notes=("the arms generated different tokens",) if other else (),
        )

    def _why(self, case: str, excluded: Sequence[str]) -> str:
        """Why nothing can be said of a cell."""
        if case in self.given_up:
            return f"most launches of an arm failed or are not valid, the last: {excluded[-1]}"
        counts = {name: len(values(self._launches(name), name, case)) for name in ("A", "B")}
        for name, count in counts.items():
            if count < FEWEST:
                side = "baseline" if name == "A" else "candidate"
                lost = f" (not counted: {len(excluded)})" if excluded else ""
                return f"the {side} has {count} launches that count{lost}; the first look needs {FEWEST}"
        found = self._estimate(case)
        if found is None:
            return f"fewer than {FEWEST} launches have a neighbour of the other arm that counts"
        return f"the change may be anything from {100 * found.low:+.1f} % to {100 * found.high:+.1f} %"


def run(comparison: Comparison, journal: Journal | None, progress: Progress) -> Table:
    """Launch until every cell is decided or no launch is left.

    Args:
        comparison: what is compared.
        journal: where launches are kept; those that it has are not made again. None where both arms are recorded.
        progress: called before each launch with the number of open cells, and after it with the launch.

    Returns:
        All that is known.
    """
    table = Table(comparison)
    if journal is None:
        table.close_block()
        return table
    there = {(one.tp, one.block, one.place): one for one in journal.launches}
    sizes = tuple(dict.fromkeys(cell.tp for cell in comparison.cells))
    for block, arms in enumerate(comparison.arms()):
        left = table.open
        if not left:
            break
        for size in sizes:
            cells = [cell for cell in left if cell.tp == size]
            for place, arm in enumerate(arms if cells else ()):
                made = there.get((size, block, place))
                if made is None:
                    progress(block, None, len(left))
                    made = launch(arm, size, block, place, cells, comparison.settings)
                    journal.add(made)
                    progress(block, made, len(left))
                table.launches.append(made)
        table.close_block()
    return table


def record(
    arm: Arm, cells: Sequence[Cell], settings: Settings, count: int, journal: Journal, progress: Progress
) -> list[Launch]:
    """Make launches of one arm, for a baseline; those that the journal has are not made again.

    Raises:
        TargetFailure: no reading counts, in as many launches as it takes to see that.
    """
    there = {(one.tp, one.block, one.place): one for one in journal.launches}
    found: list[Launch] = []
    for index in range(count):
        for size in dict.fromkeys(cell.tp for cell in cells):
            made = there.get((size, index, 0))
            if made is None:
                progress(index, None, len(cells))
                made = launch(arm, size, index, 0, [cell for cell in cells if cell.tp == size], settings)
                journal.add(made)
                progress(index, made, len(cells))
            found.append(made)
        readings = [each for one in found for each in one.cells.values()]
        if len(found) >= GIVE_UP and not any(each.counts for each in readings):
            raise TargetFailure(f"no reading of {len(found)} launches counts, the last: {readings[-1].reason}")
    return found


def _fails(launches: Sequence[Launch], name: Name, case: str) -> bool:
    found = [one.cells[case] for one in launches if one.arm == name and case in one.cells]
    return len(found) >= GIVE_UP and 2 * sum(not one.counts for one in found) > len(found)


def _excluded(launches: Sequence[Launch], name: Name, case: str) -> list[str]:
    """One sentence for every launch of an arm that did not count for a cell."""
    return [
        f"{name} {one.block + 1}.{one.place + 1} {one.cells[case].state}: {one.cells[case].reason}"
        for one in launches
        if one.arm == name and case in one.cells and not one.cells[case].counts
    ]
