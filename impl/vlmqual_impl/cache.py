"""Caches of keys and values: of self-attention, of fixed size, and of images, computed once.

A sequence occupies slots in the order in which its tokens came, padding included; which slots count is the caller's
mask. Slots that were never written are never read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerView:
    """Written part of one layer: keys and values (B, kv heads, length, head_dim)."""

    keys: Tensor
    values: Tensor


class CrossCache:
    """Keys and values that cross-attention layers have computed from image features.

    Each layer computes them once for each image, when the features arrive; every later token reads them here. Images of
    a later call are placed behind those of the earlier ones (`keep`), or in their place (`replace`).

    Attributes:
        computed: layer number to how often keys and values were computed (MLLAMA-DEC-005).
        apart: the layers stand between the decoder's and are numbered on their own; they are then no part of what
            `KeyValueCache` shows.
    """

    def __init__(self, layers: Sequence[int], *, apart: bool = False) -> None:
        self.computed = dict.fromkeys(layers, 0)
        self.apart = apart
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store what a layer has computed, (B, kv heads, image tokens, head_dim) each; give back all there is."""
        if layer in self._pairs:
            old_keys, old_values = self._pairs[layer]
            keys, values = torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2)
        self.replace(layer, keys, values)
        return keys, values

    def replace(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store what a layer has computed in the place of what there was."""
        self.computed[layer] += 1
        self._pairs[layer] = keys, values

    def __contains__(self, layer: object) -> bool:
        return layer in self._pairs

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._pairs[layer]

    def __len__(self) -> int:
        return len(self._pairs)


class Slots(ABC):
    """How full a cache is.

    Attributes:
        length: slots written so far.
    """

    length: int

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Slots that there are."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows."""

    def require(self, tokens: int) -> None:
        """Refuse more tokens than there are free slots.

        Raises:
            ValueError: says how many slots there are, are written and would be needed.
        """
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"the cache has {self.max_length} positions, {self.length} are taken and {tokens} more do not fit"
            )


class KeyValueCache(Slots):
    """Keys and values of every layer.

    Indexing gives one layer's (keys, values), each (B, kv heads, length, head_dim): two tensors per layer, with as many
    heads as `num_key_value_heads` (IDEFICS3-MODEL-009, IDEFICS3-MODEL-010). Of a cross-attention layer it gives those
    of the images, length 0 when there are none.

    Attributes:
        length: slots written so far.
        max_length: slots that there are.
        cross: keys and values of images, None in models without cross-attention layers.
    """

    def __init__(
        self,
        *,
        layers: int | Sequence[int],
        batch: int,
        heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        cross: CrossCache | None = None,
    ) -> None:
        shape = (batch, heads, max_length, head_dim)
        numbers = range(layers) if isinstance(layers, int) else layers
        self._keys = {number: torch.empty(shape, dtype=dtype, device=device) for number in numbers}
        self._values = {number: torch.empty(shape, dtype=dtype, device=device) for number in numbers}
        self.cross = cross
        self.length = 0

    @property
    def _any(self) -> Tensor:
        return next(iter(self._keys.values()))

    @property
    def max_length(self) -> int:
        """Slots that there are."""
        return int(self._any.shape[2])

    @property
    def batch(self) -> int:
        """Rows."""
        return int(self._any.shape[0])

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values after the written slots; give back all that is now stored.

        `advance` has to follow once every layer has written.
        """
        end = self.length + keys.shape[2]
        self._keys[layer][:, :, self.length : end] = keys
        self._values[layer][:, :, self.length : end] = values
        if not self.length:
            return keys, values  # as they came, so that gradients flow and nothing is read back
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count slots that every layer has written."""
        self.length += tokens

    def grow(self, max_length: int) -> None:
        """Move to larger buffers; nothing happens when there is room already."""
        if max_length <= self.max_length:
            return
        for buffers in (self._keys, self._values):
            for number, old in list(buffers.items()):
                new = old.new_empty((old.shape[0], old.shape[1], max_length, old.shape[3]))
                new[:, :, : self.length] = old[:, :, : self.length]
                buffers[number] = new

    def get_seq_length(self) -> int:
        """Slots written so far, under the reference's name."""
        return self.length

    @property
    def layers(self) -> list[LayerView]:
        """Written part of every layer."""
        return [LayerView(keys, values) for keys, values in self]

    def __len__(self) -> int:
        return len(self._keys) + (0 if self.cross is None or self.cross.apart else len(self.cross.computed))

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        if self.cross is not None and not self.cross.apart and layer in self.cross.computed:
            if layer in self.cross:
                return self.cross[layer]
            nothing = self._any[:, :, :0]
            return nothing, nothing
        if layer not in self._keys:
            raise IndexError(f"layer {layer} is not in the cache; layers are 0 to {len(self) - 1}")
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self)))
