"""The maker of goldens, run in an environment with the documented version of transformers.

`python -m vlmqual_adapters.goldens --family idefics3 --output fixtures` makes `goldens/idefics3/*.npz` and, with the
pixel and prompt goldens, brings the manifest up to date; `--check` makes everything again and compares. The same for
idefics and mllama, each family in an environment with its own documented version.

Names in a golden file (arrays; gold is float64 to 32 significant bits, positions of padding are 0):

- `inputs/NAME`, `features/image_hidden_states` (F, L, D) or `features/cross_attention_states` (B, N * T * L, D) or
  `features/image_encoder_embeddings`, with a resampler `features/perceiver_embeddings` (B, N, L, D)
- `prefill/logits` (B, V), `prefill/all_logits` (B, S, V), `decode/tokens` (steps, B), `decode/logits` (steps, B, V)
- `taps/vision/COMPONENT`, `taps/prefill/COMPONENT`
- `taps/decode/COMPONENT` (K, B, D) of the K steps that `decode/tapped` names, counted from 1
- `noise/DTYPE/TENSOR`: worst error over the arms; `chain/logits` is `prefill/logits` of arms with their own features
- `arms/DTYPE`: names of the arms; `arms/DTYPE/errors` (arms, tensors); `arms/tensors`: names of the tensors
- `meta`: a JSON text
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlmqual_adapters import cases as cases_idefics3
from vlmqual_adapters import (
    cases_idefics,
    cases_mllama,
    inventory,
    pixels,
    prompts,
    prompts_idefics,
    prompts_mllama,
    recipes_idefics,
    recipes_idefics3,
    recipes_mllama,
)
from vlmqual_adapters.cases import Case, Tensors
from vlmqual_adapters.drawing import SEED
from vlmqual_adapters.ledger import DOCUMENTED, STAND_IN, Ledger
from vlmqual_adapters.transformers_session import TransformersSession
from vlmqual_adapters.transformers_target import DTYPES
from vlmqual_contract.distance import error
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.target import Array, FloatArray, IntArray


class Maker(Protocol):
    """Turns cases into tensors."""

    def tensors(self, case: Case) -> Tensors:
        """The inputs of a case."""
        ...


@dataclass(frozen=True)
class Family:
    """What the maker needs of a family.

    Attributes:
        checkpoint: the tiny one, of cases that name no other.
        cases: of golden files.
        maker: turns cases into tensors; takes processor, image reader and folder of images.
        prompts: writes prompt goldens.
        buckets: patch positions are bucketed in float32, which the guard has to have seen.
    """

    checkpoint: str
    cases: tuple[Case, ...]
    maker: Callable[[Any, Any, Path], Maker]
    prompts: Callable[[Path, Any, Ledger], None]
    buckets: bool


FAMILIES: Mapping[str, Family] = {
    "idefics": Family(recipes_idefics.TINY, cases_idefics.CASES, cases_idefics.Maker, prompts_idefics.make, False),
    "idefics3": Family(recipes_idefics3.TINY, cases_idefics3.CASES, cases_idefics3.Maker, prompts.make, True),
    "mllama": Family(recipes_mllama.TINY, cases_mllama.CASES, cases_mllama.Maker, prompts_mllama.make, False),
}
BITS = 32
#: Half a unit in the last place, relative: storing a result in the dtype may cost that much. Gold itself has 32 bits.
_ROUNDING = {"float64": 2.0**-33, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}


def run(
    session: TransformersSession, case: Case, inputs: Tensors, gold: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Every tensor of a case, from one session.

    Args:
        session: the reference or an arm of it.
        case: says how many steps.
        inputs: the case's tensors.
        gold: features to be injected and tokens to be forced; None when gold itself is made, with greedy tokens.
    """
    made: dict[str, Array] = {}
    features: Any = None
    if "pixel_values" in inputs:
        seen = session.vision(inputs)
        name = session.features_name
        made[f"features/{name}"] = seen.arrays()[name]
        made |= {f"taps/vision/{part}": value for part, value in seen.taps().items()}
        features = seen
        if gold is not None:
            made["chain/logits"] = session.prefill(inputs, seen).logits()
            features = {name: gold[f"features/{name}"]}
    step = session.prefill(inputs, features)
    made["prefill/logits"] = step.logits()
    made["prefill/all_logits"] = step.logits(all_positions=True)
    made |= {f"taps/prefill/{name}": value for name, value in step.taps().items() if not name.startswith("counters.")}
    tokens: list[IntArray] = []
    logits: list[FloatArray] = []
    hidden: dict[str, list[FloatArray]] = {}
    for index in range(case.steps):
        tokens.append(step.tokens() if gold is None else np.asarray(gold["decode/tokens"][index]))
        step = session.decode(step, tokens[-1])
        logits.append(step.logits())
        if index + 1 in case.tapped:
            for name, value in step.taps().items():
                if not name.startswith("counters."):
                    hidden.setdefault(name, []).append(value[:, 0])
    made |= {f"taps/decode/{name}": np.stack(values) for name, values in hidden.items()}
    made["decode/tokens"] = np.stack(tokens)
    made["decode/logits"] = np.stack(logits)
    return made


def _trimmed(value: FloatArray) -> FloatArray:
    """Rounded to 32 significant bits, so that the rest of the mantissa packs away."""
    whole = np.ascontiguousarray(value, dtype=np.float64).view(np.int64)
    drop = 53 - BITS
    return ((whole + (1 << (drop - 1))) >> drop << drop).view(np.float64)


def _by_position(name: str) -> bool:
    return name.startswith("taps/prefill/") or name == "prefill/all_logits"


def make(case: Case, family: str, maker: Maker, reference: Any) -> dict[str, Array]:
    """All arrays of one golden file.

    Args:
        case: what to make.
        family: of the case.
        maker: turns it into tensors.
        reference: a `vlmqual_adapters.reference.Reference`.
    """
    from vlmqual_adapters.reference import ARMS  # needs torch

    inputs = maker.tensors(case)
    mask = inputs["attention_mask"]
    # The library subtracts Mllama's mask from a float, which makes float32 of whole numbers.
    wide = {name for name, a in inputs.items() if a.dtype == np.float32 or name == "cross_attention_mask"}
    exact = {name: a.astype(np.float64) if name in wide else a for name, a in inputs.items()}
    with reference.gold() as (session, guard):
        gold = run(session, case, exact)
    if FAMILIES[family].buckets and guard.lesser == 0 and "pixel_values" in inputs:
        raise RuntimeError("the guard has seen no bucketing of patch positions; it does not look where it should")
    for name, value in gold.items():
        if value.dtype.kind == "f":
            if not np.isfinite(value[mask != 0] if _by_position(name) else value).all():
                raise RuntimeError(f"{case.name}: gold {name} is not finite")
            if _by_position(name):
                value = np.where((mask != 0)[..., None], value, 0.0)
            gold[name] = _trimmed(value)
    # Of Mllama the connector's tap is the features themselves.
    gold = {name: value for name, value in gold.items() if family != "mllama" or name != "taps/vision/connector"}
    made: dict[str, Array] = {f"inputs/{name}": value for name, value in inputs.items()} | gold
    judged = sorted(name for name in gold if name != "decode/tokens")
    judged += ["chain/logits"] if "pixel_values" in inputs else []
    made["arms/tensors"] = np.array(judged)
    for dtype in DTYPES:
        errors = np.zeros((len(ARMS), len(judged)))
        for row, arm in enumerate(ARMS):
            with reference.arm(dtype, arm) as session:
                values = run(session, case, inputs, gold)
            for column, name in enumerate(judged):
                right = gold["prefill/logits" if name == "chain/logits" else name]
                errors[row, column] = error(values[name], right, mask if _by_position(name) else None)
        if not np.isfinite(errors).all():
            raise RuntimeError(f"{case.name}: an arm in {dtype} gave no finite numbers")
        made[f"arms/{dtype}"] = np.array([arm.name for arm in ARMS])
        made[f"arms/{dtype}/errors"] = errors
        for column, name in enumerate(judged):
            made[f"noise/{dtype}/{name}"] = np.array(max(errors[:, column].max(), _ROUNDING[dtype]))
    meta = {
        "case": case.name,
        "title": case.title,
        "family": family,
        "checkpoint": case.checkpoint or FAMILIES[family].checkpoint,
        "rows": [{"text": text, "images": list(images)} for text, images in case.rows],
        "processor_options": case.processor_options(),
        "padding_side": case.side,
        "steps": case.steps,
    }
    if case.tapped:
        made["decode/tapped"] = np.array(case.tapped)
    made["meta"] = np.array(json.dumps(meta))
    unwanted = {
        "taps/vision/": case.vision_taps,
        "taps/prefill/": case.text_taps,
        "prefill/all_logits": case.all_logits,
    }
    dropped = tuple(prefix for prefix, wanted in unwanted.items() if not wanted)
    return {name: value for name, value in made.items() if not name.startswith(dropped)}


def pack(arrays: Mapping[str, Array]) -> bytes:
    """An npz file whose bytes depend on the arrays alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name in sorted(arrays):
            part = io.BytesIO()
            np.lib.format.write_array(part, np.asanyarray(arrays[name]), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, part.getvalue())
    return buffer.getvalue()


def differences(made: Mapping[str, Array], path: Path) -> Iterator[str]:
    """What differs from a stored golden file: gold beyond 1e-8, noise beyond a factor of two, anything else at all."""
    if not path.is_file():
        yield "the file is missing"
        return
    with np.load(path) as stored:
        for name in sorted({*made, *stored.files}):
            if name not in made or name not in stored.files:
                yield f"{name}: only {'stored' if name in stored.files else 'made'}"
                continue
            old, new = stored[name], made[name]
            if old.shape != new.shape or old.dtype.kind != new.dtype.kind:
                yield f"{name}: {new.dtype}{new.shape} was {old.dtype}{old.shape}"
            elif name.startswith(("noise/", "arms/")) and new.dtype.kind == "f":
                if name.startswith("noise/") and not 0.5 <= new / old <= 2.0:
                    yield f"{name}: {new:.3g} was {old:.3g}"
            elif new.dtype == np.float64:
                if (away := error(new, old)) > 1e-8:
                    yield f"{name}: differs by {away:.2g}"
            elif not np.array_equal(old, new):
                yield f"{name}: values differ"


def main(arguments: list[str] | None = None) -> int:
    """Make or check goldens; 0 when all is made or equal, 1 when something differs."""
    parser = argparse.ArgumentParser(prog="python -m vlmqual_adapters.goldens", description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=tuple(FAMILIES), default="idefics3")
    parser.add_argument("--output", type=Path, default=Path("fixtures"), help="the fixtures directory")
    parser.add_argument("--case", action="append", help="only this case; may be given more than once")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with what is stored")
    parser.add_argument(
        "--pixels-only",
        action="store_true",
        help="only pixel and prompt goldens; in an environment with 5.23.0 those that the documented version refuses",
    )
    chosen = parser.parse_args(arguments)
    try:
        return _main(chosen)
    except UsageError as mistake:
        print(f"{parser.prog}: {mistake}", file=sys.stderr)
        return EXIT_USAGE


def _main(chosen: argparse.Namespace) -> int:
    import torch
    import transformers

    installed, documented = transformers.__version__, DOCUMENTED[chosen.family]
    if installed != documented and not (chosen.pixels_only and installed == STAND_IN):
        raise UsageError(
            f"transformers {installed} is installed; goldens of {chosen.family} come from {documented}, "
            f"and with --pixels-only also from {STAND_IN}"
        )
    torch.set_num_threads(1)
    folder: Path = chosen.output / "goldens" / chosen.family
    wrong = 0
    if not chosen.case:
        makers = (("pixels", partial(pixels.make, chosen.family)), ("prompts", FAMILIES[chosen.family].prompts))
        for name, maker in makers:
            ledger = Ledger(folder / f"{name}.json", documented, installed, check=chosen.check)
            maker(chosen.output, transformers, ledger)
            found = ledger.finish()
            wrong += len(found)
            print("\n".join((f"{name}: {len(ledger.entries)} entries, {len(found)} wrong", *found)), flush=True)
    if not chosen.pixels_only:
        wrong += _cases(chosen, folder)
    if not chosen.check:
        _record(chosen)
    return EXIT_FAILED if wrong else EXIT_OK


def _cases(chosen: argparse.Namespace, folder: Path) -> int:
    import transformers
    from transformers.image_utils import load_image

    from vlmqual_adapters.reference import Reference

    family = FAMILIES[chosen.family]
    names = [case.name for case in family.cases]
    wanted = [case for case in family.cases if not chosen.case or case.name in chosen.case]
    if unknown := sorted({*(chosen.case or ())} - {*names}):
        raise UsageError(f"case {unknown[0]!r} is unknown; cases are {', '.join(names)}")
    load: Any = transformers.AutoProcessor.from_pretrained
    opened: dict[str, tuple[Maker, Reference]] = {}
    for name in {case.checkpoint or family.checkpoint for case in wanted}:
        checkpoint = chosen.output / "checkpoints" / name
        processor = load(str(checkpoint), local_files_only=True)
        opened[name] = (
            family.maker(processor, load_image, chosen.output / "images"),
            Reference(checkpoint, chosen.family),
        )
    folder.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for index, case in enumerate(wanted, 1):
        start = time.monotonic()
        maker, reference = opened[case.checkpoint or family.checkpoint]
        made = make(case, chosen.family, maker, reference)
        path = folder / f"{case.name}.npz"
        if chosen.check:
            found = list(differences(made, path))
            wrong += len(found)
            state = "same" if not found else "DIFFERENT: " + "; ".join(found)
        else:
            path.write_bytes(pack(made))
            state = f"{path.stat().st_size:>8} bytes"
        print(f"[{index}/{len(wanted)}] {case.name}: {state} ({time.monotonic() - start:.0f} s)", flush=True)
    return wrong


def _record(chosen: argparse.Namespace) -> None:
    command = f"python -m vlmqual_adapters.goldens --family {chosen.family} --output fixtures"
    packages = ("transformers", "tokenizers", "torch", "numpy", "pillow")
    inventory.write(
        chosen.output,
        f"goldens-{chosen.family}" + ("-pixels" if chosen.pixels_only else ""),
        {
            "command": command + (" --pixels-only" if chosen.pixels_only else ""),
            "seed": SEED,
            "software": [f"{name} {version(name)}" for name in packages],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
