"""What several files of numeric tests do with a golden: its cases, a teacher-forced run, a row on its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, goldens
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import EXACT, FACTOR, BadAnswer, Judge
from vlmqual_conformance.subjects import TargetKeeper, tiny
from vlmqual_contract.distance import length
from vlmqual_contract.remote import RemoteFeatures, RemoteSession, RemoteStep
from vlmqual_contract.target import Array, Capability, FloatArray, Info, IntArray

Features = RemoteFeatures | Mapping[str, Array] | None
#: Which tokens see which image slots: (B, S, N, T) of Mllama, (B, S, N) of Idefics.
IMAGE_MASKS = ("cross_attention_mask", "image_attention_mask")
#: Ids below this are plain text in the tokenizers of the tiny checkpoints, so that they can stand for each other.
PLAIN = 256


@dataclass(frozen=True)
class Forced:
    """A prefill and the steps after it.

    Attributes:
        logits: (1 + steps, B, V), the prompt's end first.
        tokens: (1 + steps, B), the target's own greedy tokens.
    """

    logits: FloatArray
    tokens: IntArray


def cases(family: str, wanted: Callable[[Golden], bool] = lambda golden: True) -> list[Any]:
    """Golden cases of a family as parameters of a test, named after the case."""
    return [pytest.param(golden, id=golden.name) for golden in goldens(family) if wanted(golden)]


def settings(family: str) -> dict[str, Any]:
    """The config.json of the family's tiny checkpoint."""
    found: dict[str, Any] = json.loads((Path(tiny(family).path) / "config.json").read_text("utf-8"))
    return found


def forced(
    session: RemoteSession, text: Mapping[str, Array], features: Features, tokens: IntArray | Sequence[None]
) -> Forced:
    """Prefill, then one step for each item of `tokens`: tokens (B,) to force, or None to feed the greedy ones back."""
    rows = len(text["input_ids"])
    step = session.prefill(text, features)
    logits, own = [step.logits()], [tokens_of(step, rows)]
    for count, given in enumerate(tokens, start=1):
        step = session.decode(step, None if given is None else np.ascontiguousarray(given))
        logits.append(step.logits())
        own.append(tokens_of(step, rows))
        if logits[count].shape != logits[0].shape:
            shapes = f"{logits[count].shape}, not {logits[0].shape} as the prompt's"
            tensor = f"decode/logits.{count:02}"
            raise BadAnswer(f"{tensor} has shape {shapes}", tensor)
    return Forced(np.stack(logits), np.stack(own))


def forced_run(keeper: TargetKeeper, session: RemoteSession, golden: Golden) -> Forced:
    """The run of a golden case under its own tokens, kept for all tests that look at it."""
    key = ("forced", golden.family, golden.name)
    if key not in keeper.memory:
        keeper.memory[key] = forced(session, golden.text, golden.features, golden.tokens)
    kept = keeper.memory[key]
    assert isinstance(kept, Forced)
    return kept


def free(session: RemoteSession, text: Mapping[str, Array], features: Features, steps: int) -> IntArray:
    """Greedy tokens fed back, (steps, B), the prompt's first."""
    rows = len(text["input_ids"])
    step = session.prefill(text, features)
    own = [tokens_of(step, rows)]
    for _ in range(steps - 1):
        step = session.decode(step)
        own.append(tokens_of(step, rows))
    return np.stack(own)


def tokens_of(step: RemoteStep, rows: int) -> IntArray:
    """The greedy tokens of a step, (rows,).

    Raises:
        BadAnswer: of another type or shape.
    """
    tokens = step.tokens()
    if tokens.dtype != np.int64 or tokens.shape != (rows,):
        raise BadAnswer(f"tokens are {tokens.dtype} of shape {tokens.shape}, not int64 of shape ({rows},)")
    return tokens


def steps_of(info: Info, steps: int = 4) -> int:
    """Forced steps after the prompt: none where the target cannot be forced."""
    return steps if Capability.FORCED_TOKENS in info.capabilities else 0


def image_mask(golden: Golden) -> str:
    """Name of the mask that says which tokens see which image slots, "" in families without one."""
    return next((name for name in IMAGE_MASKS if name in golden.text), "")


def alone(golden: Golden, row: int) -> dict[str, Array]:
    """The text tensors of one row without its padding, and of image slots, where there are such, those that it sees."""
    real = golden.mask[row] != 0
    text = {name: array[row : row + 1, real] for name, array in golden.text.items()}
    if name := image_mask(golden):
        text[name] = text[name][:, :, seen_slots(golden, row)]
    return {name: np.ascontiguousarray(array) for name, array in text.items()}


def seen_slots(golden: Golden, row: int) -> IntArray:
    """Image slots that some token of a row sees, by its mask over images.

    A token of Mllama whose mask is all 0 sees every slot, those of padding images included (MLLAMA-DECODER-009); one of
    Idefics sees none (IDEFICS-CROSS-006), and a row of such tokens keeps its first slot, since it has to have one.
    """
    name = image_mask(golden)
    dense = golden.text[name][row] != 0  # (S, N, T) or (S, N)
    seen = dense.reshape(*dense.shape[:2], -1).any(axis=2)[golden.mask[row] != 0]
    unmasked = ~seen.any(axis=1, keepdims=True) if name == "cross_attention_mask" else np.zeros((1, 1), np.bool_)
    found: IntArray = np.flatnonzero((seen | unmasked).any(axis=0))
    return found if len(found) else np.zeros(1, np.int64)


def features_of(golden: Golden, row: int) -> dict[str, Array] | None:
    """Gold features of one row, None for a row without images: its frames, or the image slots of `alone`."""
    if golden.features is None:
        return None
    if name := image_mask(golden):
        hidden = golden.array(golden.hidden)[row : row + 1]
        chosen = by_image(hidden, golden.text[name].shape[2])[:, seen_slots(golden, row)]
        shape = (1, -1, *hidden.shape[2:])
        return {golden.hidden.removeprefix("features/"): np.ascontiguousarray(chosen.reshape(shape))}
    frames = golden.array("inputs/pixel_values").reshape(golden.rows, -1, *golden.pixels["pixel_values"].shape[2:])
    counts = [int(sum(bool(frame.any()) for frame in row_frames)) for row_frames in frames]
    start = sum(counts[:row])
    if not counts[row]:
        return None
    return {name: array[start : start + counts[row]] for name, array in golden.features.items()}


def by_image(hidden: FloatArray, slots: int) -> FloatArray:
    """Row-batched features, (B, N * T * L, D) or (B, N, L, D), as (B, N, T * L, D)."""
    return hidden.reshape(len(hidden), slots, -1, hidden.shape[-1])


def padded_text(golden: Golden, side: str, count: int) -> dict[str, Array]:
    """The text tensors with more positions of padding; on the right a mask over images goes on as its last row."""
    made = {}
    for name, array in golden.text.items():
        width = [(0, 0)] * array.ndim
        width[1] = (count, 0) if side == "left" else (0, count)
        like_the_last = side == "right" and name in IMAGE_MASKS
        made[name] = np.pad(array, width, mode="edge" if like_the_last else "constant")
    return made


def longer_text(golden: Golden, count: int) -> dict[str, Array]:
    """The text tensors of the prompt and its first `count` greedy tokens; every token is real."""
    return continued_text(golden, golden.tokens[:count])


def continued_text(golden: Golden, tokens: IntArray) -> dict[str, Array]:
    """The text tensors of the prompt and `tokens` (steps, B) after it; every token is real."""
    text, count = dict(golden.text), len(tokens)
    text["input_ids"] = np.concatenate([text["input_ids"], tokens.T], axis=1)
    text["attention_mask"] = np.ones_like(text["input_ids"])
    if name := image_mask(golden):  # MLLAMA-DEC-004, IDEFICS-DEC-002
        text[name] = np.concatenate([text[name], np.repeat(text[name][:, -1:], count, axis=1)], axis=1)
    return text


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
