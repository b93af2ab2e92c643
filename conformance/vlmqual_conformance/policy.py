"""The comparison policy: how far a target may be from gold, and what is said when it is farther.

Nothing here is a chosen tolerance. Every golden tensor comes with the error of several honest implementations in the
target's compute dtype against gold (float64); the budget is `FACTOR` times the worst of them. An error is divided by
its budget, so 1.0 is on the limit whatever the tensor and the dtype. How an error is measured stands in
`vlmqual_contract.distance`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmqual_conformance.rules import Sayings
from vlmqual_conformance.waivers import Waiver
from vlmqual_contract.distance import error
from vlmqual_contract.target import Array, FloatArray

FACTOR = 2.0
#: Compute dtypes that goldens hold the noise of; the first two are exact enough to demand equal greedy tokens.
DTYPES = ("float64", "float32", "bfloat16", "float16")
EXACT = DTYPES[:2]


class BadAnswer(Exception):
    """What came back is no answer: a wrong shape, a wrong kind of number, NaN or infinity. Leads to `error`.

    Attributes:
        component: the tensor, "" where the sentence is about another thing.
    """

    def __init__(self, sentence: str, component: str = "") -> None:
        super().__init__(sentence)
        self.component = component


def checked(name: str, value: Array, shape: Sequence[int], mask: Array | None = None) -> FloatArray:
    """The value as float64, when it is an answer at all.

    Args:
        name: what it is called in messages.
        value: what the target gave.
        shape: the shape that it has to have.
        mask: (B, S), 1 where a position counts; the value is (B, S, D).

    Raises:
        BadAnswer: another shape, no floating-point numbers, or numbers that are not finite where they count.
    """
    if tuple(value.shape) != tuple(shape):
        raise BadAnswer(f"{name} has shape {tuple(value.shape)}, not {tuple(shape)}", name)
    if value.dtype.kind != "f":
        raise BadAnswer(f"{name} is {value.dtype}, not floating point", name)
    wide = value.astype(np.float64)
    seen = wide if mask is None else wide[mask != 0]
    if not np.isfinite(seen).all():
        kind = "NaN" if np.isnan(seen).any() else "infinity"
        raise BadAnswer(f"{name} holds {kind} in {int((~np.isfinite(seen)).sum())} of {seen.size} places", name)
    return wide


@dataclass(frozen=True)
class Finding:
    """One comparison: `ratio` is error divided by budget."""

    component: str
    error: float
    budget: float

    @property
    def ratio(self) -> float:
        """1.0 is on the limit."""
        return self.error / self.budget


def data_order(component: str) -> tuple[int, tuple[int, ...], str]:
    """Sort key that puts components in the order in which data passes them."""
    stages: tuple[str | tuple[str, ...], ...] = (
        "vision.embeddings",
        "vision.layers.",
        "vision.post_layernorm",
        "vision.layernorm_post",
        "vision.global_layers.",
        "vision.",
        "resampler.blocks.",
        "connector",
        "features/",
        "text.embeddings",
        ("text.cross_layers.", "text.layers."),  # by number, and of the same one the first stands first
        "text.",
        "prefill/",
    )
    numbers = tuple(int(number) for number in re.findall(r"\d+", component))
    if component.startswith("decode"):  # step by step, the logits of a step last
        inner = component.partition("/")[2]
        within = (len(stages) + 1,) if inner.startswith("logits") else (data_order(inner)[0], *data_order(inner)[1])
        return len(stages), (*numbers[:1], *within), component
    stage = next((index for index, start in enumerate(stages) if component.startswith(start)), len(stages) + 1)
    return stage, numbers, component


@dataclass
class Judge:
    """Collects the comparisons of one case and gives the verdict on them.

    Attributes:
        dtype: the target's declared compute dtype, which set the budgets.
        findings: comparisons in the order in which they were made.
        sayings: what other rules say of them, None in a run that does not ask.
        waivers: those of the case.
    """

    dtype: str
    findings: list[Finding] = field(default_factory=list)
    sayings: Sayings | None = None
    waivers: tuple[Waiver, ...] = ()

    def compare(
        self,
        component: str,
        value: Array,
        gold: FloatArray,
        noise: float,
        mask: Array | None = None,
        scale: float | None = None,
    ) -> None:
        """Compare with gold; the budget is `FACTOR` times `noise`.

        Raises:
            BadAnswer: see `checked`.
        """
        try:
            wide = checked(component, value, gold.shape, mask)
        except BadAnswer:
            if self.sayings is not None:
                self.sayings.no_answer(component)
            raise
        finding = Finding(component, error(wide, gold, mask, scale), FACTOR * noise)
        self.findings.append(finding)
        if self.sayings is not None:
            self.sayings.look(component, wide, gold, self.dtype, mask, finding.ratio)

    def same(
        self,
        component: str,
        one: Array,
        other: Array,
        noises: tuple[float, float],
        mask: Array | None = None,
        scale: float | None = None,
    ) -> None:
        """Compare two answers of the target that should be the same; the budget is the sum of both sides' budgets.

        Raises:
            BadAnswer: see `checked`.
        """
        right = checked(component, other, other.shape, mask)
        left = checked(component, one, other.shape, mask)
        self.findings.append(Finding(component, error(left, right, mask, scale), FACTOR * sum(noises)))

    @property
    def worst(self) -> Finding | None:
        """The comparison nearest to its limit or farthest beyond it."""
        return max(self.findings, key=lambda finding: finding.ratio, default=None)

    @property
    def first_out(self) -> Finding | None:
        """The first component in data order that left its budget, and what a waiver allows beyond it."""
        out = [finding for finding in self.findings if finding.ratio > 1.0 and self._waiver(finding) is None]
        return min(out, key=lambda finding: data_order(finding.component), default=None)

    @property
    def waived(self) -> list[tuple[str, Waiver]]:
        """Components that left their budgets, each with the waiver that allows it."""
        out = [(finding.component, self._waiver(finding)) for finding in self.findings if finding.ratio > 1.0]
        return [(component, waiver) for component, waiver in out if waiver is not None]

    def _waiver(self, finding: Finding) -> Waiver | None:
        """The first that allows it."""
        allowing = (each for each in self.waivers if each.allows(finding.component, finding.ratio, self.dtype))
        return next(allowing, None)

    def verdict(self) -> None:
        """Raise when a comparison left its budget.

        Raises:
            AssertionError: names the first component that did, and the worst.
        """
        assert self.findings, "the case compared nothing"
        first, worst = self.first_out, self.worst
        if first is None or worst is None:
            return
        sentence = (
            f"{first.component} is {first.ratio:.3g} times its budget "
            f"(error {first.error:.3g}, budget {first.budget:.3g} in {self.dtype})"
        )
        if worst != first:
            sentence += f"; farthest out is {worst.component}, {worst.ratio:.3g} times"
        raise AssertionError(sentence)
