"""One target of one size and the model that is open on it: takes the measurements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmqual_contract import sensors
from vlmqual_contract.errors import TargetFailure, TargetMisspoke, TargetRaised, Unsupported, UsageError
from vlmqual_contract.records import Measurement
from vlmqual_contract.remote import RemoteSession, RemoteTarget, Repeated
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import Capability, Inputs, IntArray, Model, Options
from vlmqual_perf import statistics
from vlmqual_perf.plan import Cell, config_of, model_of, prompts_of, shape_of

WINDOW = 3
WARMUP_WINDOWS = 8
LEAST = 5
POSITIONS = 2048
TEXT_PHASES = ("prefill", "decode", "ttft")

State = Literal["valid", "noisy", "not-steady", "failed"]


class Bench:
    """Measures cells on a running target.

    Args:
        target: in its workers.
        size: tensor-parallel size.
        scenarios: everything that will be asked of it, so that a model is opened once and large enough.
        checkpoint: the user's own checkpoint instead of the scenarios'.
        repeats: least number of counted repetitions.
        cell_s: time to spend beyond that.
        threads: compute threads of each rank, for the record.
    """

    def __init__(
        self,
        target: RemoteTarget,
        size: int,
        scenarios: Sequence[Scenario],
        *,
        checkpoint: Path | None,
        repeats: int,
        cell_s: float,
        threads: int,
    ) -> None:
        self.target = target
        self._size = size
        self._scenarios = scenarios
        self._checkpoint = checkpoint
        self._repeats = repeats
        self._cell_s = cell_s
        self._threads = threads
        self._open: tuple[Model, RemoteSession] | None = None
        self._inputs: dict[str, Inputs | TargetFailure | Unsupported | UsageError] = {}

    def measure(self, cell: Cell) -> Measurement:
        """Measure one cell.

        Raises:
            TargetFailure: the target crashed, hung or raised.
            Unsupported: the target does not offer the phase.
        """
        scenario = cell.scenario
        session = self._session(scenario)
        row = Measurement(
            case=cell.case,
            scenario=scenario.id,
            family=scenario.family,
            phase=cell.phase,
            tp=cell.tp,
            batch=scenario.batch,
            dtype=self.target.info.dtype,
            shape={"images": len(scenario.images)},
            values_s=(),
            checks={"threads": self._threads, "processes": self.target.processes},
        )
        if cell.phase == "load":
            said = "one value: loading is not repeated, and the first includes starting the framework"
            return replace(row, values_s=((session.load_s,),), state="noisy", reason=said)
        needed = {"preprocess": Capability.PREPROCESS, "vision": Capability.VISION}.get(cell.phase)
        if needed is not None and needed not in self.target.info.capabilities:
            raise Unsupported(f"the target does not declare {needed}")
        inputs = self._tensors(scenario)
        config = config_of(model_of(scenario, self._checkpoint))
        row = replace(row, shape=shape_of(scenario, inputs, config))
        if cell.phase == "compile":
            return _compiled(row, session, inputs, scenario)
        work = session.prepare(cell.phase, prompts=prompts_of(scenario), inputs=inputs, steps=scenario.new_tokens)
        warmup, warm = self._warm(session, work)
        before = sensors.readings()
        counted, digests = self._count(session, work)
        values = statistics.medians(counted)
        state, reason = _state(values, warm)
        if len(set(digests)) > 1:
            state, reason = "failed", "repetitions of the same request generated different tokens"
        more: dict[str, Any] = {"warmups": len(warmup), "resolution": statistics.resolution(values)}
        if before:
            more["devices"] = {"before": before, "after": sensors.readings()}
        more |= self._bucket(session, cell.phase)
        return replace(
            row,
            values_s=tuple(map(tuple, counted)),
            warmup_s=tuple(map(tuple, warmup)),
            state=state,
            reason=reason,
            tokens_digest=digests[-1],
            checks={**row.checks, **more},
        )

    def _bucket(self, session: RemoteSession, phase: str) -> dict[str, Any]:
        """Into which fixed shapes the latest call of a phase went, where a target has such."""
        if not self.target.info.fixed_shapes:
            return {}
        call = session.costs().calls.get("prefill" if phase == "ttft" else phase)
        return {} if call is None else {"bucket": call.bucket, "asked": call.asked, "computed": call.computed}

    def answer(self, scenario: Scenario, tokens: IntArray | None) -> Repeated:
        """One decode with logits: greedy, or with the tokens (B, 1 + steps) of an earlier answer forced.

        Raises:
            TargetFailure: the target crashed, hung or raised.
            Unsupported: it cannot force tokens.
        """
        if tokens is not None and Capability.FORCED_TOKENS not in self.target.info.capabilities:
            raise Unsupported("the target does not declare forced-tokens, so its sizes cannot be compared")
        session = self._session(scenario)
        forced = None if tokens is None else np.ascontiguousarray(tokens[:, :-1].T)
        inputs, steps = self._tensors(scenario), scenario.new_tokens
        return session.repeat(session.prepare("decode", inputs=inputs, steps=steps, tokens=forced, keep_logits=True))

    def _warm(self, session: RemoteSession, work: int) -> tuple[list[list[float]], bool]:
        """Repeat until two windows agree; False when they never did within the bounds."""
        values: list[list[float]] = []
        start = time.monotonic()
        while len(values) < WARMUP_WINDOWS * WINDOW:
            values += session.repeat(work).seconds  # one at a time: a time limit is for one repetition
            if len(values) % WINDOW == 0 and statistics.steady(statistics.medians(values), WINDOW):
                return values, True
            if time.monotonic() - start > self._cell_s and len(values) >= 2 * WINDOW:
                break
        return values, False

    def _count(self, session: RemoteSession, work: int) -> tuple[list[list[float]], list[str]]:
        values: list[list[float]] = []
        digests: list[str] = []
        start = time.monotonic()
        while len(values) < self._repeats or time.monotonic() - start < self._cell_s / 2:
            repeated = session.repeat(work)
            values += repeated.seconds
            digests += repeated.digests
        return values, digests

    def _session(self, scenario: Scenario) -> RemoteSession:
        """The open model of a scenario, with room for all scenarios that use it."""
        model = model_of(scenario, self._checkpoint)
        if self._open is None or self._open[0] != model:
            if self._open is not None:
                self._open[1].close()
            self._open = None
            sharing = [one for one in self._scenarios if model_of(one, self._checkpoint) == model]
            batch = max(one.batch for one in sharing)
            session = self.target.open(model, Options(tp=self._size, max_length=POSITIONS, batch=batch))
            needed = max((self._positions(session, one) for one in sharing), default=0)
            if needed > POSITIONS:
                session.close()
                length = 2 ** int(needed - 1).bit_length()
                session = self.target.open(model, Options(tp=self._size, max_length=length, batch=batch))
            self._open = (model, session)
        return self._open[1]

    def _positions(self, session: RemoteSession, scenario: Scenario) -> int:
        """Cache positions that a scenario needs; its tensors are kept."""
        if scenario.id not in self._inputs:
            try:
                self._inputs[scenario.id] = session.preprocess(prompts_of(scenario))
            except (TargetRaised, TargetMisspoke, Unsupported, UsageError) as failure:
                if not self.target.alive:
                    raise
                self._inputs[scenario.id] = failure
        found = self._inputs[scenario.id]
        if isinstance(found, TargetFailure | Unsupported | UsageError):
            return 0
        return int(found["input_ids"].shape[1]) + scenario.new_tokens

    def _tensors(self, scenario: Scenario) -> Inputs:
        found = self._inputs[scenario.id]
        if isinstance(found, TargetFailure | Unsupported | UsageError):
            raise found
        return found


def _compiled(row: Measurement, session: RemoteSession, inputs: Inputs, scenario: Scenario) -> Measurement:
    """How long the functions of a request took to be there, by what the session says of each."""
    session.repeat(session.prepare("decode", inputs=inputs, steps=1))
    costs = session.costs()
    kinds = ("vision", "prefill", "decode") if scenario.images else ("prefill", "decode")
    names = dict.fromkeys(name for kind in kinds if kind in costs.calls for name in costs.calls[kind].programs)
    programs = [costs.programs[name] for name in names]
    compile_s, load_s = sum(one.compile_s for one in programs), sum(one.load_s for one in programs)
    made = sum(one.compile_s > 0 for one in programs)
    said = f"{made} of {len(programs)} functions compiled in {compile_s:.3g} s, all loaded in {load_s:.3g} s; one value"
    more = {"functions": len(programs), "compiled": made, "compile_s": compile_s, "load_s": load_s}
    return replace(row, values_s=((compile_s + load_s,),), state="noisy", reason=said, checks={**row.checks, **more})


def _state(values: Any, warm: bool) -> tuple[State, str]:
    if len(values) < LEAST:
        return "noisy", f"{len(values)} repetitions say nothing of the spread"
    if not warm:
        return "not-steady", "warm-up windows did not come to agree"
    if statistics.drifts(values):
        return "not-steady", "the second half of the repetitions left the first"
    seen = statistics.resolution(values)
    if seen > statistics.NOISE_LIMIT:
        return "noisy", f"a change below {100 * seen:.0f} % could not have been seen"
    return "valid", ""
