"""The maker of fingerprints: what the reference's error looks like when it computes with fewer bits than it says.

`python -m vlmqual_adapters.fingerprints --family idefics3 --output fixtures` writes `fingerprints/idefics3.npz` and
brings the manifest up to date; `--check` makes it again and compares. It runs in an environment with the documented
version of transformers, like the maker of goldens, and after it: inputs, tokens and gold come from the golden files.

Every scheme of `schemes` is done to the reference in float32, whose own noise is a thousandth of the smallest scheme's
trace; what is stored is the deviation from gold, of the numbers named in `vlmqual_contract.resemblance`. Beside it
stand what honest arms leave: sizes by dtype, the largest likeness to any scheme, and how steady their deviations are
when the input moves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters import inventory
from vlmqual_adapters.goldens import FAMILIES, pack
from vlmqual_adapters.ledger import DOCUMENTED
from vlmqual_adapters.transformers_session import TransformersSession
from vlmqual_adapters.transformers_target import DTYPES
from vlmqual_contract import resemblance
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.resemblance import STEPS, Fingerprints, Side, Trace
from vlmqual_contract.target import Array, FloatArray

#: Golden cases of the tiny checkpoint that any target can be given: one row without padding, short prompts. The first
#: that has one image is the vision side's.
CASES: Mapping[str, tuple[str, ...]] = {
    "idefics": ("photo", "text-only", "two-images", "three-images", "no-image-seen", "text-before-image", "hand-masks"),
    "idefics3": (
        "photo-whole",
        "text-only",
        "two-images",
        "consecutive-images",
        "multi-turn",
        "strip",
        "masked-pixels",
    ),
    "mllama": (
        "photo-one-tile",
        "text-only",
        "two-images",
        "consecutive-images",
        "three-tiles",
        "text-before-image",
        "multi-turn",
    ),
}

#: Golden files keep 32 significant bits: so far from stored gold may be who is right.
_KEPT = 2.0**-33


@dataclass(frozen=True)
class _Seen:
    """What is looked at of one way of computing, or of gold.

    Attributes:
        text: (C, T, W).
        vision: (C, W).
        moved: by case, (T, W).
    """

    text: FloatArray
    vision: FloatArray
    moved: Mapping[str, FloatArray] = field(default_factory=dict)

    def __sub__(self, gold: _Seen) -> _Seen:
        moved = {name: value - gold.moved[name] for name, value in self.moved.items()}
        return _Seen(self.text - gold.text, self.vision - gold.vision, moved)


def _golden(path: Path) -> dict[str, Array]:
    with np.load(path) as file:
        return {
            name: file[name] for name in file.files if name.startswith(("inputs/", "features/", "prefill/", "decode/"))
        }


def _part(golden: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def _inputs(golden: Mapping[str, Array], wide: bool) -> dict[str, Array]:
    """Inputs without pixels; of gold in float64 where the library computes with them."""
    found = {name: value for name, value in _part(golden, "inputs/").items() if not name.startswith("pixel")}
    mask = "cross_attention_mask"
    return found | {mask: found[mask].astype(np.float64)} if wide and mask in found else found


def _run(session: TransformersSession, golden: Mapping[str, Array], features: Any, wide: bool) -> FloatArray:
    step = session.prefill(_inputs(golden, wide), features)
    logits = [step.logits()]
    for index in range(STEPS[-1]):
        step = session.decode(step, np.asarray(golden["decode/tokens"][index]))
        logits.append(step.logits())
    return resemblance.logits_of(np.stack(logits))


def _seen(
    session: TransformersSession,
    goldens: Mapping[str, Mapping[str, Array]],
    *,
    moving: Collection[str] = (),
    wide: bool = False,
) -> _Seen:
    text, moved = [], {}
    for name, golden in goldens.items():
        features = _part(golden, "features/") or None
        text.append(_run(session, golden, features, wide))
        if name in moving and features:
            moved[name] = _run(session, golden, resemblance.shifted(features), wide)
    pictures = _part(next(iter(goldens.values())), "inputs/")
    if wide:
        pictures = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in pictures.items()}
    hidden = session.vision(pictures).arrays()[session.features_name]
    return _Seen(np.stack(text), resemblance.features_of(hidden), moved)


def make(family: str, fixtures: Path, say: Callable[[str], None] = print) -> Fingerprints:
    """All fingerprints of a family, from its stored goldens.

    Args:
        family: `model_type`.
        fixtures: the fixtures directory.
        say: is told how far it is.
    """
    from vlmqual_adapters.reference import ARMS, Reference  # need torch
    from vlmqual_adapters.schemes import SCHEMES, applied

    goldens = {name: _golden(fixtures / "goldens" / family / f"{name}.npz") for name in CASES[family]}
    places = {name: index for index, name in enumerate(goldens)}
    reference = Reference(fixtures / "checkpoints" / FAMILIES[family].checkpoint, family)
    with reference.gold() as (session, _):
        gold = _seen(session, goldens, moving=places, wide=True)
    seeing = {name: moved for name, moved in gold.moved.items() if not np.array_equal(moved, gold.text[places[name]])}
    gold = replace(gold, moved=seeing)
    kept = np.stack(
        [
            resemblance.logits_of(np.concatenate([golden["prefill/logits"][None], golden["decode/logits"]]))
            for golden in goldens.values()
        ]
    )
    if (away := resemblance.size(gold.text - kept, kept)) > 1e-8:
        raise UsageError(f"the goldens of {family} are {away:.2g} away from what is made here; make them again first")
    arms: dict[str, list[_Seen]] = {}
    for dtype in DTYPES:
        for arm in ARMS:
            with reference.arm(dtype, arm) as session:
                arms.setdefault(dtype, []).append(_seen(session, goldens, moving=seeing) - gold)
        say(f"{family}: honest arms in {dtype}")
    left: dict[str, _Seen] = {}
    for name, scheme in SCHEMES.items():
        with reference.arm("float32", ARMS[0]) as session, applied(scheme, session):
            left[name] = _seen(session, goldens) - gold
        say(f"{family}: {name} is {resemblance.size(left[name].text, gold.text):.2g} of gold")
    sides = {}
    for part in ("text", "vision"):
        traces = tuple(
            Trace(name, scheme.kind, scheme.says, scheme.coarser_than, getattr(left[name], part))
            for name, scheme in SCHEMES.items()
            if part == "text" or scheme.kind != "cache"
        )
        deviations = {dtype: tuple(getattr(seen, part) for seen in found) for dtype, found in arms.items()}
        exact = getattr(gold, part)
        sizes = {
            dtype: tuple(max(resemblance.size(one, exact), _KEPT) for one in found)
            for dtype, found in deviations.items()
        }
        sides[part] = Side(traces, sizes, resemblance.chance(deviations, traces))
    steadiness = {dtype: tuple(map(_steadiness, [goldens] * len(found), found)) for dtype, found in arms.items()}
    pictured = next(iter(goldens))
    return Fingerprints(tuple(goldens), pictured, sides["text"], sides["vision"], gold.moved, steadiness)


def _steadiness(goldens: Mapping[str, Any], seen: _Seen) -> float:
    here = np.stack([seen.text[index] for index, name in enumerate(goldens) if name in seen.moved])
    return resemblance.cosine(here, np.stack(list(seen.moved.values())))


def differences(made: Mapping[str, Array], path: Path) -> list[str]:
    """What differs from a stored file: cosines of traces below 0.99, gold beyond 1e-6, other names or schemes."""
    if not path.is_file():
        return ["the file is missing"]
    found = []
    with np.load(path) as stored:
        if names := sorted({*made} ^ {*stored.files}):
            return [f"{name}: only {'stored' if name in stored.files else 'made'}" for name in names]
        for name, new in made.items():
            old = stored[name]
            if name == "meta":
                if (was := _schemes(old)) != (now := _schemes(new)):
                    found.append(f"schemes: {sorted(set(now) ^ set(was))}")
            elif old.shape != new.shape or old.dtype != new.dtype:
                found.append(f"{name}: {new.dtype}{new.shape} was {old.dtype}{old.shape}")
            elif name.endswith("/deviations"):
                likeness = [
                    resemblance.cosine(*pair) for pair in zip(old.astype(float), new.astype(float), strict=True)
                ]
                found += [f"{name}: number {i} has a cosine of {c:.3f}" for i, c in enumerate(likeness) if c < 0.99]
            elif name.startswith("moved/") and (away := resemblance.size(new - old, old)) > 1e-6:
                found.append(f"{name}: differs by {away:.2g}")
    return found


def _schemes(meta: Array) -> list[str]:
    """Sides and schemes that a file's record names, in their order."""
    about = json.loads(str(meta))
    return [f"{side}/{scheme['name']}" for side in ("text", "vision") for scheme in about[side]["schemes"]]


def main(arguments: list[str] | None = None) -> int:
    """Make or check the fingerprints of a family; 0 when made or equal, 1 when something differs."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmqual_adapters.fingerprints", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--family", choices=tuple(FAMILIES), default="idefics3")
    parser.add_argument("--output", type=Path, default=Path("fixtures"), help="the fixtures directory")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with what is stored")
    chosen = parser.parse_args(arguments)
    try:
        return _main(chosen)
    except UsageError as mistake:
        print(f"{parser.prog}: {mistake}", file=sys.stderr)
        return EXIT_USAGE


def _main(chosen: argparse.Namespace) -> int:
    import torch
    import transformers

    family: str = chosen.family
    if transformers.__version__ != DOCUMENTED[family]:
        raise UsageError(
            f"transformers {transformers.__version__} is installed; {family} is made with {DOCUMENTED[family]}"
        )
    torch.set_num_threads(1)
    start = time.monotonic()
    made = resemblance.arrays(make(family, chosen.output))
    path: Path = chosen.output / "fingerprints" / f"{family}.npz"
    if chosen.check:
        found = differences(made, path)
        print("\n".join(found) or f"{family}: same ({time.monotonic() - start:.0f} s)")
        return EXIT_FAILED if found else EXIT_OK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(made))
    print(f"{path}: {path.stat().st_size} bytes ({time.monotonic() - start:.0f} s)")
    inventory.write(
        chosen.output,
        f"fingerprints-{family}",
        {
            "command": f"python -m vlmqual_adapters.fingerprints --family {family} --output fixtures",
            "software": [f"{name} {version(name)}" for name in ("transformers", "torch", "numpy")],
        },
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
