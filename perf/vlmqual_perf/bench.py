"""One target of one size and the model that is open on it: takes the measurements."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract import host, sensors
from vlmqual_contract.errors import TargetFailure, TargetMisspoke, TargetRaised, Unsupported, UsageError
from vlmqual_contract.host import Energy
from vlmqual_contract.records import Measurement
from vlmqual_contract.remote import RemoteSession, RemoteTarget, Repeated
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import Capability, Inputs, IntArray, Model, Options
from vlmqual_perf import statistics
from vlmqual_perf.cards import card
from vlmqual_perf.ceilings import Ceilings
from vlmqual_perf.plan import Cell, config_of, model_of, prompts_of, shape_of
from vlmqual_perf.verdicts import Seen, judge

WINDOW = 3
WARMUP_WINDOWS = 8
WATCHED = 3
POSITIONS = 2048
TEXT_PHASES = ("prefill", "decode", "ttft")


@dataclass(frozen=True)
class _Moment:
    """Readings of the host and of its devices, and how many functions were compiled so far."""

    host: Mapping[str, Any]
    devices: Sequence[Mapping[str, Any]]
    compiled: int


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
        ceilings: of one device, for the cost card of each row.
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
        ceilings: Sequence[Ceilings] = (),
    ) -> None:
        self.target = target
        self._size = size
        self._scenarios = scenarios
        self._checkpoint = checkpoint
        self._repeats = repeats
        self._cell_s = cell_s
        self._threads = threads
        self._ceilings = ceilings
        self._open: tuple[Model, RemoteSession] | None = None
        self._used = False
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
            return replace(row, values_s=((session.load_s,),), state="too-few", reason=said)
        needed = {"preprocess": Capability.PREPROCESS, "vision": Capability.VISION}.get(cell.phase)
        if needed is not None and needed not in self.target.info.capabilities:
            raise Unsupported(f"the target does not declare {needed}")
        inputs = self._tensors(scenario)
        config = config_of(model_of(scenario, self._checkpoint))
        row = replace(row, shape=shape_of(scenario, inputs, config))
        if cell.phase == "first-call":
            return self._first(row, scenario)
        self._used = True
        if cell.phase == "compile":
            return _compiled(row, session, inputs, scenario)
        work = session.prepare(cell.phase, prompts=prompts_of(scenario), inputs=inputs, steps=scenario.new_tokens)
        warmup, warm = self._warm(session, work)
        before = self._now(session)
        with host.Meter() as meter:
            counted = self._count(session, work)
        after = self._now(session)
        seen = Seen(counted.seconds, warm, counted.buckets, after.compiled - before.compiled, before.host, after.host)
        state, reason = judge(seen)
        if len(set(counted.digests)) > 1:
            state, reason = "failed", "repetitions of the same request generated different tokens"
        more: dict[str, Any] = {
            "warmups": len(warmup),
            "resolution": statistics.resolution(statistics.medians(counted.seconds)),
            "host": {"before": before.host, "after": after.host},
        }
        if before.devices:
            more["devices"] = {"before": before.devices, "after": after.devices}
        more |= _energy(meter.energy, cell.phase, scenario, len(counted.seconds))
        more |= self._bucket(session, cell.phase)
        more |= self._collectives(session, cell, inputs)
        row = replace(
            row,
            values_s=tuple(map(tuple, counted.seconds)),
            warmup_s=tuple(map(tuple, warmup)),
            began_s=tuple(counted.began_s),
            device_s=tuple(map(tuple, counted.device_s)) if any(counted.device_s) else (),
            state=state,
            reason=reason,
            tokens_digest=counted.digests[-1],
            checks={**row.checks, **more},
        )
        cost = card(row, inputs, config, self._ceilings)
        return replace(row, checks={**row.checks, "cost": cost}) if cost else row

    def _first(self, row: Measurement, scenario: Scenario) -> Measurement:
        """The first request of a model that was just opened, to its first token on the host."""
        if self._used:
            self._close()
        session = self._session(scenario)
        self._used = True
        repeated = session.repeat(session.prepare("ttft", prompts=prompts_of(scenario)))
        said = "one value: there is one first request to a model that was just opened"
        seconds = tuple(map(tuple, repeated.seconds))
        began, digest = tuple(repeated.began_s), repeated.digests[0]
        return replace(row, values_s=seconds, began_s=began, tokens_digest=digest, state="too-few", reason=said)

    def _now(self, session: RemoteSession) -> _Moment:
        programs = session.costs().programs.values() if self.target.info.fixed_shapes else ()
        compiled = sum(program.compile_s > 0 for program in programs)
        return _Moment(host.readings(), sensors.readings(), compiled)

    def _collectives(self, session: RemoteSession, cell: Cell, inputs: Inputs) -> dict[str, Any]:
        """What a call spends in collective operations, from a few repetitions of their own since watching costs time.

        The fastest rank's share is the operation itself; the slowest rank waits for the others besides.
        """
        if self.target.processes == 1 or cell.phase not in ("vision", "prefill", "decode"):
            return {}
        try:
            work = session.prepare(cell.phase, inputs=inputs, steps=cell.scenario.new_tokens, collectives=True)
        except Unsupported:
            return {}
        found = session.repeat(work, WATCHED)
        ranks = np.asarray(found.collective_s).reshape(-1, self.target.processes)
        fastest, slowest = (float(np.median(bound)) for bound in (ranks.min(axis=1), ranks.max(axis=1)))
        call_s = float(np.median(found.seconds))
        return {"collectives": {"calls": len(ranks), "call_s": call_s, "fastest_s": fastest, "slowest_s": slowest}}

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
        self._used = True
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

    def _count(self, session: RemoteSession, work: int) -> Repeated:
        """Repeat as often as was asked for, and on while there is time."""
        all_of_it = Repeated([], [], [], [], [], [], None, None)
        start = time.monotonic()
        while len(all_of_it.seconds) < self._repeats or time.monotonic() - start < self._cell_s / 2:
            all_of_it = all_of_it.followed_by(session.repeat(work))
        return all_of_it

    def _session(self, scenario: Scenario) -> RemoteSession:
        """The open model of a scenario, with room for all scenarios that use it."""
        model = model_of(scenario, self._checkpoint)
        if self._open is None or self._open[0] != model:
            self._close()
            sharing = [one for one in self._scenarios if model_of(one, self._checkpoint) == model]
            batch = max(one.batch for one in sharing)
            session = self.target.open(model, Options(tp=self._size, max_length=POSITIONS, batch=batch))
            needed = max((self._positions(session, one) for one in sharing), default=0)
            if needed > POSITIONS:
                session.close()
                length = 2 ** int(needed - 1).bit_length()
                session = self.target.open(model, Options(tp=self._size, max_length=length, batch=batch))
            self._open, self._used = (model, session), False
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
        self._open = None

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
    return replace(row, values_s=((compile_s + load_s,),), state="too-few", reason=said, checks={**row.checks, **more})


def _energy(energy: Energy, phase: str, scenario: Scenario, repetitions: int) -> dict[str, Any]:
    """What was used while it was measured; of decode and ttft also for each token that came out of it.

    A repetition of decode contains its prefill.
    """
    if not energy.joules:
        return {}
    found = {"seconds": energy.seconds, "joules": dict(energy.joules), "samples": energy.samples}
    tokens = repetitions * scenario.batch * {"decode": scenario.new_tokens + 1, "ttft": 1}.get(phase, 0)
    return {"energy": {**found, "j_per_token": sum(energy.joules.values()) / tokens} if tokens else found}
