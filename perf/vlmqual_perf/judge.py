"""TP=n against TP=1: the same tokens are forced, and the logits have to agree within twice the dtype's own noise.

The noise is measured in the same run: TP=1 in the declared dtype against TP=1 in float64, with the same tokens. Both TP
sizes may be that far from the truth, so they may be twice that far from each other. A float64 target has nothing wider
to be measured against: its noise is the float32 arm's, scaled by the ratio of the two roundoffs. For a target that
runs in one dtype only, the noise is that of the worst honest arm of the checkpoint's goldens. Where none of this can be
had, a size is not judged, and its cells fail.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmqual_contract import distance, fixtures
from vlmqual_contract.discovery import parse
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import FloatArray, IntArray

MARGIN = 2.0
EXACT = ("float32", "float64")
ROUNDOFF_RATIO = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Reference:
    """What TP=1 answered.

    Attributes:
        tokens: (B, 1 + steps) greedy tokens.
        digest: of these tokens.
        logits: (1 + steps, B, V), the prefill's first.
        budgets: largest error that another size may have, for "prefill" and "decode".
        source: how the budgets came about.
    """

    tokens: IntArray
    digest: str
    logits: FloatArray
    budgets: Mapping[str, float]
    source: str


def error(x: FloatArray, gold: FloatArray) -> float:
    """The project's error measure; infinite where shapes differ or something is not finite."""
    if x.shape != gold.shape or not (np.isfinite(x).all() and np.isfinite(gold).all()):
        return float("inf")
    return distance.error(x, gold)


def part(logits: FloatArray, phase: str) -> FloatArray:
    """The logits that a phase answers for: the prefill's, or those of every decode step."""
    return logits[1:] if phase == "decode" else logits[:1]


def in_dtype(text: str, dtype: str) -> str:
    """The same target in another compute dtype."""
    spec = parse(text)
    options = ",".join(f"{key}={value}" for key, value in {**spec.options, "dtype": dtype}.items())
    return f"{spec.file}:{spec.name}:{options}" if spec.file else f"{spec.kind}:{options}"


def budgets(own: FloatArray, other: FloatArray, dtype: str) -> dict[str, float]:
    """What another size may differ by, for each phase; empty when one of the arms is not finite.

    Args:
        own: (1 + steps, B, V) TP=1 in the declared dtype.
        other: the same in float64; for a float64 target in float32.
        dtype: the declared dtype.
    """
    if dtype == "float64":
        noise = {phase: ROUNDOFF_RATIO * error(part(other, phase), part(own, phase)) for phase in ("prefill", "decode")}
    else:
        noise = {phase: error(part(own, phase), part(other, phase)) for phase in ("prefill", "decode")}
    if not all(np.isfinite(value) for value in noise.values()):
        return {}
    return {phase: MARGIN * value for phase, value in noise.items()}


def stored_budgets(scenario: Scenario, dtype: str) -> dict[str, float]:
    """The same from the goldens of a fixture checkpoint, for a target that runs in one dtype only.

    Args:
        scenario: names the checkpoint.
        dtype: the declared dtype.

    Returns:
        Twice the error of the worst honest arm over all goldens of the checkpoint; empty when there is none.
    """
    noise: dict[str, float] = {}
    for name in fixtures.names(f"goldens/{scenario.family}/"):
        if not name.endswith(".npz"):
            continue
        with np.load(fixtures.file(name), allow_pickle=False) as golden:
            if json.loads(str(golden["meta"]))["checkpoint"] != scenario.checkpoint:
                continue
            for phase in ("prefill", "decode"):
                key = f"noise/{dtype}/{phase}/logits"
                if key in golden.files:
                    noise[phase] = max(noise.get(phase, 0.0), float(golden[key]))
    return {phase: MARGIN * value for phase, value in noise.items()} if len(noise) == 2 else {}


def compare(
    reference: Reference, phase: str, logits: FloatArray, digest: str, dtype: str
) -> tuple[dict[str, object], str]:
    """Judge one phase of one size; the first token of "ttft" is the prefill's.

    Args:
        reference: TP=1's answers.
        phase: "prefill", "decode" or "ttft".
        logits: (1 + steps, B, V) of this size under TP=1's tokens.
        digest: of the tokens that this size generates freely.
        dtype: declared compute dtype; in `EXACT` ones the free tokens have to be equal too.

    Returns:
        What goes into the measurement, and one sentence when something is wrong ("" when nothing is).
    """
    phase = "decode" if phase == "decode" else "prefill"
    found = error(part(logits, phase), part(reference.logits, phase))
    budget = reference.budgets[phase]
    same = digest == reference.digest
    checks: dict[str, object] = {
        "tp1_error": found if np.isfinite(found) else None,
        "tp1_budget": budget,
        "tp1_budget_source": reference.source,
        "tp1_tokens_equal": same,
    }
    if not np.isfinite(found):
        return checks, f"logits of {phase} under forced tokens have another shape than TP=1's or are not finite"
    if found > budget:
        return checks, (
            f"logits of {phase} under forced tokens are {found:.3g} from TP=1's, "
            f"more than the {dtype} budget of {budget:.3g}"
        )
    if dtype in EXACT and not same:
        return checks, f"free-running tokens differ from TP=1's although the dtype is {dtype}"
    return checks, ""
