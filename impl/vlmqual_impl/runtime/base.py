"""What generation and the target need of a way to execute a model.

Legend of shapes: B rows, S token positions, F real frames, L image tokens of a frame, K image tokens of a row, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from vlmqual_impl.cache import Slots


class Sequences:
    """Sequences after a prefill or a decode step. They can be continued once.

    Attributes:
        hidden: (B, S, D) states after the final norm, of the tokens of this step.
        logits: (B, V) of every row's last real position.
        positions: (B,) int64, every row's next position.
        valid: (B, max_length) bool over cache slots, False for padding; None when there is no padding.
        cache: keys and values.
        taps: hidden states by component; empty when not asked for.
        later: what tokens to come need of the prompt's inputs, by name; empty in families where that is nothing.
    """

    def __init__(
        self,
        *,
        hidden: Tensor,
        logits: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        cache: Slots,
        taps: Mapping[str, Tensor],
        later: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.hidden = hidden
        self.logits = logits
        self.positions = positions
        self.valid = valid
        self.cache = cache
        self.taps = taps
        self.later = later or {}
        self._continued = False

    def take(self) -> None:
        """Claim the cache for the next step.

        Raises:
            ValueError: another step has continued these sequences already.
        """
        if self._continued:
            raise ValueError("this step has been decoded already; a step can be continued once")
        self._continued = True


class Runtime(Protocol):
    """A loaded model, ready to run."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tensors are wanted."""
        ...

    @property
    def merges(self) -> bool:
        """True when image features become part of the embeddings; False when they stay beside them."""
        ...

    @property
    def vocabulary(self) -> int:
        """Ids that can be chosen."""
        ...

    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Image features of `pixel_values` and what belongs to them: Idefics3 (F, L, D), Mllama (B, K, D), Idefics
        (B, N, L, E).
        """
        ...

    def embed(self, inputs: Mapping[str, Tensor], features: Tensor | None) -> Tensor:
        """Token embeddings (B, S, D), with image features in their places where the family merges them."""
        ...

    def prefill(
        self,
        inputs: Mapping[str, Tensor],
        features: Tensor | None = None,
        *,
        max_length: int,
        taps: bool = False,
    ) -> Sequences:
        """Start sequences from `input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`, ..."""
        ...

    def decode(self, sequences: Sequences, tokens: Tensor, *, taps: bool = False) -> Sequences:
        """One token (B,) further."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        ...

    def synchronize(self) -> None:
        """Return when the device has done everything."""
        ...


def default_positions(attention_mask: Tensor) -> Tensor:
    """Every row counts its own real tokens from 0; padding gets the position of the token before it, at least 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_real(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of every row, (B,) int64.

    Raises:
        ValueError: a row has none.
    """
    real = attention_mask != 0
    empty = (~real.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row {empty[0]} of attention_mask has no real token")
    return real.shape[1] - 1 - real.flip(1).to(torch.int64).argmax(1)
