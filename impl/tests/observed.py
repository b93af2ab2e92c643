"""What the bundled models do and hold on the meta device, as torch sees it: the count beside the cost model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlmqual_contract import fixtures
from vlmqual_impl import families, tp
from vlmqual_impl.configs import config_for
from vlmqual_impl.models import idefics, idefics3, mllama

DTYPE = torch.bfloat16
META = torch.device("meta")
PHASES = ("vision", "prefill", "decode")


@dataclass
class Seen:
    """What one phase did on one rank: FLOPs, bytes of parameters it read, sums over ranks, and cache bytes."""

    flops: int = 0
    read_bytes: int = 0
    sums: int = 0
    summed_bytes: int = 0
    written_bytes: int = 0
    cross_written_bytes: int = 0
    cached_bytes: int = 0
    cross_cached_bytes: int = 0


class Reads(TorchDispatchMode):
    """Bytes of a model's parameters that operations take in: each once, of a table the rows that are looked up."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._bytes = {parameter.untyped_storage()._cdata: parameter.nbytes for parameter in model.parameters()}
        self._kept = list(model.parameters())
        self._seen: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for index, value in enumerate(args):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) in self._bytes:
                looked_up = function is torch.ops.aten.embedding.default and not index
                some = min(out.nbytes, self._bytes[key]) if looked_up else self._bytes[key]
                if function not in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
                    self._seen[key] = max(self._seen.get(key, 0), some)
        return out


@contextmanager
def watched(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Count what happens inside; sums over ranks are only noted."""

    def note(total: Tensor, group: object = None) -> None:
        seen.sums += 1
        seen.summed_bytes += total.nbytes

    reads, counter = Reads(model), FlopCounterMode(display=False)
    with torch.no_grad(), mock.patch("torch.distributed.all_reduce", note), counter, reads:
        yield
    seen.flops, seen.read_bytes = counter.get_total_flops(), reads.bytes


@dataclass(frozen=True)
class Observed:
    """One rank of a model: bytes of its parameters, and what its phases did."""

    weights_bytes: int
    phases: Mapping[str, Seen] = field(default_factory=dict)


#: Fewer layers of the published widths, so that a test of them takes a second.
SHALLOW: Mapping[str, Mapping[str, Any]] = {
    "idefics": {
        "": {"num_hidden_layers": 4, "cross_layer_interval": 2},
        "vision_config": {"num_hidden_layers": 1},
        "perceiver_config": {"resampler_depth": 1},
    },
    "idefics3": {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 1}},
    "mllama": {
        "text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        "vision_config": {
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0, 1, 2, 0, 1],
        },
    },
}


def configuration(name: str, shallow: bool = False) -> dict[str, Any]:
    values = dict(json.loads(fixtures.file(f"models/{name}.json").read_text())["config"])
    for part, fewer in SHALLOW[values["model_type"]].items() if shallow else ():
        if part:
            values[part] |= fewer
        else:
            values |= fewer
    return values


@cache
def observe(name: str, ranks: int, rows: int, tokens: int, pictures: int, shallow: bool = True) -> Observed:
    """Run vision, prefill and one decode step of a published configuration, the last rank of several."""
    values = configuration(name, shallow)
    family, config = families.family(values["model_type"]), config_for(values)
    with META:
        network = family.network(config)
        tp.shard(network, family.plan, ranks - 1, ranks)
        network = network.to(DTYPE).eval().requires_grad_(False)
        held = sum(parameter.nbytes for parameter in network.parameters())
        phases = {"idefics": _idefics, "idefics3": _idefics3, "mllama": _mllama}[family.name]
        seen = {phase: Seen() for phase in PHASES}
        phases(network, rows, tokens, pictures, seen)
    return Observed(held, seen)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=META)


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros((rows, tokens), dtype=torch.int64, device=META)


def _text(
    network: nn.Module,
    run: Callable[[Tensor, Tensor, bool], Tensor],
    embed: nn.Module,
    head: nn.Module,
    cache: Any,
    rows: int,
    tokens: int,
    seen: Mapping[str, Seen],
) -> None:
    """A prompt and one further token."""
    with watched(network, seen["prefill"]):
        head(run(embed(_ids(rows, tokens)), _ids(rows, tokens), True)[:, -1])
    seen["prefill"].written_bytes, seen["prefill"].cross_written_bytes = _cached(cache)
    seen["decode"].cached_bytes, seen["decode"].cross_cached_bytes = _cached(cache)
    with watched(network, seen["decode"]):
        head(run(embed(_ids(rows, 1)), _ids(rows, 1), False)[:, -1])
    seen["decode"].written_bytes = _cached(cache)[0] - seen["decode"].cached_bytes
    seen["decode"].cross_written_bytes = _cached(cache)[1] - seen["decode"].cross_cached_bytes


def _cached(cache: Any) -> tuple[int, int]:
    """Bytes of what is in a cache: of text, of images."""
    cross = 0 if cache.cross is None else sum(k.nbytes + v.nbytes for k, v in cache.cross._pairs.values())
    own = sum(cache[number][0].nbytes + cache[number][1].nbytes for number in cache._keys)
    return own, cross


def _idefics3(network: Any, rows: int, tokens: int, pictures: int, seen: Mapping[str, Seen]) -> None:
    trunk, vision = network.model, network.config.vision_config
    pixels = _empty(rows * pictures, 3, vision.image_size, vision.image_size)
    places = _ids(rows * pictures, (vision.image_size // vision.patch_size) ** 2)
    with watched(network, seen["vision"]):
        trunk.connector(trunk.vision_model.placed(pixels, places, None, "eager"))
    trunk.implementation = "eager"
    cache = idefics3.new_cache(trunk, rows, tokens + 1)

    def run(x: Tensor, positions: Tensor, first: bool) -> Tensor:
        return idefics3.prefill(trunk, x, positions, None, cache)

    _text(network, run, trunk.text_model.embed_tokens, network.lm_head, cache, rows, tokens, seen)


def _idefics(network: Any, rows: int, tokens: int, pictures: int, seen: Mapping[str, Seen]) -> None:
    trunk, side = network.model, network.config.vision_config.image_size
    trunk.implementation = "eager"
    with watched(network, seen["vision"]):
        features = idefics.encode_images(trunk, _empty(rows, pictures, 3, side, side))
    keys = features.flatten(1, 2).shape[1]
    cache = idefics.new_cache(trunk, rows, tokens + 1)

    def run(x: Tensor, positions: Tensor, first: bool) -> Tensor:
        seeing = torch.ones((rows, x.shape[1], 1), dtype=torch.bool, device=META)
        states = features.flatten(1, 2) if first else None
        images = idefics.Images(states, _empty(rows, 1, x.shape[1], keys), seeing)
        return idefics.run(trunk, x, positions, None, cache, images)

    _text(network, run, trunk.embed_tokens, network.lm_head, cache, rows, tokens, seen)


def _mllama(network: Any, rows: int, tokens: int, pictures: int, seen: Mapping[str, Seen]) -> None:
    sizes, language = network.config.vision_config, network.language_model
    pixels = _empty(rows, pictures, sizes.max_num_tiles, 3, sizes.image_size, sizes.image_size)
    mask = torch.ones(pixels.shape[:3], device=META)
    with watched(network, seen["vision"]):
        x = network.vision_model.encode(pixels, _ids(rows, pictures), mask, implementation="eager")
        features = network.multi_modal_projector(x).flatten(1, 3)
    cache = mllama.new_cache(language.model, rows, tokens + 1)

    def run(x: Tensor, positions: Tensor, first: bool) -> Tensor:
        images = mllama.Images(states=features if first else None)
        return mllama.run(language.model, x, positions, None, cache, images, implementation="eager")

    _text(network, run, language.model.embed_tokens, language.lm_head, cache, rows, tokens, seen)
