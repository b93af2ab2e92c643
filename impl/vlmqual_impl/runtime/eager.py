"""Idefics3 as torch executes it operation by operation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmqual_impl.models import idefics3
from vlmqual_impl.models.idefics3 import Idefics3
from vlmqual_impl.runtime.base import Sequences, default_positions, last_real


class EagerRuntime:
    """Prefill, decode and vision over a loaded model, without gradients."""

    def __init__(self, model: Idefics3) -> None:
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where tensors are wanted."""
        return self.model.lm_head.weight.device

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Image features (F, L, D) of `pixel_values` and, where given, `pixel_attention_mask`."""
        return idefics3.encode_images(
            self.model.model, inputs["pixel_values"], inputs.get("pixel_attention_mask"), taps
        )

    @torch.no_grad()
    def embed(self, inputs: Mapping[str, Tensor], features: Tensor | None) -> Tensor:
        """Token embeddings (B, S, D) with image features in their places.

        Raises:
            ValueError: an id is outside the vocabulary, or image tokens and features do not match in number.
        """
        config = self.model.config
        ids = inputs.get("input_ids")
        if ids is not None:
            ids = ids.to(self.device)
            check_ids(ids, config.text_config.vocab_size)
        embeddings = inputs.get("inputs_embeds")
        table = self.model.model.text_model.embed_tokens
        x: Tensor = table(ids) if embeddings is None else embeddings.to(device=self.device, dtype=self.dtype)
        if features is None:
            return x
        marker = config.image_token_id
        places = (x == table.weight[marker]).all(-1) if ids is None else ids == marker
        return idefics3.merge(x, places, features)

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
                through vision when no features are given.
            features: image features (F, L, D).
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
        cache = idefics3.new_cache(self.model.model, rows, max_length)
        seen = None if valid is None else valid[:, :tokens]
        hidden = idefics3.prefill(self.model.model, x, positions, seen, cache, taps=kept)
        each = torch.arange(rows, device=self.device)
        return Sequences(
            hidden=hidden,
            logits=self.head(hidden[each, last]),
            positions=positions[each, last] + 1,
            valid=valid,
            cache=cache,
            taps=kept or {},
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
        cache, valid = sequences.cache, sequences.valid
        hidden = idefics3.decode(
            self.model.model,
            tokens.to(self.device)[:, None],
            sequences.positions[:, None],
            valid,
            cache,
            taps=kept,
        )
        return Sequences(
            hidden=hidden,
            logits=self.head(hidden[:, -1]),
            positions=sequences.positions + 1,
            valid=valid,
            cache=cache,
            taps=kept or {},
        )

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def synchronize(self) -> None:
        """Return when the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that the embedding table does not have.

    Raises:
        ValueError: names the id and the vocabulary.
    """
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"input_ids is {tuple(ids.shape)}; it has to be (batch, tokens) and not empty")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"input_ids holds {low if low < 0 else high}; the vocabulary is 0 to {vocabulary - 1}")
