"""What several files of numeric tests do with a golden: its cases, a teacher-forced run, a row on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, goldens
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import EXACT, FACTOR, BadAnswer, Judge
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_contract.distance import length
from vlmqual_contract.remote import RemoteFeatures, RemoteSession, RemoteStep
from vlmqual_contract.target import Array, FloatArray, Info, IntArray

Features = RemoteFeatures | Mapping[str, Array] | None
FAMILY = "idefics3"


@dataclass(frozen=True)
class Forced:
    """A prefill and the steps after it.

    Attributes:
        logits: (1 + steps, B, V), the prompt's end first.
        tokens: (1 + steps, B), the target's own greedy tokens.
    """

    logits: FloatArray
    tokens: IntArray


def cases(wanted: Callable[[Golden], bool] = lambda golden: True) -> list[Any]:
    """Golden cases as parameters of a test, named after the case."""
    return [pytest.param(golden, id=golden.name) for golden in goldens(FAMILY) if wanted(golden)]


def forced(
    session: RemoteSession, text: Mapping[str, Array], features: Features, tokens: IntArray | Sequence[None]
) -> Forced:
    """Prefill, then one step for each item of `tokens`: tokens (B,) to force, or None to feed the greedy ones back."""
    step = session.prefill(text, features)
    logits, own = [step.logits()], [_tokens(step)]
    for given in tokens:
        step = session.decode(step, None if given is None else np.ascontiguousarray(given))
        logits.append(step.logits())
        own.append(_tokens(step))
    return Forced(np.stack(logits), np.stack(own))


def forced_run(keeper: TargetKeeper, session: RemoteSession, golden: Golden) -> Forced:
    """The run of a golden case under its own tokens, kept for all tests that look at it."""
    key = ("forced", golden.name)
    if key not in keeper.memory:
        keeper.memory[key] = forced(session, golden.text, golden.features, golden.tokens)
    kept = keeper.memory[key]
    assert isinstance(kept, Forced)
    return kept


def free(session: RemoteSession, text: Mapping[str, Array], features: Features, steps: int) -> IntArray:
    """Greedy tokens fed back, (steps, B), the prompt's first."""
    step = session.prefill(text, features)
    own = [_tokens(step)]
    for _ in range(steps - 1):
        step = session.decode(step)
        own.append(_tokens(step))
    return np.stack(own)


def _tokens(step: RemoteStep) -> IntArray:
    tokens = step.tokens()
    if tokens.dtype != np.int64 or tokens.ndim != 1:
        raise BadAnswer(f"tokens are {tokens.dtype} of shape {tokens.shape}, not int64 of shape (B,)")
    return tokens


def alone(golden: Golden, row: int) -> dict[str, Array]:
    """The text tensors of one row without its padding."""
    real = golden.mask[row] != 0
    return {name: np.ascontiguousarray(array[row : row + 1, real]) for name, array in golden.text.items()}


def features_of(golden: Golden, row: int) -> dict[str, Array] | None:
    """Gold features of one row's frames, None for a row without images."""
    if golden.features is None:
        return None
    frames = golden.array("inputs/pixel_values").reshape(golden.rows, -1, *golden.pixels["pixel_values"].shape[2:])
    counts = [int(sum(bool(frame.any()) for frame in row_frames)) for row_frames in frames]
    start = sum(counts[:row])
    if not counts[row]:
        return None
    return {name: array[start : start + counts[row]] for name, array in golden.features.items()}


def exact_only(info: Info) -> None:
    """Go on only in dtypes in which equal tokens can be demanded.

    Raises:
        NotApplicable: the target computes in another one.
    """
    if info.dtype not in EXACT:
        raise NotApplicable(
            f"equal tokens are demanded in {' and '.join(EXACT)} only; the target declares {info.dtype}"
        )


def same_tokens(own: IntArray, golden: Golden, info: Info) -> None:
    """Assert greedy tokens (steps, B) equal gold's, for every row up to where gold itself is too close to call.

    Two tokens whose logits lie closer than the budget of the dtype may change places in an honest implementation; from
    there on a row's tokens say nothing.
    """
    gold = golden.tokens[: len(own)]
    ordered = np.sort(golden.logits[: len(own)], axis=-1)
    margin = ordered[..., -1] - ordered[..., -2]
    budget = FACTOR * golden.noise("decode/logits", info.dtype) * length(golden.array("decode/logits"))
    close = margin <= 2 * budget
    for row in range(golden.rows):
        end = int(np.argmax(close[:, row])) if close[:, row].any() else len(own)
        assert end > 0, f"gold's first token of row {row} is too close to call in {info.dtype}"
        if (differing := np.flatnonzero(own[:end, row] != gold[:end, row])).size:
            step = int(differing[0])
            raise AssertionError(
                f"token {step} of row {row} is {own[step, row]}, not {gold[step, row]}, "
                f"although gold's logits lie {margin[step, row]:.3g} apart"
            )


def compare_steps(judge: Judge, run: Forced, golden: Golden, info: Info) -> None:
    """Compare a run's logits with gold, the prompt's end and every step by itself."""
    gold = golden.logits
    judge.compare("prefill/logits", run.logits[0], gold[0], golden.noise("prefill/logits", info.dtype))
    noise, scale = golden.noise("decode/logits", info.dtype), length(golden.array("decode/logits"))
    for step in range(1, len(run.logits)):
        judge.compare(f"decode/logits.{step:02}", run.logits[step], gold[step], noise, scale=scale)


def same_steps(judge: Judge, label: str, one: FloatArray, other: FloatArray, noises: Sequence[float]) -> None:
    """Compare the logits of two runs (1 + steps, B, V) of which both should be the same.

    Args:
        judge: collects the comparisons.
        label: says which two.
        one: logits of one run.
        other: logits of the other.
        noises: noise of the two sides.
    """
    if len(one) != len(other):
        raise BadAnswer(f"{label}: {len(one)} steps came back, not {len(other)}")
    scale = length(other)
    for step in range(len(other)):
        name = "prefill/logits" if step == 0 else f"decode/logits.{step:02}"
        judge.same(f"{name} ({label})", one[step], other[step], (noises[0], noises[1]), scale=scale)


def steps_noise(golden: Golden, info: Info) -> float:
    """Noise of a run's logits: the larger of the prompt's and the steps'."""
    return max(golden.noise(name, info.dtype) for name in ("prefill/logits", "decode/logits"))
