"""The timing loop. It runs in the worker, beside the device, so that no pipe is ever inside a measured interval."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Array, Costs, Features, Inputs, IntArray, Prompt, Session

_Result = TypeVar("_Result")
PHASES = ("preprocess", "vision", "prefill", "decode", "ttft")


@dataclass(frozen=True)
class Work:
    """What one repetition does.

    Attributes:
        phase: one of `PHASES`.
        prompts: for preprocess and ttft.
        inputs: tensors for vision, prefill and decode.
        features: image features for prefill and decode, made once and outside the clock.
        steps: decode steps of a repetition.
        tokens: (steps, B) tokens to force; None feeds the greedy tokens back.
        keep_logits: return the logits of the last repetition.
        collectives: watch what is spent in collective operations, which changes what is measured.
    """

    phase: str
    prompts: Sequence[Prompt] = ()
    inputs: Inputs = field(default_factory=dict)
    features: Features | Mapping[str, Array] | None = None
    steps: int = 0
    tokens: IntArray | None = None
    keep_logits: bool = False
    collectives: bool = False


@dataclass(frozen=True)
class Repetition:
    """What one repetition gave.

    Attributes:
        seconds: one value; for decode one for each step. Host time between two `synchronize()` calls.
        began_s: monotonic host clock when the first of them began.
        device_s: the same of the device's own clock, where the session has `device_s`; empty elsewhere.
        collective_s: with `collectives`, what this rank spent in collective operations of each call.
        buckets: of sessions that have `costs`, the different buckets of the phase's calls, in order.
        tokens: (B, 1 + steps) greedy tokens, None for preprocess and vision.
        logits: (1 + steps, B, V) with `keep_logits`, the prefill's first.
    """

    seconds: list[float]
    began_s: float = 0.0
    device_s: list[float] = field(default_factory=list)
    collective_s: list[float] = field(default_factory=list)
    buckets: tuple[str, ...] = ()
    tokens: IntArray | None = None
    logits: Array | None = None

    def digest(self) -> str:
        """SHA-256 over the generated token ids: the proof that the work was done."""
        return "" if self.tokens is None else tokens_digest(self.tokens)


def tokens_digest(tokens: IntArray) -> str:
    """SHA-256 of token ids as little-endian int64 in C order."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i8").tobytes()).hexdigest()


def prepare(session: Session, work: Work) -> Work:
    """Do once what is outside the clock: image features for the text phases.

    Raises:
        UsageError: the phase is unknown.
        Unsupported: collective operations cannot be watched.
    """
    if work.collectives and not hasattr(session, "collectives"):  # optional: see target.Session
        raise Unsupported("the target's sessions do not tell what they spend in collective operations")
    if work.phase not in PHASES:
        raise UsageError(f"phase {work.phase!r} is unknown; phases are {', '.join(PHASES)}")
    if work.phase in ("prefill", "decode") and work.features is None and "pixel_values" in work.inputs:
        features = session.vision(work.inputs)
        return Work(**{**vars(work), "features": features})
    return work


def repeat(session: Session, work: Work) -> Repetition:
    """Run one repetition: the monotonic host clock between two `synchronize()` calls around each measured call."""
    if work.phase == "ttft":
        return _first_token(session, work)
    watch = _Watch(session, work.phase, collectives=work.collectives)
    if work.phase == "preprocess":
        watch.time(lambda: session.preprocess(work.prompts))
        return watch.repetition()
    if work.phase == "vision":
        watch.time(lambda: session.vision(work.inputs))
        return watch.repetition()
    prefill = partial(session.prefill, work.inputs, work.features)
    step = watch.time(prefill) if work.phase == "prefill" else prefill()
    tokens = [step.tokens()]
    logits: list[Any] = [step.logits()] if work.keep_logits else []
    for index in range(work.steps if work.phase == "decode" else 0):
        step = watch.time(partial(session.decode, step, None if work.tokens is None else work.tokens[index]))
        tokens.append(step.tokens())
        if work.keep_logits:
            logits.append(step.logits())
    return watch.repetition(np.stack(tokens, axis=1), np.stack(logits) if logits else None)


def _first_token(session: Session, work: Work) -> Repetition:
    """From the request to its first token on the host, with nothing that waits in between."""
    session.synchronize()
    start = time.perf_counter()
    inputs = session.preprocess(work.prompts)
    features = session.vision(inputs) if "pixel_values" in inputs else None
    tokens = session.prefill(inputs, features).tokens()
    return Repetition([time.perf_counter() - start], start, tokens=tokens[:, None])


class _Watch:
    """Times calls of one phase, and asks the session for its own account of each outside the clock."""

    def __init__(self, session: Session, phase: str, *, collectives: bool) -> None:
        self._synchronize = session.synchronize
        self._device_s: Callable[[], float] | None = getattr(session, "device_s", None)  # optional: see target.Session
        self._costs: Callable[[], Costs] | None = getattr(session, "costs", None)  # likewise
        watched = getattr(session, "collectives", None) if collectives else None  # likewise
        self._collectives: Callable[[bool], float] | None = watched
        self._phase = phase
        self._began_s = 0.0
        self._seconds: list[float] = []
        self._device: list[float] = []
        self._collective: list[float] = []
        self._buckets: dict[str, None] = {}

    def time(self, call: Callable[[], _Result]) -> _Result:
        """What the call returned."""
        self._synchronize()
        if self._collectives is not None:
            self._collectives(True)
        start = time.perf_counter()
        result = call()
        self._synchronize()
        self._seconds.append(time.perf_counter() - start)
        self._began_s = self._began_s or start
        if self._collectives is not None:
            self._collective.append(self._collectives(False))
        if self._device_s is not None:
            self._device.append(self._device_s())
        if self._costs is not None and (made := self._costs().calls.get(self._phase)) is not None:
            self._buckets[made.bucket] = None
        return result

    def repetition(self, tokens: IntArray | None = None, logits: Array | None = None) -> Repetition:
        """Everything that was timed."""
        return Repetition(
            self._seconds, self._began_s, self._device, self._collective, tuple(self._buckets), tokens, logits
        )
