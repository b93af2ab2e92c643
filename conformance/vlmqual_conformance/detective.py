"""The precision detective: what a target seems to compute in, from the way in which its answers differ from gold.

Three measures, each beside what honest arms of the reference leave (`vlmqual_adapters.fingerprints`):

- Size. How large the deviation is says which compute dtype explains it. Within `FACTOR` of the declared dtype's arms
  it is as declared; below it is finer, which is no fault; above it is coarser. What is beyond the coarsest dtype, and
  like no scheme, is no precision but a wrong model: that is for other requirements.
- Likeness. The deviation is compared with those of the reference under silent schemes: fp8, int8 and int4 weights, a
  cache in 8 bits, tf32 products. Rounding points nowhere, so an honest deviation is like none of them, however large;
  one scheme's is like that scheme, even where bfloat16 hides its size. A scheme is named from `FACTOR` times the
  largest likeness of any honest arm to any scheme of its kind on; chance grows as 1 / sqrt(n) where fewer cases could
  be run.
- Steadiness. When the input moves a little, rounding falls differently, while a changed weight errs as before. An
  error that moves less than 1 / `FACTOR` as much as the steadiest honest arm's comes from changed weights, tables or
  functions, in whatever scheme. Within its budget that is said and not held against the target: a device may
  approximate what it has no instruction for.

No number here is chosen but `FACTOR`, the policy's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from vlmqual_conformance.policy import FACTOR
from vlmqual_contract import fixtures, resemblance
from vlmqual_contract.resemblance import Fingerprints, Match, Side
from vlmqual_contract.target import FloatArray


@dataclass(frozen=True)
class Named:
    """A scheme that was recognised.

    Attributes:
        kind: "weights", "cache" or "products".
        scheme: name of it.
        says: what a reader is told.
        match: how much of it is there, how sure that is, and how alike the two deviations are.
    """

    kind: str
    scheme: str
    says: str
    match: Match

    def __str__(self) -> str:
        """A clause of a sentence."""
        subject = {"weights": "weights look like", "cache": "keys and values look like"}.get(self.kind, "products of")
        return f"{subject} {self.says} (coefficient {self.match.coefficient:.2f} +- {self.match.error:.2f})"


@dataclass(frozen=True)
class Opinion:
    """What is thought of one side of the model.

    Attributes:
        side: "text" or "vision".
        declared: compute dtype.
        size: relative size of the deviation.
        limit: up to where the declared dtype explains it.
        like: compute dtype that it is like, "" for none.
        rest: what is to be said of what the named schemes leave, "" where it is too small to be seen.
        named: schemes that were recognised.
        finer: smaller than honest arms of the declared dtype are.
        steadiness: cosine of the errors of an input and of one beside it; None where it could not be tried.
        steady: above every honest arm's.
        closest: the likeliest scheme that was not named, and its cosine.
        beside: the format of weights whose deviation is nearest in size: "fp8", "int8" or "int4".
    """

    side: str
    declared: str
    size: float
    limit: float
    like: str
    rest: str
    named: tuple[Named, ...]
    finer: bool
    steadiness: float | None = None
    steady: bool = False
    closest: tuple[str, float] = ("", 0.0)
    beside: str = ""

    @property
    def loud(self) -> bool:
        """Larger than the declared dtype explains."""
        return self.size > self.limit

    @property
    def accused(self) -> bool:
        """Not in the declared dtype with the checkpoint's weights."""
        return bool(self.named) or (self.loud and self.like not in ("", self.declared) and not self.steady)

    @property
    def unclear(self) -> bool:
        """Wrong by more than the declared dtype explains, and not in a way in which a precision is wrong."""
        return self.loud and not self.accused

    @property
    def _hint(self) -> str:
        if self.steady:
            alike = f"it errs alike on inputs that differ (cosine {self.steadiness:.2f}), as wrong weights do"
            return f"; {alike}, and by about as much as {self.beside} weights"
        return ""

    def __str__(self) -> str:
        """A clause of a sentence, without what is declared."""
        if self.named:
            return ", ".join((*map(str, self.named), *([f"what remains {self.rest}"] if self.rest else [])))
        if self.accused:
            return f"computes like {self.like}"
        if self.unclear:
            return (
                f"is {FACTOR * self.size / self.limit:.3g} times as far from gold as the worst honest arm, "
                f"in a way that resembles no known precision{self._hint}"
            )
        plain = f"computes like {self.like or self.declared}{', finer than declared' if self.finer else ''}"
        if self.steady:
            return (
                f"{plain}, but errs alike on inputs that differ (cosine {self.steadiness:.2f}), as rounding does not: "
                "weights, tables or functions may be approximated"
            )
        return plain


@dataclass(frozen=True)
class Finding:
    """What a target seems to compute in.

    Attributes:
        declared: its compute dtype.
        opinions: of the text side, and where it could be seen of the vision side.
        cases: how many golden cases were looked at.
    """

    declared: str
    opinions: tuple[Opinion, ...]
    cases: int

    @property
    def accused(self) -> bool:
        """It does not seem to compute as it declares."""
        return any(opinion.accused for opinion in self.opinions)

    @property
    def unclear(self) -> bool:
        """It is wrong in another way, so that nothing can be said of its precision; other requirements will fail."""
        return not self.accused and any(opinion.unclear for opinion in self.opinions)

    def __str__(self) -> str:
        """One sentence."""
        if not self.opinions:
            return f"cannot tell: none of the cases could be run; declared {self.declared}"
        text = str(self.opinions[0])
        more = [f"{one.side}: {one}" for one in self.opinions[1:] if str(one) != text and (one.loud or self.accused)]
        return "; ".join([text, *more, f"declared {self.declared}"])

    def plain(self) -> dict[str, Any]:
        """As a results file has it."""
        return {
            "says": str(self),
            "declared": self.declared,
            "accused": self.accused,
            "unclear": self.unclear,
            "cases": self.cases,
            "sides": [
                {
                    "side": one.side,
                    "like": one.like,
                    "size": one.size,
                    "limit": one.limit,
                    "steadiness": one.steadiness,
                    "closest": list(one.closest),
                    "named": [
                        {
                            "kind": each.kind,
                            "scheme": each.scheme,
                            "coefficient": round(each.match.coefficient, 4),
                            "error": round(each.match.error, 4),
                            "cosine": round(each.match.cosine, 4),
                        }
                        for each in one.named
                    ],
                }
                for one in self.opinions
            ],
        }


@dataclass(frozen=True)
class Seen:
    """What was seen of a target: the numbers that `resemblance` picks, of the target and of gold.

    Attributes:
        text: by case the target's and gold's logits, (T, W); T is the same for all.
        vision: the target's and gold's features, (C, W), None where they cannot be had.
        moved: by case the target's logits with shifted features, (T, W).
    """

    text: Mapping[str, tuple[FloatArray, FloatArray]]
    vision: tuple[FloatArray, FloatArray] | None = None
    moved: Mapping[str, FloatArray] = field(default_factory=dict)


@cache
def fingerprints(family: str) -> Fingerprints:
    """The family's fingerprints.

    Raises:
        UsageError: there are none, or the file is damaged.
    """
    return resemblance.read(fixtures.file(f"fingerprints/{family}.npz"))


def find(prints: Fingerprints, declared: str, seen: Seen) -> Finding:
    """What a target that declares a compute dtype seems to compute in."""
    opinions = []
    cases = [name for name in prints.cases if name in seen.text]
    if cases:
        found, gold = (np.stack([seen.text[name][index] for name in cases]) for index in (0, 1))
        blocks = [prints.cases.index(name) for name in cases]
        steadiness = _steadiness(prints, seen, cases) if declared != "float64" else None  # gold of it is float32
        opinions.append(_opinion("text", prints.text, declared, found - gold, gold, blocks, prints, steadiness))
    if seen.vision is not None:
        found, gold = seen.vision
        opinions.append(_opinion("vision", prints.vision, declared, found - gold, gold, range(len(gold)), prints))
    return Finding(declared, tuple(opinions), len(cases))


def _steadiness(prints: Fingerprints, seen: Seen, cases: Iterable[str]) -> float | None:
    moving = [name for name in cases if name in seen.moved and name in prints.moved]
    if not moving:
        return None
    here = np.stack([seen.text[name][0] - seen.text[name][1] for name in moving])
    there = np.stack([seen.moved[name] - prints.moved[name][: len(seen.moved[name])] for name in moving])
    return resemblance.cosine(here, there)


def _opinion(
    name: str,
    side: Side,
    declared: str,
    deviation: FloatArray,
    gold: FloatArray,
    blocks: Sequence[int],
    prints: Fingerprints,
    steadiness: float | None = None,
) -> Opinion:
    honest = side.sizes[declared]
    size, limit = resemblance.size(deviation, gold), FACTOR * max(honest)
    named, left, hidden, closest = _named(side, declared, deviation, gold, list(blocks))
    remaining = resemblance.size(left, gold)
    rest = f"computes like {like}" if (like := _like(side, remaining)) else "is like no known precision"
    steadiest = max(prints.steadiness[declared])
    return Opinion(
        side=name,
        declared=declared,
        size=size,
        limit=limit,
        like=_like(side, size),
        rest="" if remaining <= FACTOR * hidden else rest,
        named=named,
        finer=size < min(honest) / FACTOR,
        steadiness=steadiness,
        steady=steadiness is not None and 1.0 - steadiness < (1.0 - steadiest) / FACTOR,
        closest=closest,
        beside=_beside(side, size, gold, list(blocks)),
    )


def _named(
    side: Side, declared: str, deviation: FloatArray, gold: FloatArray, blocks: list[int]
) -> tuple[tuple[Named, ...], FloatArray, float, tuple[str, float]]:
    """Schemes that are in a deviation, at most one of each kind, and what they leave of it.

    Beside these the relative size below which nothing is known of what is left, since traces are kept in steps; and the
    likeliest of the schemes that are not named.
    """
    named: list[Named] = []
    left, squares = deviation, 0.0
    usual = float(np.mean(gold**2))
    traces = [
        (trace, trace.deviation[blocks][:, : deviation.shape[1]])
        for trace in side.traces
        if declared in trace.coarser_than
    ]
    share = np.sqrt(side.traces[0].deviation.size / deviation.size)
    while True:
        known = {each.kind for each in named}
        matches = [
            (resemblance.match(left, picked), trace, picked) for trace, picked in traces if trace.kind not in known
        ]
        if not matches:
            return tuple(named), left, np.sqrt(squares), ("", 0.0)
        like = [item for item in matches if item[0].cosine > FACTOR * side.chance[item[1].kind] * share]
        best, trace, picked = max(like or matches, key=lambda item: item[0].cosine)
        after = left - best.coefficient * picked
        explained = _rank(side, resemblance.size(after, gold)) < _rank(side, resemblance.size(left, gold))
        # What products round is a part of what a coarser dtype rounds: it is named where nothing of that is left.
        if not like or (trace.kind == "products" and not explained):
            return tuple(named), left, np.sqrt(squares), (trace.name, round(best.cosine, 4))
        named.append(Named(trace.kind, trace.name, trace.says, best))
        left = after
        squares += (best.coefficient * trace.step) ** 2 / 12 / usual  # rounded to steps: a twelfth of the square


def _like(side: Side, size: float) -> str:
    """The compute dtype whose honest arms are nearest in size; "" where the size is beyond the coarsest one's."""
    if size > FACTOR * max(max(sizes) for sizes in side.sizes.values()):
        return ""
    return min(side.sizes, key=lambda dtype: abs(np.log(max(size, 1e-300)) - np.mean(np.log(side.sizes[dtype]))))


def _beside(side: Side, size: float, gold: FloatArray, blocks: list[int]) -> str:
    """The format of weights whose deviation has the size that is nearest."""
    sizes = {
        trace.says.split()[0].rstrip(","): resemblance.size(trace.deviation[blocks][:, : gold.shape[1]], gold)
        for trace in reversed(side.traces)  # the first of a format counts
        if trace.kind == "weights"
    }
    return min(sizes, key=lambda name: abs(np.log(max(size, 1e-300) / sizes[name])))


def _rank(side: Side, size: float) -> int:
    """Place of the compute dtype that a size is like, from the most exact on."""
    ordered = sorted(side.sizes, key=lambda dtype: max(side.sizes[dtype]))
    like = _like(side, size)
    return ordered.index(like) if like else len(ordered)
