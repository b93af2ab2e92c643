"""How clearly a reference prefers its token, and how much of that is noise."""

from __future__ import annotations

import numpy as np

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.policy import FACTOR
from vlmqual_contract.target import FloatArray, Info


def margins(logits: FloatArray) -> FloatArray:
    """How far the largest logit lies before the second, (1 + steps, B)."""
    two = np.partition(logits.astype(np.float64), -2, axis=-1)[..., -2:]
    found: FloatArray = two[..., 1] - two[..., 0]
    return found


def close(case: Golden, info: Info) -> FloatArray:
    """Margins up to which honest implementations may choose another token, (1 + steps, B): both logits may move."""
    noises = [case.noise(f"{phase}/largest", info.dtype) for phase in ("prefill", "decode")]
    steps, rows = case.logits.shape[:2]
    return np.repeat(2 * FACTOR * np.array([noises[0], *[noises[1]] * (steps - 1)])[:, None], rows, axis=1)


def rounded(values: FloatArray) -> list[list[float]]:
    """For the record."""
    return [[round(float(value), 6) for value in row] for row in values]
