"""`vlmqual predict`: how fast could it be? Nothing here is measured, and every figure says so."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmqual_contract import fixtures
from vlmqual_contract.checkpoint import settings
from vlmqual_contract.errors import EXIT_OK, UsageError
from vlmqual_contract.remote import RemoteTarget
from vlmqual_perf import costs
from vlmqual_perf.ceilings import Ceilings, device, measured
from vlmqual_perf.costs_request import Request, number, part
from vlmqual_perf.plan import sizes_of
from vlmqual_perf.roofline import Bound, Prediction, predict

MEASURED = "measured:"
#: Frames of an image of 4 x 4 tiles and the whole of it, as Idefics3's released processor makes of a large square one.
FRAMES = 17
_WIDTH = 80


@dataclass(frozen=True)
class Question:
    """What is to be predicted.

    Attributes:
        name: of the model.
        source: where its configuration comes from.
        config: content of its config.json.
        request: the batch, as it is computed.
        words: the request in words.
        new_tokens: decode steps.
        dtype: of weights, keys and values.
        ceilings: gives those of a device for a number of ranks.
        about: what is known of the device.
    """

    name: str
    source: str
    config: Mapping[str, object]
    request: Request
    words: str
    new_tokens: int
    dtype: str
    ceilings: Callable[[int], Ceilings]
    about: str


class _Command:
    help = "predict latency and memory of a model on a device from published figures, without running anything"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        known = ", ".join(models())
        add("--model", required=True, metavar="M", help=f"{known}, or a directory with a config.json")
        add("--device", required=True, metavar="D", help="name of a published device, or measured:TARGET")
        add("--tp", default="1", metavar="N[,N...]", help="tensor-parallel sizes (1)")
        add("--images", type=int, default=1, metavar="N", help="images of a row (1)")
        add("--tiles", type=int, metavar="N", help=f"tiles or frames of an image (most: Idefics3 {FRAMES}, Idefics 1)")
        add("--prompt-tokens", type=int, default=64, metavar="N", help="tokens of the text beside its images (64)")
        add("--new-tokens", type=int, default=128, metavar="N", help="decode steps (128)")
        add("--batch", type=int, default=1, metavar="N", help="rows (1)")
        add(
            "--dtype",
            metavar="T",
            help="of weights and caches (the model's where the device has a figure for it, a target's own)",
        )
        add("--json", action="store_true", help="print JSON instead of a table")

    def run(self, args: argparse.Namespace) -> int:
        """Read, predict, print."""
        for name in ("prompt_tokens", "new_tokens", "batch"):
            if getattr(args, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
        if args.images < 0:
            raise UsageError(f"--images {args.images} is negative")
        question, sizes = _question(args), sizes_of(args.tp)
        rows = [(size, question.ceilings(size)) for size in sizes if not _impossible(question.config, size)]
        ceilings = dict(rows)
        found = [
            predict(
                question.config,
                question.request,
                question.new_tokens,
                tp=size,
                dtype=question.dtype,
                ceilings=ceilings.get(size, Ceilings("data-sheet", "", question.dtype)),
            )
            for size in sizes
        ]
        if args.json:
            print(json.dumps(_plain(question, found, ceilings), indent=2))
        else:
            _print(question, found, ceilings)
        return EXIT_OK


command = _Command()


def models() -> list[str]:
    """Names of published configurations."""
    prefix = "models/"
    return [name.removeprefix(prefix).removesuffix(".json") for name in fixtures.names(prefix)]


def configuration(text: str) -> tuple[Mapping[str, object], str]:
    """A published configuration by name, or the config.json of a directory; and where it comes from.

    Raises:
        UsageError: neither is there.
    """
    if text in models():
        entry = json.loads(fixtures.file(f"models/{text}.json").read_text("utf-8"))
        return entry["config"], entry["source"]
    if Path(text).is_dir():
        return settings(Path(text)), str(Path(text) / "config.json")
    raise UsageError(f"--model {text!r} is neither a directory nor one of {', '.join(models())}")


def request_of(
    config: Mapping[str, object], *, images: int, tiles: int | None, prompt_tokens: int, batch: int
) -> Request:
    """Equal rows of one text with so many images.

    Args:
        config: content of config.json.
        images: of a row. A text of Idefics without any has a slot of zeros, as its processor makes it.
        tiles: of an image; None for the most that there are. Mllama computes all places for tiles in any case.
        prompt_tokens: of the text; features that take places of tokens come on top.
        batch: rows.

    Raises:
        UsageError: the number of tiles is not possible.
    """
    family = config.get("model_type")
    most = {"mllama": number(part(config, "vision_config"), "max_num_tiles", 4), "idefics": 1}.get(str(family))
    chosen = tiles or most or FRAMES
    if chosen < 1 or (most is not None and chosen > most):
        raise UsageError(f"--tiles {chosen}: an image of {family} has 1 to {most}")
    computed = most or chosen
    slots = max(images, 1) if family == "idefics" else images
    tokens = prompt_tokens + images * computed * costs.picture_tokens(config)
    return Request((tokens,) * batch, ((computed,) * slots,) * batch if slots else ())


def _question(args: argparse.Namespace) -> Question:
    config, source = configuration(args.model)
    costs.check(config, 1)
    request = request_of(
        config, images=args.images, tiles=args.tiles, prompt_tokens=args.prompt_tokens, batch=args.batch
    )
    wanted = args.dtype or str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    costs.element_bytes(wanted)
    ceilings: Callable[[int], Ceilings]
    if args.device.startswith(MEASURED):
        target = args.device.removeprefix(MEASURED)
        with RemoteTarget(target) as one:
            wanted = args.dtype or one.info.dtype

        def ceilings(size: int) -> Ceilings:
            with RemoteTarget(target, tp=size) as running:
                return measured(running, wanted)

        about = f"ceilings of target {target}, measured here"
    else:
        entry = device(args.device)
        if not args.dtype and wanted not in entry.flops:
            wanted = next(iter(entry.flops))

        def ceilings(size: int) -> Ceilings:
            return entry.ceilings(wanted)

        about = f"{entry.name}: {entry.title}"
    pictures = sum(request.pictures[0]) if request.pictures else 0
    words = (
        f"{wanted}, batch {args.batch}; each row: {request.tokens[0]} prompt tokens, {args.new_tokens} new tokens, "
        f"images: {args.images}, of which {pictures} tiles or frames are computed"
    )
    return Question(args.model, source, config, request, words, args.new_tokens, wanted, ceilings, about)


def _impossible(config: Mapping[str, object], size: int) -> bool:
    try:
        costs.check(config, size)
    except UsageError:
        return True
    return False


def _print(question: Question, rows: Sequence[Prediction], ceilings: Mapping[int, Ceilings]) -> None:
    console = Console(highlight=False, width=_WIDTH)
    console.print(f"PREDICTED, not measured: {question.name} on {question.about}", markup=False)
    console.print(question.words, markup=False)
    table = Table(
        title="predicted, ms for each phase and what limits it", title_justify="left", box=None, pad_edge=False
    )
    for name in ("TP", "vision", "prefill", "decode step", "memory of a device"):
        table.add_column(name, justify="right" if name == "TP" else "left")
    for row in rows:
        if row.bounds is None:
            table.add_row(str(row.tp), "-", "-", "-", "not possible")
        else:
            cells = [_milliseconds(row.bounds.get(phase)) for phase in ("vision", "prefill", "decode")]
            table.add_row(str(row.tp), *cells, _memory(row))
    console.print(table)
    reasons = [f"TP={row.tp}: {row.reason}" for row in rows if row.reason]
    for line in (*reasons, "", *_notes(question, rows, ceilings)):
        console.print(line, markup=False)


def _notes(question: Question, rows: Sequence[Prediction], ceilings: Mapping[int, Ceilings]) -> list[str]:
    """What was left out, and where the figures are from."""
    first = next(iter(ceilings.values()), None)
    lines = [
        "time = the longer of compute and bandwidth, plus all-reduce where its speed is known; the model is cut as the "
        "bundled implementation cuts it, norms, embeddings and head whole on every device",
        "memory = weights, keys and values; activations and what a runtime keeps for itself come on top",
    ]
    several = [one for size, one in ceilings.items() if size > 1]
    if any(not (one.link_bytes_per_s or one.all_reduce_bytes_per_s) for one in several):
        lines.append("all-reduce is left out: the speed of the link between devices is not known")
    elif any(one.all_reduce_latency_s is None for one in several):
        lines.append("all-reduce counts bytes over the published link; its latency is not known and left out")
    if any(bound.seconds and not bound.whole for row in rows for bound in (row.bounds or {}).values()):
        lines.append("> a resource whose ceiling is not known is left out, so that it takes longer than this")
    if first is not None:
        lines += [f"note: {note}" for note in first.notes]
        lines.append(f"figures: {first.source}")
    lines.append(f"model: {question.source}")
    return lines


def _milliseconds(bound: Bound | None) -> str:
    if bound is None:
        return "none"
    if bound.seconds is None:
        return "unknown"
    return f"{'' if bound.whole else '>'}{1e3 * bound.seconds:.4g} {bound.limit}"


def _memory(row: Prediction) -> str:
    needed = f"{row.needed_bytes / 1e9:.3g}"
    if row.memory_bytes is None:
        return f"{needed} GB"
    return f"{needed} of {row.memory_bytes / 1e9:.3g} GB{'' if row.fits else ', NO FIT'}"


def _plain(question: Question, rows: Sequence[Prediction], ceilings: Mapping[int, Ceilings]) -> dict[str, Any]:
    found = []
    for row in rows:
        entry: dict[str, Any] = {"tp": row.tp, "possible": not row.reason, "reason": row.reason}
        if row.bounds is not None:
            entry["phases"] = {name: vars(bound) for name, bound in row.bounds.items()}
            entry |= {
                "weights_bytes": row.weights_bytes,
                "kv_bytes": row.kv_bytes,
                "cross_kv_bytes": row.cross_kv_bytes,
                "memory_bytes": row.memory_bytes,
                "fits": row.fits,
                "ceilings": ceilings[row.tp].plain(),
            }
        found.append(entry)
    return {
        "predicted": True,
        "model": question.name,
        "source": question.source,
        "device": question.about,
        "dtype": question.dtype,
        "request": vars(question.request) | {"new_tokens": question.new_tokens},
        "rows": found,
        "notes": _notes(question, rows, ceilings),
    }
