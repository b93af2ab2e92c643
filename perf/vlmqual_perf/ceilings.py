"""What a device can do at most: measured by a target's own probes, and as published in its data sheet."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from vlmqual_contract import fixtures
from vlmqual_contract.errors import TargetFailure, Unsupported, UsageError
from vlmqual_contract.remote import RemoteTarget
from vlmqual_perf.costs import ELEMENT_BYTES

#: A pass of a probe that takes so long is told apart from the cost of starting it.
LONG_ENOUGH_S = 0.02
#: Bytes of one buffer of the stream probe: beyond any usual last-level cache, then more for fast devices.
STREAM_BYTES = (2**27, 2**30)
#: Sides of the square product: small ones first, since a CPU without units for a dtype takes seconds for large ones.
GEMM_SIDES = (256, 1024, 4096, 8192)
#: Bytes that each rank brings to the sum whose bandwidth is taken.
ALL_REDUCE_BYTES = 2**24


@dataclass(frozen=True)
class Ceilings:
    """What one device can do at most; None for what is not known.

    Attributes:
        kind: "measured" here by probes, or "data-sheet".
        source: of which target or data sheet the figures are.
        dtype: of the matrix product.
        bandwidth_bytes_per_s: of its memory: a stream that reads as much as it writes, or as published.
        flops_per_s: dense matrix product in `dtype`.
        all_reduce_latency_s: of one element over all ranks; None with one rank and in data sheets.
        all_reduce_bytes_per_s: what a rank brings to a large sum, by its seconds; None likewise.
        link_bytes_per_s: one direction between devices, data sheets only.
        memory_bytes: data sheets only.
        ranks: over how many the measured sums went.
        notes: what is missing, and why.
    """

    kind: Literal["measured", "data-sheet"]
    source: str
    dtype: str
    bandwidth_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    all_reduce_latency_s: float | None = None
    all_reduce_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    memory_bytes: int | None = None
    ranks: int = 1
    notes: tuple[str, ...] = field(default=())

    def plain(self) -> dict[str, Any]:
        """For a record: what is known."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def measured(target: RemoteTarget, dtype: str = "") -> Ceilings:
    """Let a target's probes say what its device can do; a probe that it lacks, or that fails, leaves a note.

    The same ranks that run the model run the probes together, so that what they share is shared in both.

    Args:
        target: in its workers.
        dtype: of the matrix product; "" for the target's own.
    """
    dtype = dtype or target.info.dtype
    ranks, each = target.processes, ELEMENT_BYTES.get(dtype, 4)
    notes: list[str] = []

    def rate(name: str, amount: float, shapes: Sequence[tuple[int, ...]]) -> float | None:
        """Work by its seconds, with the first shape that takes long enough; `amount` is that of an element."""
        try:
            for shape in shapes:
                seconds = target.probe(name, shape, dtype)
                if seconds >= LONG_ENOUGH_S:
                    break
            return amount * math.prod(shape) / seconds
        except (Unsupported, UsageError, TargetFailure) as error:
            notes.append(f"{name}: {error}")
            return None

    bandwidth = rate("stream", 2 * each, [(size // each,) for size in STREAM_BYTES])
    flops = rate("gemm", 2, [(side, side, side) for side in GEMM_SIDES])
    one = rate("all-reduce", 1, [(1,)]) if ranks > 1 else None
    summed = rate("all-reduce", each, [(ALL_REDUCE_BYTES // each,)]) if ranks > 1 else None
    return Ceilings(
        "measured",
        f"probes of {target.text}",
        dtype,
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=flops,
        all_reduce_latency_s=1 / one if one else None,
        all_reduce_bytes_per_s=summed,
        ranks=ranks,
        notes=tuple(notes),
    )


def of_target(target: RemoteTarget) -> tuple[Ceilings, ...]:
    """Measured ceilings of a running target, and the published ones of its device where there are such.

    An emulated target has none: its figures say nothing of a device.
    """
    if target.info.emulated:
        return ()
    sheet = published(target.info.device, target.info.dtype)
    return (measured(target), *([sheet] if sheet else []))


@dataclass(frozen=True)
class Device:
    """One entry of `fixtures/devices.toml`: published figures of a device.

    Attributes:
        name: by which it is asked for.
        title: what it is.
        match: texts that a device's own name contains.
        memory_bytes: of its memory.
        bandwidth_bytes_per_s: of its memory.
        flops: dense matrix products per second by dtype.
        link_bytes_per_s: one direction between devices, None where it is not published.
        sources: where the figures stand.
        missing: figures that nobody has published, and what has to be known of the others.
    """

    name: str
    title: str
    match: tuple[str, ...]
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: Mapping[str, float]
    sources: tuple[str, ...]
    link_bytes_per_s: float | None = None
    missing: tuple[str, ...] = ()

    def ceilings(self, dtype: str) -> Ceilings:
        """As published for a dtype."""
        peak = self.flops.get(dtype)
        notes = self.missing
        if peak is None:
            notes = (f"no peak is published for {dtype}; there are {', '.join(self.flops)}", *notes)
        return Ceilings(
            "data-sheet",
            f"{self.name}: {'; '.join(self.sources)}",
            dtype,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            flops_per_s=peak,
            link_bytes_per_s=self.link_bytes_per_s,
            memory_bytes=self.memory_bytes,
            notes=notes,
        )


@cache
def devices() -> dict[str, Device]:
    """All published devices by name."""
    tables = tomllib.loads(fixtures.file("devices.toml").read_text("utf-8"))["device"]
    found = {}
    for table in tables:
        lists = {key: tuple(table.get(key, ())) for key in ("match", "sources", "missing")}
        found[table["name"]] = Device(**{**table, **lists})
    return found


def device(name: str) -> Device:
    """The published device of this name, upper and lower case alike.

    Raises:
        UsageError: it is not known.
    """
    for known, entry in devices().items():
        if known.lower() == name.lower():
            return entry
    raise UsageError(
        f"device {name!r} is unknown; there are {', '.join(devices())}, and measured:TARGET for the probes of a target"
    )


def published(own_name: str, dtype: str) -> Ceilings | None:
    """Data-sheet ceilings of a device by what it calls itself, None where no entry fits."""
    for entry in devices().values():
        if any(text.lower() in own_name.lower() for text in entry.match):
            return entry.ceilings(dtype)
    return None
