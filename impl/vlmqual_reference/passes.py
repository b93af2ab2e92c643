"""What one prompt goes through, by names of tensors: gold, and an arm that is given gold's features and tokens.

Legend of shapes: B rows (one here), F real frames, L image tokens of a frame, D width, N image slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlmqual_contract.distance import error
from vlmqual_contract.target import Array, Inputs
from vlmqual_impl.target_session import EagerSession

#: Half a unit in the last place, relative: storing a result in the dtype may cost that much. Gold itself is float32.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
#: Arms name their own features' logits so; gold's tensor of the same place is the prompt's end.
CHAIN = "chain/logits"
#: What the largest difference of a single logit is called; argmax margins are compared with it.
LOGITS = {"prefill/logits": "prefill/largest", "decode/logits": "decode/largest"}


def walk(
    session: EagerSession, inputs: Inputs, steps: int, gold: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """A prompt's tensors by name.

    Args:
        session: of the model.
        inputs: the processor's tensors.
        steps: decode steps after the prompt.
        gold: features to be injected and tokens to be forced; None for gold itself, with greedy tokens.

    Returns:
        features/NAME, prefill/logits (B, V), decode/tokens (steps, B) and decode/logits (steps, B, V); of an arm
        chain/logits (B, V) as well.
    """
    made: dict[str, Array] = {}
    features: Mapping[str, Array] | None = None
    if "pixel_values" in inputs:
        seen = session.vision(inputs)
        ((name, own),) = seen.arrays().items()
        made[f"features/{name}"] = own
        features = {name: own}
        if gold is not None:
            made[CHAIN] = session.prefill(inputs, seen).logits()
            features = {name: gold[f"features/{name}"]}
    step = session.prefill(inputs, features)
    made["prefill/logits"] = step.logits()
    tokens, logits = [], []
    for index in range(steps):
        tokens.append(step.tokens() if gold is None else np.asarray(gold["decode/tokens"][index]))
        step = session.decode(step, tokens[-1])
        logits.append(step.logits())
    return made | {"decode/tokens": np.stack(tokens), "decode/logits": np.stack(logits)}


def errors(made: Mapping[str, Array], gold: Mapping[str, Array]) -> dict[str, float]:
    """How far every tensor of an arm is from gold's, and the largest difference of a single logit.

    Raises:
        ValueError: an arm gave numbers that are not finite.
    """
    found = {}
    for name, value in made.items():
        if name == "decode/tokens":
            continue
        if not np.isfinite(value).all():
            raise ValueError(f"{name} is not finite")
        right = gold["prefill/logits" if name == CHAIN else name]
        found[name] = error(value, right)
        if name in LOGITS:
            found[LOGITS[name]] = float(np.abs(value.astype(np.float64) - right).max())
    return found
