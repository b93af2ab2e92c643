"""Runs a plan on a target: opens it once for each size, measures cell by cell, and writes each row as it is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmqual_contract.errors import TargetFailure, Unsupported, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Measurement, Writer
from vlmqual_contract.remote import RemoteSession, RemoteTarget, Repeated
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import Capability, Inputs, Model, Options
from vlmqual_perf import statistics
from vlmqual_perf.judge import FLOAT64_BUDGET, MARGIN, Reference, compare, error, wider
from vlmqual_perf.plan import Cell, config_of, model_of, prompts_of, shape_of

WINDOW = 3
WARMUP_WINDOWS = 8
HEADROOM = 64

State = Literal["valid", "noisy", "not-steady", "failed"]


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        target: target string.
        threads: compute threads of each rank, the same for every size.
        python: interpreter of another environment.
        limits: time limits of a call.
        repeats: least number of counted repetitions.
        cell_s: seconds after which no further repetition is begun, warm-up and counting each.
        checkpoint: the user's own checkpoint instead of the scenarios'.
        rehearse: run emulated targets too and mark every row.
    """

    target: str
    threads: int
    python: str | None = None
    limits: Limits = field(default_factory=Limits)
    repeats: int = 7
    cell_s: float = 2.0
    checkpoint: Path | None = None
    rehearse: bool = False


class Runner:
    """One run over all sizes.

    Args:
        settings: how.
        writer: where rows go.
        progress: called before each cell, and with the row after it.
    """

    def __init__(
        self, settings: Settings, writer: Writer, progress: Callable[[Cell, Measurement | None], None]
    ) -> None:
        self._settings = settings
        self._writer = writer
        self._progress = progress
        self._references: dict[str, Reference] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure every cell that has no row yet.

        Raises:
            UsageError: a size is impossible; said before anything is measured.
        """
        left = [cell for cell in cells if cell.case not in self._writer.done]
        for size in dict.fromkeys(cell.tp for cell in left):
            chosen = [cell for cell in left if cell.tp == size]
            if size > 1:
                self._refer({cell.scenario.id: cell.scenario for cell in chosen})
            self._size(size, chosen)

    # one size --------------------------------------------------------------------------------------------------------

    def _size(self, size: int, cells: Sequence[Cell]) -> None:
        with contextlib.ExitStack() as stack:
            bench: _Bench | None = None
            for cell in cells:
                self._progress(cell, None)
                try:
                    if bench is None or not bench.target.alive:
                        bench = stack.enter_context(self._bench(size))
                    row = bench.measure(cell, self._references.get(cell.scenario.id))
                except (TargetFailure, Unsupported) as failure:
                    row = self._failed(cell, failure, bench)
                if self._settings.rehearse:
                    row = replace(row, checks={**row.checks, "rehearsal": True})
                self._writer.add(row)
                self._progress(cell, row)

    def _failed(self, cell: Cell, failure: Exception, bench: _Bench | None) -> Measurement:
        return Measurement(
            case=cell.case,
            scenario=cell.scenario.id,
            family=cell.scenario.family,
            phase=cell.phase,
            tp=cell.tp,
            batch=cell.scenario.batch,
            dtype=bench.target.info.dtype if bench else "",
            shape={"images": len(cell.scenario.images)},
            values_s=(),
            state="failed",
            reason=str(failure),
        )

    @contextlib.contextmanager
    def _bench(self, size: int, text: str | None = None) -> Iterator[_Bench]:
        settings = self._settings
        with RemoteTarget(
            text or settings.target,
            tp=size,
            python=settings.python,
            threads=settings.threads,
            limits=settings.limits,
        ) as target:
            yield _Bench(target, size, settings)

    # what larger sizes are judged by ---------------------------------------------------------------------------------

    def _refer(self, scenarios: dict[str, Scenario]) -> None:
        """Let TP=1 answer each scenario, and measure its dtype's noise against float64."""
        missing = [scenario for name, scenario in scenarios.items() if name not in self._references]
        answers: dict[str, Repeated] = {}
        with self._bench(1) as bench:
            dtype = bench.target.info.dtype
            for scenario in missing:
                answers[scenario.id] = bench.answer(scenario, None)
        budgets: dict[str, tuple[float | None, str]] = {}
        if dtype == "float64":
            budgets = dict.fromkeys(answers, (FLOAT64_BUDGET, f"fixed at {FLOAT64_BUDGET:g} for float64"))
        else:
            try:
                with self._bench(1, wider(self._settings.target)) as bench:
                    for scenario in missing:
                        own = answers[scenario.id]
                        gold = bench.answer(scenario, own.tokens)
                        assert own.logits is not None
                        assert gold.logits is not None
                        noise = error(own.logits, gold.logits)
                        budgets[scenario.id] = (
                            MARGIN * noise,
                            f"{MARGIN:g} times TP=1's error against float64 in this run",
                        )
            except (UsageError, TargetFailure) as failure:
                reason = f"not judged: the target does not run in float64 ({failure})"
                budgets = {name: budgets.get(name, (None, reason)) for name in answers}
        for name, answer in answers.items():
            assert answer.tokens is not None
            assert answer.logits is not None
            self._references[name] = Reference(answer.tokens, answer.digests[-1], answer.logits, *budgets[name])


class _Bench:
    """A target of one size, and the model that is open on it."""

    def __init__(self, target: RemoteTarget, size: int, settings: Settings) -> None:
        self.target = target
        self._size = size
        self._settings = settings
        self._open: tuple[tuple[Model, Options], RemoteSession] | None = None
        self._inputs: dict[str, Inputs] = {}
        self._verdicts: dict[str, tuple[dict[str, object], str]] = {}

    def measure(self, cell: Cell, reference: Reference | None) -> Measurement:
        """Measure one cell.

        Raises:
            TargetFailure: the target crashed, hung or raised.
            Unsupported: the target does not offer the phase.
        """
        scenario, session = cell.scenario, self._session(cell.scenario)
        inputs = self._tensors(scenario)
        shape = shape_of(scenario, inputs, config_of(model_of(scenario, self._settings.checkpoint)))
        checks: dict[str, Any] = {"threads": self._settings.threads, "processes": self.target.processes}
        row = Measurement(
            case=cell.case,
            scenario=scenario.id,
            family=scenario.family,
            phase=cell.phase,
            tp=cell.tp,
            batch=scenario.batch,
            dtype=self.target.info.dtype,
            shape=shape,
            values_s=(),
        )
        if cell.phase == "load":
            return replace(
                row, values_s=((session.load_s,),), checks={**checks, "repetitions": "one: loading is not repeated"}
            )
        needed = {"preprocess": Capability.PREPROCESS, "vision": Capability.VISION}.get(cell.phase)
        if needed is not None and needed not in self.target.info.capabilities:
            raise Unsupported(f"the target does not declare {needed}")
        work = session.prepare(
            cell.phase,
            prompts=prompts_of(scenario),
            inputs=inputs,
            steps=scenario.new_tokens,
        )
        warmup, warm = self._warm(session, work)
        counted, last = self._count(session, work)
        values = statistics.medians(counted)
        state, reason = self._state(values, warm)
        if cell.phase in ("prefill", "decode", "ttft") and len(set(last.digests)) > 1:
            state, reason = "failed", "repetitions of the same request generated different tokens"
        checks["resolution"] = statistics.resolution(values)
        if reference is not None and cell.phase in ("prefill", "decode", "ttft"):
            judged, wrong = self._judge(scenario, reference)
            checks |= judged
            if wrong:
                state, reason = "failed", wrong
        return replace(
            row,
            values_s=tuple(map(tuple, counted)),
            warmup_s=tuple(map(tuple, warmup)),
            state=state,
            reason=reason,
            tokens_digest=last.digests[-1],
            checks=checks,
        )

    def answer(self, scenario: Scenario, tokens: Any) -> Repeated:
        """One decode with logits: greedy, or with the tokens (B, 1 + steps) of an earlier answer forced."""
        session = self._session(scenario)
        forced = None if tokens is None else np.ascontiguousarray(tokens[:, :-1].T)
        work = session.prepare(
            "decode",
            inputs=self._tensors(scenario),
            steps=scenario.new_tokens,
            tokens=forced,
            keep_logits=True,
        )
        return session.repeat(work)

    def _judge(self, scenario: Scenario, reference: Reference) -> tuple[dict[str, object], str]:
        if scenario.id not in self._verdicts:
            forced = self.answer(scenario, reference.tokens)
            free = self.answer(scenario, None)
            assert forced.logits is not None
            self._verdicts[scenario.id] = compare(reference, forced.logits, free.digests[-1], self.target.info.dtype)
        return self._verdicts[scenario.id]

    def _warm(self, session: RemoteSession, work: int) -> tuple[list[list[float]], bool]:
        """Repeat until two windows agree; False when they never did within the bounds."""
        values: list[list[float]] = []
        start = time.monotonic()
        for _ in range(WARMUP_WINDOWS):
            values += session.repeat(work, WINDOW).seconds
            if statistics.steady(statistics.medians(values), WINDOW):
                return values, True
            if time.monotonic() - start > self._settings.cell_s and len(values) >= 2 * WINDOW:
                break
        return values, False

    def _count(self, session: RemoteSession, work: int) -> tuple[list[list[float]], Repeated]:
        start = time.monotonic()
        last = session.repeat(work, self._settings.repeats)
        values = list(last.seconds)
        digests = list(last.digests)
        while time.monotonic() - start < self._settings.cell_s / 2:
            last = session.repeat(work, WINDOW)
            values += last.seconds
            digests += last.digests
        return values, replace(last, digests=digests)

    def _state(self, values: Any, warm: bool) -> tuple[State, str]:
        if not warm:
            return "not-steady", "warm-up windows did not come to agree"
        if statistics.drifts(values):
            return "not-steady", "the second half of the repetitions left the first"
        seen = statistics.resolution(values)
        if seen > statistics.NOISE_LIMIT:
            return "noisy", f"the median is known to {100 * seen:.0f} % only"
        return "valid", ""

    def _session(self, scenario: Scenario) -> RemoteSession:
        model = model_of(scenario, self._settings.checkpoint)
        options = Options(tp=self._size, max_length=self._positions(scenario), batch=scenario.batch)
        if self._open is None or self._open[0] != (model, options):
            if self._open is not None:
                self._open[1].close()
            self._open = None
            self._open = ((model, options), self.target.open(model, options))
        return self._open[1]

    def _positions(self, scenario: Scenario) -> int:
        """Cache positions, the same for all scenarios of a kind: a power of two above what any of them needs."""
        if scenario.id not in self._inputs:
            return 2048
        length = self._inputs[scenario.id]["input_ids"].shape[1] + scenario.new_tokens + HEADROOM
        return max(2048, 2 ** int(length - 1).bit_length())

    def _tensors(self, scenario: Scenario) -> Inputs:
        if scenario.id not in self._inputs:
            self._inputs[scenario.id] = self._session(scenario).preprocess(prompts_of(scenario))
        return self._inputs[scenario.id]
