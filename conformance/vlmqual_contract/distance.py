"""The one error measure that goldens, the conformance policy and the TP check share.

error(x, gold) = max over vectors v of |x_v - gold_v| / rms over vectors of |gold_v|, vectors along the last axis,
positions of padding left out. One bad vector among many is seen, and a vector near zero is not blown up.
"""

from __future__ import annotations

import numpy as np

from vlmqual_contract.target import Array, FloatArray


def length(gold: FloatArray, mask: Array | None = None) -> float:
    """Root mean square of the Euclidean lengths of gold's vectors.

    Args:
        gold: (..., D).
        mask: for (B, S, D): 1 where a position counts.
    """
    lengths = np.linalg.norm(gold.astype(np.float64), axis=-1)
    if mask is not None:
        lengths = lengths[mask != 0]
    return float(np.sqrt(np.mean(lengths**2)))


def error(value: FloatArray, gold: FloatArray, mask: Array | None = None, scale: float | None = None) -> float:
    """The largest distance of a vector from gold's, relative to the usual length of gold's vectors.

    Args:
        value: (..., D).
        gold: the same shape.
        mask: for (B, S, D): 1 where a position counts.
        scale: length to be relative to; gold's own where None.

    Raises:
        ValueError: the shapes differ.
    """
    if value.shape != gold.shape:
        raise ValueError(f"shape {value.shape} cannot be compared with {gold.shape}")
    away = np.linalg.norm(value.astype(np.float64) - gold.astype(np.float64), axis=-1)
    if mask is not None:
        away = away[mask != 0]
    usual = length(gold, mask) if scale is None else scale
    farthest = float(away.max())
    if usual == 0.0:  # gold is zero everywhere: only zero is right
        return 0.0 if farthest == 0.0 else float("inf")
    return farthest / usual
