"""The timing loop. It runs in the worker, beside the device, so that no pipe is ever inside a measured interval."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array, Features, Inputs, IntArray, Prompt, Session

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
    """

    phase: str
    prompts: Sequence[Prompt] = ()
    inputs: Inputs = field(default_factory=dict)
    features: Features | Mapping[str, Array] | None = None
    steps: int = 0
    tokens: IntArray | None = None
    keep_logits: bool = False


@dataclass(frozen=True)
class Repetition:
    """What one repetition gave.

    Attributes:
        seconds: one value; for decode one for each step.
        tokens: (B, 1 + steps) greedy tokens, None for preprocess and vision.
        logits: (1 + steps, B, V) with `keep_logits`, the prefill's first.
    """

    seconds: list[float]
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
    """
    if work.phase not in PHASES:
        raise UsageError(f"phase {work.phase!r} is unknown; phases are {', '.join(PHASES)}")
    if work.phase in ("prefill", "decode") and work.features is None and "pixel_values" in work.inputs:
        features = session.vision(work.inputs)
        return Work(**{**vars(work), "features": features})
    return work


def repeat(session: Session, work: Work) -> Repetition:
    """Run one repetition between two `synchronize()` calls on the monotonic host clock."""
    clock = time.perf_counter
    session.synchronize()
    if work.phase == "preprocess":
        start = clock()
        session.preprocess(work.prompts)
        return Repetition([clock() - start])
    if work.phase == "vision":
        start = clock()
        session.vision(work.inputs)
        session.synchronize()
        return Repetition([clock() - start])
    if work.phase == "ttft":
        start = clock()
        inputs = session.preprocess(work.prompts)
        features = session.vision(inputs) if "pixel_values" in inputs else None
        tokens = session.prefill(inputs, features).tokens()
        return Repetition([clock() - start], tokens[:, None])
    start = clock()
    step = session.prefill(work.inputs, work.features)
    session.synchronize()
    seconds = [clock() - start]
    kept_tokens = [step.tokens()]
    kept_logits: list[Any] = [step.logits()] if work.keep_logits else []
    if work.phase == "decode":
        seconds = []
        for index in range(work.steps):
            forced = None if work.tokens is None else work.tokens[index]
            session.synchronize()
            start = clock()
            step = session.decode(step, forced)
            session.synchronize()
            seconds.append(clock() - start)
            kept_tokens.append(step.tokens())
            if work.keep_logits:
                kept_logits.append(step.logits())
    return Repetition(seconds, np.stack(kept_tokens, axis=1), np.stack(kept_logits) if kept_logits else None)
