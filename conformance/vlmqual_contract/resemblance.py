"""What a deviation from gold has in common with another: the measures that fingerprints and the detective share.

Of every run the same few numbers are looked at: some positions of some cases, a share of their logits; of image
features some numbers of some positions. The deviation is what is left when gold's numbers are taken away.

Legend of shapes: C blocks (cases of the text side, positions of the vision side), T positions of a case, W numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract.target import Array, FloatArray

#: Steps that are looked at, 0 for the prompt's end; of logits and of features every so manyth.
STEPS = (0, 1, 2, 3, 5, 7)
LOGITS = 15
FEATURES = 4
#: Positions of image features that are looked at, at most.
POSITIONS = 17
#: Features moved a little: another input whose gold is known, on which rounding falls differently and a wrong weight
#: does not.
SHIFT = 0.1


def logits_of(run: FloatArray) -> FloatArray:
    """What is looked at of the logits of one case, (1 + steps, 1, V): (T, W) in float64; fewer T after fewer steps."""
    steps = [step for step in STEPS if step < len(run)]
    picked: FloatArray = run[steps, 0, ::LOGITS].astype(np.float64)
    return picked


def features_of(hidden: FloatArray) -> FloatArray:
    """What is looked at of image features (..., D), in any layout: (C, W) in float64."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(POSITIONS, len(rows))).astype(np.int64))
    picked: FloatArray = rows[chosen, ::FEATURES].astype(np.float64)
    return picked


def shifted(features: Mapping[str, Array]) -> dict[str, Array]:
    """Image features a little beside the given ones: a tenth of their neighbours is added, (..., D)."""
    return {name: value + value.dtype.type(SHIFT) * np.roll(value, 1, axis=-1) for name, value in features.items()}


def size(deviation: FloatArray, gold: FloatArray) -> float:
    """Root mean square of a deviation, relative to gold's."""
    return float(np.sqrt(np.mean(deviation**2) / np.mean(gold**2)))


def cosine(one: FloatArray, other: FloatArray) -> float:
    """How far two deviations of one shape point the same way, -1 to 1; 0 where one is zero."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.vdot(one, other)) / lengths if lengths else 0.0


@dataclass(frozen=True)
class Match:
    """A deviation beside that of a scheme.

    Attributes:
        coefficient: how much of the scheme's deviation is in it: 1 for all, 0 for none.
        error: standard error of the coefficient, by leaving out one block after the other.
        cosine: see `cosine`.
    """

    coefficient: float
    error: float
    cosine: float


def match(deviation: FloatArray, scheme: FloatArray) -> Match:
    """Regress a deviation on a scheme's, both (C, ...)."""
    count = len(deviation)
    products = np.sum((deviation * scheme).reshape(count, -1), axis=1)
    squares = np.sum((scheme * scheme).reshape(count, -1), axis=1)
    if not squares.sum():
        return Match(0.0, 0.0, 0.0)
    without = [
        (products.sum() - products[i]) / rest for i in range(count) if (rest := squares.sum() - squares[i]) > 0.0
    ]
    spread = np.sqrt((count - 1) * np.var(without)) if without else 0.0
    return Match(float(products.sum() / squares.sum()), float(spread), cosine(deviation, scheme))


@dataclass(frozen=True)
class Trace:
    """What a scheme leaves on one side of the model.

    Attributes:
        name: of the scheme.
        kind: "weights", "cache" or "products".
        says: in words.
        coarser_than: declared compute dtypes that do not allow it.
        deviation: from gold, text (C, T, W), vision (C, W).
        step: what the deviation's numbers are multiples of, as it is stored; 0 where it was not stored.
    """

    name: str
    kind: str
    says: str
    coarser_than: tuple[str, ...]
    deviation: FloatArray
    step: float = 0.0


@dataclass(frozen=True)
class Side:
    """One side of the model, text or vision, as the reference computes it.

    Attributes:
        traces: of every scheme that shows on this side.
        sizes: of honest arms' deviations, by dtype.
        chance: by kind of scheme the largest cosine, in absolute value, of an honest arm and a scheme that would accuse
            it.
    """

    traces: tuple[Trace, ...]
    sizes: Mapping[str, tuple[float, ...]]
    chance: Mapping[str, float]


@dataclass(frozen=True)
class Fingerprints:
    """A file of fingerprints.

    Attributes:
        cases: names of the golden cases of the text side, in the order of C.
        pictured: name of the golden case of the vision side.
        text: logits under gold's features and tokens.
        vision: image features.
        moved: gold of the cases that see images whose features are `shifted`, by case: (T, W).
        steadiness: by dtype the cosines of an honest arm's two deviations, with and without the shift.
    """

    cases: tuple[str, ...]
    pictured: str
    text: Side
    vision: Side
    moved: Mapping[str, FloatArray]
    steadiness: Mapping[str, tuple[float, ...]]


def arrays(prints: Fingerprints) -> dict[str, Array]:
    """Fingerprints as the arrays of a file; deviations are kept in 8 bits."""
    made: dict[str, Array] = {f"moved/{name}": value.astype(np.float32) for name, value in prints.moved.items()}
    about: dict[str, Any] = {
        "cases": list(prints.cases),
        "pictured": prints.pictured,
        "steadiness": {dtype: list(values) for dtype, values in prints.steadiness.items()},
    }
    for name, side in (("text", prints.text), ("vision", prints.vision)):
        stacked = np.stack([trace.deviation for trace in side.traces])
        scales = np.abs(stacked).max(axis=tuple(range(1, stacked.ndim))) / 127
        made[f"{name}/scales"] = scales.astype(np.float32)
        by_trace = made[f"{name}/scales"].reshape(-1, *[1] * (stacked.ndim - 1)).astype(np.float64)
        made[f"{name}/deviations"] = np.round(stacked / by_trace).clip(-127, 127).astype(np.int8)
        about[name] = {
            "schemes": [
                {"name": trace.name, "kind": trace.kind, "says": trace.says, "coarser_than": list(trace.coarser_than)}
                for trace in side.traces
            ],
            "sizes": {dtype: list(values) for dtype, values in side.sizes.items()},
            "chance": dict(side.chance),
        }
    made["meta"] = np.array(json.dumps(about))
    return made


def read(path: Path) -> Fingerprints:
    """Fingerprints from their file."""
    with np.load(path) as file:
        held = {name: file[name] for name in file.files}
    about = json.loads(str(held["meta"]))
    sides = {}
    for name in ("text", "vision"):
        deviations, scales = held[f"{name}/deviations"].astype(np.float64), held[f"{name}/scales"].astype(np.float64)
        traces = tuple(
            Trace(known["name"], known["kind"], known["says"], tuple(known["coarser_than"]), deviation * scale, scale)
            for known, deviation, scale in zip(about[name]["schemes"], deviations, scales, strict=True)
        )
        sizes = {dtype: tuple(values) for dtype, values in about[name]["sizes"].items()}
        sides[name] = Side(traces, sizes, dict(about[name]["chance"]))
    return Fingerprints(
        cases=tuple(about["cases"]),
        pictured=about["pictured"],
        text=sides["text"],
        vision=sides["vision"],
        moved={name[6:]: value.astype(np.float64) for name, value in held.items() if name.startswith("moved/")},
        steadiness={dtype: tuple(values) for dtype, values in about["steadiness"].items()},
    )


def chance(deviations: Mapping[str, tuple[FloatArray, ...]], traces: tuple[Trace, ...]) -> dict[str, float]:
    """The largest cosine that honest arms, by dtype, have with schemes that would accuse them, by kind of scheme."""
    found = dict.fromkeys((trace.kind for trace in traces), 0.0)
    for dtype, arms in deviations.items():
        for trace in traces:
            if dtype in trace.coarser_than:
                likeness = (abs(cosine(deviation, trace.deviation)) for deviation in arms)
                found[trace.kind] = max(found[trace.kind], *likeness)
    return found
