"""TP=n against TP=1: the same tokens are forced, and the logits have to agree within twice the dtype's own noise.

The noise is measured in the same run: TP=1 in the declared dtype against TP=1 in float64, with the same tokens. Both TP
sizes may be that far from the truth, so they may be twice that far from each other. A float64 target has nothing wider
to be measured against and is held to `FLOAT64_BUDGET`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmqual_contract.discovery import parse
from vlmqual_contract.target import FloatArray, IntArray

FLOAT64_BUDGET = 1e-12
MARGIN = 2.0
EXACT = ("float32", "float64")


@dataclass(frozen=True)
class Reference:
    """What TP=1 answered.

    Attributes:
        tokens: (B, 1 + steps) greedy tokens.
        digest: of these tokens.
        logits: (1 + steps, B, V).
        budget: largest error that another size may have, None when it could not be derived.
        source: how the budget came about, one sentence.
    """

    tokens: IntArray
    digest: str
    logits: FloatArray
    budget: float | None
    source: str


def error(x: FloatArray, gold: FloatArray) -> float:
    """Largest distance of a vector over the last axis, by the root-mean-square norm of gold's; infinite for NaN."""
    if x.shape != gold.shape or not np.isfinite(x).all():
        return float("inf")
    wanted = gold.astype(np.float64)
    scale = float(np.sqrt(np.mean(np.sum(wanted**2, axis=-1))))
    distance = float(np.sqrt(np.max(np.sum((x.astype(np.float64) - wanted) ** 2, axis=-1))))
    return distance / scale if scale else distance


def wider(text: str) -> str:
    """The same target in float64."""
    spec = parse(text)
    options = ",".join(f"{key}={value}" for key, value in {**spec.options, "dtype": "float64"}.items())
    return f"{spec.file}:{spec.name}:{options}" if spec.file else f"{spec.kind}:{options}"


def compare(reference: Reference, logits: FloatArray, digest: str, dtype: str) -> tuple[dict[str, object], str]:
    """Judge one size.

    Args:
        reference: TP=1's answers.
        logits: (1 + steps, B, V) of this size under TP=1's tokens.
        digest: of the tokens that this size generates freely.
        dtype: declared compute dtype; in `EXACT` ones the free tokens have to be equal too.

    Returns:
        What goes into the measurement, and one sentence when something is wrong ("" when nothing is).
    """
    found = error(logits, reference.logits)
    same = digest == reference.digest
    checks: dict[str, object] = {
        "tp1_error": found if np.isfinite(found) else None,
        "tp1_budget": reference.budget,
        "tp1_budget_source": reference.source,
        "tp1_tokens_equal": same,
    }
    if not np.isfinite(found):
        return checks, "logits under forced tokens have another shape than TP=1's or are not finite"
    if reference.budget is not None and found > reference.budget:
        return checks, (
            f"logits under forced tokens are {found:.3g} from TP=1's, {found / reference.budget:.3g} times the budget"
        )
    if dtype in EXACT and not same:
        return checks, f"free-running tokens differ from TP=1's although the dtype is {dtype}"
    return checks, ""
