"""What other rules of comparison would have said of the same comparison with gold, so that rules can be compared.

They are those that harnesses for accelerators use most, each at its usual setting:

- `cosine`: the cosine of value and gold, each taken as one long vector, is at least 0.99.
- `top-5`: at every row the token with gold's largest logit is among the value's five largest, and the token with the
  value's largest among gold's five. (What serving harnesses ask of log-probabilities; those order tokens as logits do.)
- `exact-text`: at every row the token with the largest logit is gold's. Steps are teacher-forced, so this is the same
  as equality of freely generated text up to the first divergence, and stricter nowhere: a text that has diverged has
  failed already.
- `torch-close`: every element is within atol + rtol * |gold| with the tolerances that `torch.testing.assert_close` has
  for the compute dtype.
- `numpy-close`: the same with those of `numpy.allclose`, whatever the dtype.

A rule looks at what a harness sees of a device: image features and logits, of which the second and third look at logits
alone. It looks at no hidden state on the way, and at no relation between two answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from vlmqual_contract.target import Array, FloatArray

#: The budget of `policy`, over the comparisons that the others look at.
BUDGET = "budget"
RULES = (BUDGET, "cosine", "top-5", "exact-text", "torch-close", "numpy-close")
COSINE = 0.99
TOP = 5
#: Relative and absolute tolerance, of torch.testing by compute dtype and of numpy.allclose.
TORCH: Mapping[str, tuple[float, float]] = {
    "float64": (1e-7, 1e-7),
    "float32": (1.3e-6, 1e-5),
    "bfloat16": (1.6e-2, 1e-5),
    "float16": (1e-3, 1e-5),
}
NUMPY = (1e-5, 1e-8)
_FEATURES = "features/"
_LOGITS = ("prefill/", "decode/")


def looking(component: str) -> tuple[str, ...]:
    """The rules that look at a comparison with gold of this name; none at a tap."""
    if component.startswith(_FEATURES):
        return tuple(rule for rule in RULES if rule not in ("top-5", "exact-text"))
    return RULES if component.startswith(_LOGITS) else ()


def passing(component: str, value: FloatArray, gold: FloatArray, dtype: str, mask: Array | None = None) -> set[str]:
    """The rules, without the budget, by which a value is as good as gold.

    Args:
        component: its name, see `looking`.
        value: (..., D), finite where it counts.
        gold: the same shape.
        dtype: compute dtype of the target.
        mask: for (B, S, D): 1 where a position counts.
    """
    seen = np.ones(gold.shape[:-1], np.bool_) if mask is None else mask != 0
    one, other = value[seen].astype(np.float64), gold[seen].astype(np.float64)  # (vectors, D)
    rules = looking(component)
    found: dict[str, Callable[[], bool]] = {
        "cosine": lambda: _cosine(one, other) >= COSINE,
        "top-5": lambda: _in_top(one, other) and _in_top(other, one),
        "exact-text": lambda: np.array_equal(one.argmax(axis=-1), other.argmax(axis=-1)),
        "torch-close": lambda: _close(one, other, *TORCH[dtype]),
        "numpy-close": lambda: _close(one, other, *NUMPY),
    }
    return {rule for rule, holds in found.items() if rule in rules and holds()}


def _cosine(one: FloatArray, other: FloatArray) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one * other).sum()) / lengths if lengths else float(np.array_equal(one, other))


def _in_top(one: FloatArray, other: FloatArray) -> bool:
    """Whether the largest of one is among the `TOP` largest of the other, in every vector."""
    chosen = np.take_along_axis(other, one.argmax(axis=-1)[..., None], axis=-1)
    return bool(((other > chosen).sum(axis=-1) < TOP).all())


def _close(one: FloatArray, other: FloatArray, relative: float, absolute: float) -> bool:
    return bool((np.abs(one - other) <= absolute + relative * np.abs(other)).all())


@dataclass
class Sayings:
    """What the rules said over the comparisons of one case.

    Attributes:
        looked: rules that looked at a comparison.
        failed: those by which one was not as good as gold.
    """

    looked: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def no_answer(self, component: str) -> None:
        """A shape, a type or a number that is none fails by every rule."""
        self.looked.update(looking(component))
        self.failed.update(looking(component))

    def look(
        self, component: str, value: FloatArray, gold: FloatArray, dtype: str, mask: Array | None, ratio: float
    ) -> None:
        """One comparison, with its error over its budget; the rest as in `passing`."""
        rules = set(looking(component))
        if not rules:
            return
        fine = passing(component, value, gold, dtype, mask) | ({BUDGET} if ratio <= 1.0 else set())
        self.looked |= rules
        self.failed |= rules - fine

    def plain(self) -> dict[str, list[str]]:
        """As a row of results has it."""
        return {"looked": sorted(self.looked), "failed": sorted(self.failed)}
