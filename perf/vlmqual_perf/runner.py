"""Runs a plan on a target: opens it once for each size, measures cell by cell, and writes each row as it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmqual_contract.errors import OutOfTime, TargetFailure, TargetHung, Unsupported, UsageError
from vlmqual_contract.launch import Allowance, Limits
from vlmqual_contract.nodes import Nodes
from vlmqual_contract.records import Measurement, Writer
from vlmqual_contract.remote import RemoteTarget, Repeated
from vlmqual_contract.scenario import Scenario
from vlmqual_perf import costs
from vlmqual_perf.bench import TEXT_PHASES, Bench
from vlmqual_perf.ceilings import Ceilings, of_target
from vlmqual_perf.judge import MARGIN, Reference, budgets, compare, in_dtype, stored_budgets
from vlmqual_perf.plan import Cell

Failures = (TargetFailure, Unsupported, UsageError)


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        target: target string.
        threads: compute threads of each rank, the same for every size.
        python: interpreter of another environment.
        limits: time limits of a call.
        repeats: least number of counted repetitions.
        cell_s: seconds after which no further repetition is begun beyond that, warm-up and counting each.
        checkpoint: the user's own checkpoint instead of the scenarios'.
        rehearse: run emulated targets too and mark every row.
        emulated: the target is one.
        dtype: that the target declares.
        scenario_s: seconds that a scenario may take at one size without loading, by its id; others are without end.
        impossible: why the target refuses a scenario at a size, by id and size.
        nodes: further machines for the ranks.
    """

    target: str
    threads: int
    python: str | None = None
    limits: Limits = field(default_factory=Limits)
    repeats: int = 7
    cell_s: float = 1.5
    checkpoint: Path | None = None
    rehearse: bool = False
    emulated: bool = False
    dtype: str = ""
    scenario_s: Mapping[str, float] = field(default_factory=dict)
    impossible: Mapping[tuple[str, int], str] = field(default_factory=dict)
    nodes: Nodes | None = None


class Runner:
    """One run over all sizes.

    Args:
        settings: how.
        writer: where rows go.
        progress: called before each cell, and with the row after it.
        say: called with a sentence on what takes its time and is no cell.
    """

    def __init__(
        self,
        settings: Settings,
        writer: Writer,
        progress: Callable[[Cell, Measurement | None], None],
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._writer = writer
        self._progress = progress
        self._say = say
        self._references: dict[str, Reference | str] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure every cell that has no row yet, in this order."""
        left = [cell for cell in cells if cell.case not in self._writer.done]
        for size in dict.fromkeys(cell.tp for cell in left):
            chosen = [cell for cell in left if cell.tp == size]
            for cell in chosen:
                if reason := self._settings.impossible.get((cell.scenario.id, size)):
                    self._add(cell, self._failed(cell, reason))
            chosen = [cell for cell in chosen if (cell.scenario.id, size) not in self._settings.impossible]
            if size > 1:
                self._refer({c.scenario.id: c.scenario for c in chosen if c.phase in TEXT_PHASES}, cells)
            self._size(size, chosen, self._possible(cells, size))

    def _possible(self, cells: Sequence[Cell], size: int) -> list[Scenario]:
        """All scenarios that a size can open, done ones too, so that a model is always opened for the same."""
        scenarios = {cell.scenario.id: cell.scenario for cell in cells}
        return [one for name, one in sorted(scenarios.items()) if (name, size) not in self._settings.impossible]

    def _add(self, cell: Cell, row: Measurement) -> None:
        if self._settings.rehearse:
            marks = {"rehearsal": True, **({"emulated": True} if self._settings.emulated else {})}
            row = replace(row, checks={**row.checks, **marks})
        self._writer.add(row)
        self._progress(cell, row)

    # one size --------------------------------------------------------------------------------------------------------

    def _size(self, size: int, cells: Sequence[Cell], scenarios: Sequence[Scenario]) -> None:
        judged: dict[str, Repeated | None] = {}
        time = _Time(self._settings.scenario_s)
        limits = replace(self._settings.limits, allowance=time.allowance)
        ceilings = self._ceilings(size) if any(cell.phase in costs.PHASES for cell in cells) else ()
        with contextlib.ExitStack() as stack:
            bench: Bench | None = None
            for cell in cells:
                self._progress(cell, None)
                time.begin(cell.scenario)
                try:
                    time.check()
                    if bench is None or not bench.target.alive:
                        stack.close()
                        bench = None
                        bench = stack.enter_context(self._bench(size, scenarios, limits=limits, ceilings=ceilings))
                    row = bench.measure(cell)
                except Failures as failure:
                    row = self._failed(cell, time.reason(failure))
                if bench is not None and size > 1 and cell.phase in TEXT_PHASES and row.state != "failed":
                    try:
                        row = self._judged(row, cell, bench, judged)
                    except Failures as failure:  # what was measured is kept
                        why = f"cannot be compared with TP=1: {time.reason(failure)}"
                        row = replace(row, state="failed", reason=why)
                self._add(cell, row)

    def _failed(self, cell: Cell, reason: str) -> Measurement:
        return Measurement(
            case=cell.case,
            scenario=cell.scenario.id,
            family=cell.scenario.family,
            phase=cell.phase,
            tp=cell.tp,
            batch=cell.scenario.batch,
            dtype=self._settings.dtype,
            shape={"images": len(cell.scenario.images)},
            values_s=(),
            state="failed",
            reason=reason,
            checks={"threads": self._settings.threads},
        )

    def _ceilings(self, size: int) -> tuple[Ceilings, ...]:
        """What the device can do at most: probed in a launch of its own, so that none that is measured feels it."""
        settings = self._settings
        try:
            with RemoteTarget(
                settings.target,
                tp=size,
                python=settings.python,
                threads=settings.threads,
                limits=settings.limits,
                nodes=settings.nodes,
            ) as target:
                return of_target(target)
        except Failures:
            return ()  # the cells will tell

    @contextlib.contextmanager
    def _bench(
        self,
        size: int,
        scenarios: Sequence[Scenario],
        *,
        text: str | None = None,
        limits: Limits | None = None,
        ceilings: Sequence[Ceilings] = (),
    ) -> Iterator[Bench]:
        settings = self._settings
        with RemoteTarget(
            text or settings.target,
            tp=size,
            python=settings.python,
            threads=settings.threads,
            limits=limits or settings.limits,
            nodes=settings.nodes,
        ) as target:
            yield Bench(
                target,
                size,
                scenarios,
                checkpoint=settings.checkpoint,
                repeats=settings.repeats,
                cell_s=settings.cell_s,
                threads=settings.threads,
                ceilings=ceilings,
            )

    # larger sizes against TP=1 ---------------------------------------------------------------------------------------

    def _judged(self, row: Measurement, cell: Cell, bench: Bench, answers: dict[str, Repeated | None]) -> Measurement:
        reference = self._references[cell.scenario.id]
        if isinstance(reference, str):
            return replace(row, state="failed", reason=f"cannot be compared with TP=1: {reference}")
        forced_key, free_key = f"{cell.scenario.id}/forced", f"{cell.scenario.id}/free"
        if forced_key not in answers:
            answers[forced_key] = bench.answer(cell.scenario, reference.tokens)
            answers[free_key] = bench.answer(cell.scenario, None)
        forced, free = answers[forced_key], answers[free_key]
        assert forced is not None
        assert forced.logits is not None
        assert free is not None
        checks, wrong = compare(reference, cell.phase, forced.logits, free.digests[-1], row.dtype)
        row = replace(row, checks={**row.checks, **checks})
        return replace(row, state="failed", reason=wrong) if wrong else row

    def _refer(self, scenarios: dict[str, Scenario], cells: Sequence[Cell]) -> None:
        """Let TP=1 answer each scenario, and measure its dtype's noise against another dtype."""
        sharing = self._possible(cells, 1)
        for name in scenarios:
            if reason := self._settings.impossible.get((name, 1)):
                self._references[name] = reason
        missing = [scenario for name, scenario in scenarios.items() if name not in self._references]
        if not missing:
            return
        self._say(f"TP=1 answers {len(missing)} scenarios, which larger sizes are compared with")
        answers, dtype = self._answers(missing, sharing, None, {})
        other = "float32" if dtype == "float64" else "float64"
        source = f"{MARGIN:g} times TP=1's error against float64 in this run"
        if dtype == "float64":
            source = f"{MARGIN:g} times TP=1's float32 error in this run, scaled to float64's roundoff"
        arms: dict[str, Repeated | str] = {}
        why = f"the {other} arm gave no answer"
        try:
            arms, found = self._answers(missing, sharing, in_dtype(self._settings.target, other), answers)
            if found != other:
                arms, why = {}, f"the target declares {found} when asked for {other}"
        except Failures as failure:
            why = f"the target does not run in {other} ({failure})"
        for name, answer in answers.items():
            if isinstance(answer, str):
                self._references[name] = answer
                continue
            assert answer.tokens is not None
            assert answer.logits is not None
            arm = arms.get(name, why)
            limits: dict[str, float] = {}
            said = source
            if not isinstance(arm, str):
                assert arm.logits is not None
                limits = budgets(answer.logits, arm.logits, dtype)
                arm = f"the {other} arm or TP=1 itself is not finite"
            if not limits:
                scenario = scenarios[name]
                limits = {} if self._settings.checkpoint else stored_budgets(scenario, dtype)
                said = f"{MARGIN:g} times the worst honest arm of the goldens of {scenario.checkpoint}, since {arm}"
            if not limits:
                self._references[name] = f"no budget could be derived: {arm}"
                continue
            self._references[name] = Reference(answer.tokens, answer.digests[-1], answer.logits, limits, said)

    def _answers(
        self,
        scenarios: Sequence[Scenario],
        sharing: Sequence[Scenario],
        text: str | None,
        forced: dict[str, Repeated | str],
    ) -> tuple[dict[str, Repeated | str], str]:
        """What TP=1 answers to each scenario, or why it does not; and the dtype that it declares."""
        found: dict[str, Repeated | str] = {}
        dtype = ""
        for scenario in scenarios:
            earlier = forced.get(scenario.id)
            if isinstance(earlier, str):
                continue
            try:
                with contextlib.ExitStack() as stack:
                    bench = stack.enter_context(self._bench(1, sharing, text=text))
                    dtype = bench.target.info.dtype
                    for one in scenarios:
                        if one.id in found:
                            continue
                        before = forced.get(one.id)
                        if not isinstance(before, str):
                            scenario = one
                            found[one.id] = bench.answer(one, None if before is None else before.tokens)
                return found, dtype
            except Failures as failure:  # this one cannot be answered; start again for the others
                found[scenario.id] = str(failure)
        return found, dtype


class _Time:
    """The time limit of the scenario that is being measured.

    Attributes:
        allowance: what the target's requests are counted against.
    """

    def __init__(self, limits_s: Mapping[str, float]) -> None:
        self.allowance = Allowance()
        self._limits_s = limits_s
        self._scenario = ""

    def begin(self, scenario: Scenario) -> None:
        """Count anew when this is another scenario than before."""
        if scenario.id != self._scenario:
            self._scenario = scenario.id
            self.allowance.start(self._limits_s.get(scenario.id))

    def check(self) -> None:
        """Fail where nothing is left, so that no target is started for it.

        Raises:
            OutOfTime: the time is over.
        """
        if self.allowance.left_s() <= 0:
            raise OutOfTime

    def reason(self, failure: Exception) -> str:
        """What is said of a failure: the limit where that was the cause."""
        if not isinstance(failure, OutOfTime | TargetHung) or self.allowance.left_s() > 0:
            return str(failure)
        hung = f"; {failure}" if isinstance(failure, TargetHung) else ""
        return f"the scenario's time limit of {self._limits_s[self._scenario]:g} s is over{hung}"
