"""`vlmqual perf --dry-run`: what would be compiled and run, what it would keep on a device, and whether that fits."""

from __future__ import annotations

import json
import struct
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmqual_contract import machine
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.footprint import Footprint
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import Info, Model, Options
from vlmqual_perf.plan import config_of, model_of, prompts_of

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MIB = 2**20


def show(
    target: RemoteTarget,
    scenarios: Sequence[Scenario],
    sizes: Sequence[int],
    checkpoint: Path | None,
    memory_bytes: int | None,
    positions: int,
    console: Console,
) -> None:
    """Print what each scenario would take at each tensor-parallel size.

    Args:
        target: is asked; one that does not tell is estimated from the checkpoint's files.
        scenarios: requests.
        sizes: tensor-parallel sizes.
        checkpoint: of the user, None for the scenarios' own.
        memory_bytes: of a device, where the user says so; else what the target says.
        positions: cache positions of a sequence.
        console: is printed to.
    """
    info = target.info
    kind = " (emulated)" if info.emulated and "emulated" not in info.runtime else ""
    console.print(f"{info.name} on {info.device}, {info.runtime}, {info.dtype}{kind}", markup=False, soft_wrap=True)
    notes: dict[str, None] = {}
    for scenario in scenarios:
        model = model_of(scenario, checkpoint)
        for size in sizes:
            console.print(f"\n{scenario.id}, tensor-parallel size {size}", style="bold", markup=False)
            options = Options(tp=size, max_length=positions, batch=scenario.batch)
            try:
                found = target.footprint(model, options, prompts_of(scenario), scenario.new_tokens)
                if found is None:
                    found = estimate(model, options, info)
            except (Unsupported, UsageError) as error:
                console.print(f"  not possible: {error}", markup=False, soft_wrap=True)
                continue
            notes.update(dict.fromkeys(found.notes))
            for line in lines(found, scenario, memory_bytes, positions):
                console.print(_wrapped(line, console.width), markup=False, highlight=False)
    for note in notes:
        console.print(_wrapped(f"note: {note}", console.width), markup=False, highlight=False)


def lines(found: Footprint, scenario: Scenario, memory_bytes: int | None, positions: int) -> list[str]:
    """A footprint in words, indented by two or four blanks."""
    rows = f"{scenario.batch} row{'s' if scenario.batch > 1 else ''}"
    counted = f", {found.tokens} prompt tokens" if found.tokens else ""
    told = [f"  {rows}{counted}, {scenario.new_tokens} new tokens, cache for {positions} positions"]
    for graph in found.graphs:
        times = "once" if graph.calls == 1 else f"{graph.calls} times"
        told.append(f"  graph {graph.name}, run {times}, weights {_mib(graph.weights_bytes)}")
        told += [f"    {item}" for item in _grouped(graph.tensors)]
    if not found.graphs:
        told.append("  graphs: none")
    devices = "the device" if found.devices == 1 else f"each of {found.devices} devices"
    told.append(
        f"  on {devices}: weights {_mib(found.weights_bytes)} + KV cache {_mib(found.cache_bytes)}"
        f" = {_mib(found.needed_bytes)}"
    )
    told.append(f"  {fit(found, memory_bytes)}")
    return told


def fit(found: Footprint, memory_bytes: int | None) -> str:
    """Whether it fits a device's memory."""
    memory = found.memory_bytes if memory_bytes is None else memory_bytes
    if memory is None:
        return "the device's memory is not known: --device-memory GIB says it"
    word = "fits" if found.needed_bytes <= memory else "DOES NOT FIT"
    return f"{word} the device's {_mib(memory)}"


def estimate(model: Model, options: Options, info: Info) -> Footprint:
    """What a target that does not tell would keep, from the checkpoint's files and configuration.

    Raises:
        UsageError: they cannot be read.
    """
    count, size = _weights(Path(model.path)), _BYTES.get(info.dtype, 4)
    config = config_of(model)
    text: Mapping[str, Any] = config.get("text_config") or config  # type: ignore[assignment]
    try:
        heads = int(text.get("num_attention_heads") or 32)
        keys = int(text.get("num_key_value_heads") or heads)
        width = int(text.get("head_dim") or int(text.get("hidden_size") or 4096) // heads)
        layers = int(text.get("num_hidden_layers") or 32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{model.path}/config.json: sizes of the text model cannot be read: {error}") from error
    cache = 2 * layers * options.batch * keys * width * options.max_length * size
    note = (
        "the target does not tell what it compiles; estimated from the checkpoint's tensors and sizes, cut evenly, "
        "without keys and values of images and without activations"
    )
    memory = machine.memory_bytes() or None if info.device.startswith("cpu") else None
    return Footprint((), options.tp, count * size // options.tp, cache // options.tp, memory, notes=(note,))


def _weights(directory: Path) -> int:
    """Numbers in a checkpoint's safetensors files, from their headers."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{directory} has no safetensors files to count the weights of")
    count = 0
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 1 << 27)))
            for name, tensor in header.items():
                size = 1
                for side in tensor["shape"] if name != "__metadata__" else (0,):
                    size *= side
                count += size
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UsageError(f"{path}: the header of a safetensors file cannot be read: {error}") from error
    return count


def _grouped(tensors: Sequence[str]) -> list[str]:
    """Tensors of equal shape whose names differ by a number on one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        name, _, shape = tensor.partition(" ")
        stem, dot, number = name.rpartition(".")
        key = (f"{stem}.", shape) if dot and number.isdigit() else (name, shape)
        groups.setdefault(key, []).append(number)
    return [
        f"{stem}{numbers[0]} to {stem}{numbers[-1]} {shape}"
        if len(numbers) > 1
        else f"{stem}{numbers[0]} {shape}"
        if stem.endswith(".")
        else f"{stem} {shape}"
        for (stem, shape), numbers in groups.items()
    ]


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(line.strip(), width, initial_indent=indent, subsequent_indent=f"{indent}  ")


def _mib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / _MIB:,.1f} MiB"
