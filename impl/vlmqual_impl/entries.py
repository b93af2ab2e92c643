"""The fixed-shape functions that a compiler sees: text steps over a cache of fixed size, vision, keys of images, head.

An entry is a module with named inputs and named states. States are the cache: they follow the inputs in the call, and
come back, changed, after the outputs. Whatever has no fixed shape, or is a matter of a few numbers, is the caller's:
the embedding, rotary cosines and sines, masks as numbers that are added to scores, and where keys and values go.

Legend of shapes: B rows, S tokens of a call, K cache slots, D text width, d head width, H key heads, V vocabulary,
N image slots of a row, L features of an image, KI = N * L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlmqual_impl.cache import CrossCache, KeyValueCache
from vlmqual_impl.layers import Pass


@dataclass(frozen=True)
class Spec:
    """A tensor of an entry.

    Attributes:
        name: of the tensor.
        shape: fixed.
        dtype: of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def zeros(self) -> Tensor:
        """A tensor of this kind."""
        return torch.zeros(self.shape, dtype=self.dtype)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {kind}{list(self.shape)}"


@dataclass(frozen=True)
class Entry:
    """A function of fixed shapes.

    Attributes:
        name: kind and sizes, for example "text-b1-s128".
        module: takes inputs, then states; gives a tuple of outputs, then states.
        inputs: in the order of the call.
        outputs: in the order of the result.
        states: keys and values of every layer.
        idle: weights of the module that the function does not read.
    """

    name: str
    module: nn.Module = field(repr=False)
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    states: tuple[Spec, ...] = ()
    idle: tuple[nn.Parameter, ...] = field(default=(), repr=False)

    def weights(self) -> list[nn.Parameter]:
        """The weights that the function reads, each once."""
        idle = set(map(id, self.idle))
        return [weight for weight in self.module.parameters() if id(weight) not in idle]

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights that the function reads."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights())

    @property
    def states_bytes(self) -> int:
        """Bytes of the states."""
        return sum(state.size_bytes for state in self.states)


class SlotCache(KeyValueCache):
    """A cache as a compiler sees it: whole buffers, written where a tensor says, and given back whole.

    Args:
        keys: of each layer by its number, (B, H, K, d).
        values: like keys.
        slots: (S,) int64, where the tokens of this call go.
        cross: keys and values of images.
    """

    def __init__(
        self,
        keys: dict[int, Tensor],
        values: dict[int, Tensor],
        slots: Tensor,
        cross: CrossCache | None,
    ) -> None:
        self._keys = keys
        self._values = values
        self.slots = slots
        self.cross = cross
        self.length = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's keys and values (B, H, S, d) into their slots; the whole buffers (B, H, K, d)."""
        self._keys[layer] = self._keys[layer].index_copy(2, self.slots, keys)
        self._values[layer] = self._values[layer].index_copy(2, self.slots, values)
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        """Nothing: the caller counts."""

    def states(self) -> tuple[Tensor, ...]:
        """Keys of every layer, then values."""
        return (*self._keys.values(), *self._values.values())


@dataclass(frozen=True)
class Decoder:
    """What a text entry needs of a family.

    Attributes:
        blocks: runs decoder and final norm: embeddings (B, S, D), what layers share, what they see of images (added to
            scores (B, 1, S, KI); (B, S, 1), 0 for tokens that see none), None without images; to (B, S, D).
        head: to logits.
        layers: numbers of layers with a cache of their own.
        crossing: numbers of layers, or blocks, with keys of images; empty in a family without.
        apart: those are numbered on their own.
    """

    blocks: Callable[[Tensor, Pass, tuple[Tensor, Tensor] | None], Tensor]
    head: nn.Module
    layers: tuple[int, ...]
    crossing: tuple[int, ...] = ()
    apart: bool = False


class TextStep(nn.Module):
    """Some tokens of every row through the decoder.

    Call: embeddings (B, S, D), cos and sin (B, 1, S, d), bias (B, 1, S, K), slots (S,), last (B,): the token whose
    logits are wanted; with images image_bias (B, 1, S, KI), image_rows (B, S, 1) and for each crossing layer keys, then
    values (B, H, KI, d); then keys and values of the cache.

    Result: logits (B, V), states after the final norm (B, S, D), then keys and values of the cache.
    """

    def __init__(self, layers: Sequence[nn.Module], decoder: Decoder, attention: str, images: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList([*layers, decoder.head])
        self.decoder = decoder
        self.attention = attention
        self.images = images

    def forward(
        self, embeddings: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, slots: Tensor, last: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """See the class."""
        given = Given.of(self.decoder, self.images, rest)
        cache = SlotCache(given.keys, given.values, slots, given.cross)
        shared = Pass(cos, sin, bias, cache, self.attention)
        return *self.run(embeddings, shared, given.seen, last), *cache.states()

    def run(self, x: Tensor, shared: Pass, seen: tuple[Tensor, Tensor] | None, last: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S, D) to logits (B, V) of the wanted tokens, and states (B, S, D)."""
        hidden = self.decoder.blocks(x, shared, seen)
        at = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self.decoder.head(hidden.gather(1, at)[:, 0]), hidden


@dataclass(frozen=True, eq=False)
class Given:
    """Tensors that follow the tokens' own in the call of a text entry.

    Attributes:
        seen: what tokens see of images; None without images.
        cross: keys and values of images; None in a family without.
        keys: buffers of every layer with a cache of its own.
        values: like keys.
    """

    seen: tuple[Tensor, Tensor] | None
    cross: CrossCache | None
    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    @classmethod
    def of(cls, decoder: Decoder, images: bool, tensors: Sequence[Tensor]) -> Given:
        """Tell the tensors apart, in the order of `TextStep`."""
        given, seen = list(tensors), None
        cross = CrossCache(decoder.crossing, apart=decoder.apart) if decoder.crossing else None
        if images and cross is not None:
            count = len(decoder.crossing)
            seen = given[0], given[1]
            for index, layer in enumerate(decoder.crossing):
                cross.replace(layer, given[2 + index], given[2 + count + index])
            given = given[2 + 2 * count :]
        half = len(decoder.layers)
        keys = dict(zip(decoder.layers, given[:half], strict=True))
        return cls(seen, cross, keys, dict(zip(decoder.layers, given[half:], strict=True)))
