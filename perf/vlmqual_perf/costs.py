"""What a phase of a request must cost, from a config.json and shapes alone: FLOPs, bytes and sums over the ranks.

Conventions stand in `costs_tally`. Counts are of one rank; modules are cut evenly, so that every rank has the same, and
of all ranks together there is the rank's count times their number: norms, embeddings and the head are whole on each, so
that their work and bytes are done `tp` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmqual_contract.errors import UsageError
from vlmqual_perf import costs_idefics, costs_idefics3, costs_mllama
from vlmqual_perf.costs_request import Passage, Request
from vlmqual_perf.costs_tally import Tally

PHASES = ("vision", "prefill", "decode", "ttft")
ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
COMPONENTS = ("vision", "connector", "attention", "cross_attention", "mlp", "head")

Config = Mapping[str, object]


@dataclass(frozen=True)
class Cost:
    """What one rank must do in a phase.

    Attributes:
        flops: by component (see `COMPONENTS`); components without work are left out.
        weights_bytes: of parameters that have to be read.
        kv_read_bytes: of self-attention's keys and values that are read from the cache.
        kv_write_bytes: of those that are written into it.
        cross_kv_read_bytes: of images' keys and values that are read from the cache.
        cross_kv_write_bytes: of those that are written into it.
        all_reduces: sums over the ranks.
        all_reduce_bytes: what a rank brings to all of them together, before any algorithm's factor.
    """

    flops: Mapping[str, int]
    weights_bytes: int
    kv_read_bytes: int
    kv_write_bytes: int
    cross_kv_read_bytes: int
    cross_kv_write_bytes: int
    all_reduces: int
    all_reduce_bytes: int

    @property
    def total_flops(self) -> int:
        """Of all components."""
        return sum(self.flops.values())

    @property
    def kv_bytes(self) -> int:
        """Keys and values read and written, of text and of images."""
        return self.kv_read_bytes + self.kv_write_bytes + self.cross_kv_read_bytes + self.cross_kv_write_bytes

    @property
    def moved_bytes(self) -> int:
        """What the memory has to move: weights, keys and values."""
        return self.weights_bytes + self.kv_bytes

    def __add__(self, other: Cost) -> Cost:
        names = [name for name in COMPONENTS if name in self.flops or name in other.flops]
        flops = {name: self.flops.get(name, 0) + other.flops.get(name, 0) for name in names}
        numbers = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "flops"}
        return Cost(flops, **numbers)


@dataclass(frozen=True)
class _Family:
    vision: Callable[[Config, Request, Tally], None]
    text: Callable[[Config, Passage, Tally], None]
    image_positions: Callable[[Config, Request], tuple[int, ...]]
    picture_tokens: Callable[[Config], int]
    divisible: Callable[[Config], Iterator[tuple[str, str, int]]]


_FAMILIES = {
    name: _Family(module.vision, module.text, module.image_positions, module.picture_tokens, module.divisible)
    for name, module in (("idefics", costs_idefics), ("idefics3", costs_idefics3), ("mllama", costs_mllama))
}


def cost(
    config: Config,
    request: Request,
    phase: str,
    *,
    tp: int = 1,
    dtype: str,
    step: int = 0,
    every_position: bool = False,
) -> Cost:
    """What one rank must do in a phase.

    Args:
        config: content of config.json.
        request: the batch.
        phase: "vision" (pictures to connector output or cross-attention states), "prefill" (prompt to last-position
            logits, from features that are there), "decode" (one step), "ttft" (vision and prefill).
        tp: ranks.
        dtype: of weights, keys and values; one of `ELEMENT_BYTES`.
        step: for "decode": how many steps were made before, so that the cache holds the prompt and so many positions.
        every_position: for "prefill": logits of every position instead of the last one.

    Raises:
        UsageError: the family, phase or dtype is unknown, a size in the configuration is no number, or the ranks do not
            divide the heads.
    """
    if phase not in PHASES:
        raise UsageError(f"phase {phase!r} has no cost; those that have are {', '.join(PHASES)}")
    check(config, tp)
    if phase == "ttft":
        first = cost(config, request, "vision", tp=tp, dtype=dtype)
        return first + cost(config, request, "prefill", tp=tp, dtype=dtype)
    family, tally = _family(config), Tally(tp)
    if phase == "vision":
        if not request.total_pictures:
            return _cost(tally, dtype)
        family.vision(config, request, tally)
    else:
        family.text(config, _passage(family, config, request, phase, step, every_position), tally)
    return _cost(tally, dtype)


def weights_bytes(config: Config, *, tp: int = 1, dtype: str) -> int:
    """Bytes of all parameters that one rank holds."""
    check(config, tp)
    family, tally = _family(config), Tally(tp)
    request = Request((1,), ((1,),))
    family.vision(config, request, tally)
    family.text(config, _passage(family, config, request, "prefill", 0, False), tally)
    return tally.stored * element_bytes(dtype)


def picture_tokens(config: Config) -> int:
    """Positions of the prompt that the features of a picture take, 0 where cross-attention reads them."""
    return _family(config).picture_tokens(config)


def check(config: Config, tp: int) -> None:
    """Refuse a number of ranks that would cut through a head or leave a remainder.

    Raises:
        UsageError: says which count does not divide.
    """
    if tp < 1:
        raise UsageError(f"tensor-parallel size {tp} is not positive")
    for where, what, count in _family(config).divisible(config):
        if count % tp:
            raise UsageError(f"{where}: {count} {what} do not divide by {tp} ranks")


def element_bytes(dtype: str) -> int:
    """Bytes of one number.

    Raises:
        UsageError: the dtype is unknown.
    """
    if dtype not in ELEMENT_BYTES:
        raise UsageError(f"dtype {dtype!r} is unknown; known are {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[dtype]


def plain(cost: Cost) -> dict[str, Any]:
    """For a record: FLOPs by component and in all, and every count of bytes."""
    numbers = {name: value for name, value in vars(cost).items() if name != "flops"}
    return {"flops": cost.total_flops, "flops_by_component": dict(cost.flops), **numbers}


def _passage(family: _Family, config: Config, request: Request, phase: str, step: int, every_position: bool) -> Passage:
    images = family.image_positions(config, request)
    nothing = (0,) * request.rows
    if phase == "prefill":
        logits = sum(request.tokens) if every_position else request.rows
        return Passage(request.tokens, nothing, images, fresh=True, logits=logits)
    cached = tuple(tokens + step for tokens in request.tokens)
    return Passage((1,) * request.rows, cached, images, fresh=False, logits=request.rows)


def _family(config: Config) -> _Family:
    name = config.get("model_type")
    if name not in _FAMILIES:
        raise UsageError(f"config.json: model_type is {name!r}; valid are {', '.join(_FAMILIES)}")
    return _FAMILIES[str(name)]


def _cost(tally: Tally, dtype: str) -> Cost:
    each = element_bytes(dtype)
    return Cost(
        flops={name: tally.flops[name] for name in COMPONENTS if tally.flops[name]},
        weights_bytes=tally.weights * each,
        kv_read_bytes=tally.kv_read * each,
        kv_write_bytes=tally.kv_written * each,
        cross_kv_read_bytes=tally.cross_kv_read * each,
        cross_kv_write_bytes=tally.cross_kv_written * each,
        all_reduces=tally.sums,
        all_reduce_bytes=tally.summed * each,
    )
