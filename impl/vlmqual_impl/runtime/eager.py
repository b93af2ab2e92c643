"""Models as torch executes them operation by operation: what all families share of prefill and decode.

The families' own parts are in `eager_idefics`, `eager_idefics3` and `eager_mllama`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.runtime.base import Sequences, default_positions, last_real

Later = Mapping[str, Tensor]


class EagerRuntime(ABC):
    """Prefill, decode and vision over a loaded model, without gradients.

    Attributes:
        merges: see `Runtime.merges`.
    """

    merges: ClassVar[bool]

    # ----------------------------------------------------------------------------------------------- of the family

    @property
    @abstractmethod
    def table(self) -> nn.Embedding:
        """The token embedding."""

    @property
    @abstractmethod
    def lm_head(self) -> nn.Linear:
        """The language model head."""

    @abstractmethod
    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Image features; see `Runtime.encode`."""

    @abstractmethod
    def place(self, x: Tensor, ids: Tensor | None, features: Tensor) -> Tensor:
        """Put image features into embeddings (B, S, D), where the family does that."""

    @abstractmethod
    def new_cache(self, rows: int, max_length: int) -> KeyValueCache:
        """An empty cache."""

    @abstractmethod
    def start(
        self,
        x: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: KeyValueCache,
        inputs: Mapping[str, Tensor],
        features: Tensor | None,
        taps: dict[str, Tensor] | None,
    ) -> tuple[Tensor, Later]:
        """A prompt's embeddings to states after the final norm (B, S, D), and what later tokens need."""

    @abstractmethod
    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: KeyValueCache,
        later: Later,
        taps: dict[str, Tensor] | None,
    ) -> Tensor:
        """One token (B, 1) for every row to states after the final norm (B, 1, D)."""

    # ------------------------------------------------------------------------------------------------ of all families

    @property
    def vocabulary(self) -> int:
        """Ids that can be chosen."""
        return self.lm_head.out_features

    @property
    def ids(self) -> int:
        """Ids that can be read."""
        return self.table.num_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where tensors are wanted."""
        return self.lm_head.weight.device

    @torch.no_grad()
    def embed(self, inputs: Mapping[str, Tensor], features: Tensor | None) -> Tensor:
        """Token embeddings (B, S, D), with image features in their places where the family merges them.

        Raises:
            ValueError: an id is outside the embedding, or image tokens and features do not match in number.
        """
        ids = inputs.get("input_ids")
        if ids is not None:
            ids = ids.to(self.device)
            check_ids(ids, self.ids)
        embeddings = inputs.get("inputs_embeds")
        if embeddings is not None:
            x = embeddings.to(device=self.device, dtype=self.dtype)
        elif ids is not None:
            x = self.table(ids)
        else:
            raise ValueError("neither input_ids nor inputs_embeds is given; one of them is needed")
        return self.place(x, ids, features) if features is not None and self.merges else x

    @torch.no_grad()
    def prefill(
        self,
        inputs: Mapping[str, Tensor],
        features: Tensor | None = None,
        *,
        max_length: int,
        taps: bool = False,
    ) -> Sequences:
        """Start sequences; rows may be padded on either side, told by `attention_mask`.

        Args:
            inputs: `input_ids` (B, S) or `inputs_embeds` (B, S, D); optionally `attention_mask` (B, S) and
                `position_ids` (B, S), which default to all real and to every row's own count; `pixel_values` runs
                through vision when no features are given; Mllama: `cross_attention_mask` (B, S, N, T);
                Idefics: `image_attention_mask` (B, S, N).
            features: image features, Idefics3 (F, L, D), Mllama (B, K, D), Idefics (B, N, L, E of the tower).
            max_length: cache slots.
            taps: keep hidden states by component.

        Raises:
            ValueError: shapes do not fit each other or the cache.
        """
        kept: dict[str, Tensor] | None = {} if taps else None
        if features is None and "pixel_values" in inputs:
            features = self.encode(inputs, kept)
        x = self.embed(inputs, features)
        rows, tokens = x.shape[:2]
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones((rows, tokens), dtype=torch.int64)
        mask = mask.to(self.device)
        positions = inputs.get("position_ids")
        for name, given in (("attention_mask", mask), ("position_ids", positions)):
            if given is not None and tuple(given.shape) != (rows, tokens):
                raise ValueError(f"{name} is {tuple(given.shape)}; it has to be (batch, tokens), here {(rows, tokens)}")
        positions = default_positions(mask) if positions is None else positions.to(self.device)
        last = last_real(mask)
        valid = None
        if not bool((mask != 0).all()):
            valid = torch.ones((rows, max(max_length, tokens)), dtype=torch.bool, device=self.device)
            valid[:, :tokens] = mask != 0
        cache = self.new_cache(rows, max_length)
        seen = None if valid is None else valid[:, :tokens]
        hidden, later = self.start(x, positions, seen, cache, inputs, features, kept)
        each = torch.arange(rows, device=self.device)
        return Sequences(
            hidden=hidden,
            logits=self.head(hidden[each, last]),
            positions=positions[each, last] + 1,
            valid=valid,
            cache=cache,
            taps=kept or {},
            later=later,
        )

    @torch.no_grad()
    def decode(self, sequences: Sequences, tokens: Tensor, *, taps: bool = False) -> Sequences:
        """One token (B,) further for every row.

        Raises:
            ValueError: the number of tokens is not the number of rows, the cache is full, or the step was continued.
        """
        rows = sequences.cache.batch
        if tuple(tokens.shape) != (rows,):
            raise ValueError(f"tokens are {tuple(tokens.shape)}; one for each of the {rows} rows is needed")
        sequences.take()
        sequences.cache.require(1)
        kept: dict[str, Tensor] | None = {} if taps else None
        cache, valid, later = sequences.cache, sequences.valid, sequences.later
        if not isinstance(cache, KeyValueCache):
            raise TypeError(f"these sequences belong to another runtime; their cache is a {type(cache).__name__}")
        hidden = self.step(tokens.to(self.device)[:, None], sequences.positions[:, None], valid, cache, later, kept)
        return Sequences(
            hidden=hidden,
            logits=self.head(hidden[:, -1]),
            positions=sequences.positions + 1,
            valid=valid,
            cache=cache,
            taps=kept or {},
            later=later,
        )

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def synchronize(self) -> None:
        """Return when the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def check_ids(ids: Tensor, rows: int) -> None:
    """Refuse ids that the embedding table does not have.

    Raises:
        ValueError: names the id and the ids that there are.
    """
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"input_ids is {tuple(ids.shape)}; it has to be (batch, tokens) and not empty")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise ValueError(f"input_ids holds {low if low < 0 else high}; the vocabulary is 0 to {rows - 1}")
