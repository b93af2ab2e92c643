"""Fixed-size cache of self-attention keys and values.

A sequence occupies slots in the order in which its tokens came, padding included; which slots count is the caller's
mask. Slots that were never written are never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerView:
    """Written part of one layer: keys and values (B, kv heads, length, head_dim)."""

    keys: Tensor
    values: Tensor


class KeyValueCache:
    """Keys and values of every layer.

    Indexing gives one layer's (keys, values), each (B, kv heads, length, head_dim): two tensors per layer, with as many
    heads as `num_key_value_heads` (IDEFICS3-MODEL-009, IDEFICS3-MODEL-010).

    Attributes:
        length: slots written so far.
        max_length: slots that there are.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, heads, max_length, head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.length = 0

    @property
    def max_length(self) -> int:
        """Slots that there are."""
        return int(self._keys[0].shape[2])

    @property
    def batch(self) -> int:
        """Rows."""
        return int(self._keys[0].shape[0])

    def require(self, tokens: int) -> None:
        """Refuse more tokens than there are free slots.

        Raises:
            ValueError: says how many slots there are, are written and would be needed.
        """
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"the cache has {self.max_length} positions, {self.length} are taken and {tokens} more do not fit"
            )

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
            for index, old in enumerate(buffers):
                new = old.new_empty((old.shape[0], old.shape[1], max_length, old.shape[3]))
                new[:, :, : self.length] = old[:, :, : self.length]
                buffers[index] = new

    def get_seq_length(self) -> int:
        """Slots written so far, under the reference's name."""
        return self.length

    @property
    def layers(self) -> list[LayerView]:
        """Written part of every layer."""
        return [LayerView(keys, values) for keys, values in self]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self)))
