"""Idefics3 as torch executes it operation by operation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.models import idefics3
from vlmqual_impl.models.idefics3 import Idefics3
from vlmqual_impl.runtime.eager import EagerRuntime, Later


class Idefics3Runtime(EagerRuntime):
    """Features take the place of image tokens' embeddings."""

    merges = True

    def __init__(self, model: Idefics3) -> None:
        self.model = model

    @property
    def table(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.model.text_model.embed_tokens

    @property
    def lm_head(self) -> nn.Linear:
        """The language model head."""
        return self.model.lm_head

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Image features (F, L, D) of `pixel_values` and, where given, `pixel_attention_mask`."""
        trunk = self.model.model
        return idefics3.encode_images(trunk, inputs["pixel_values"], inputs.get("pixel_attention_mask"), taps)

    def place(self, x: Tensor, ids: Tensor | None, features: Tensor) -> Tensor:
        """Features in the places of image tokens; without ids those that have the image token's embedding."""
        marker = self.model.config.image_token_id
        places = (x == self.table.weight[marker]).all(-1) if ids is None else ids == marker
        return idefics3.merge(x, places, features)

    def new_cache(self, rows: int, max_length: int) -> KeyValueCache:
        """An empty cache."""
        return idefics3.new_cache(self.model.model, rows, max_length)

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
        """See `EagerRuntime.start`; later tokens need nothing of the prompt's inputs."""
        return idefics3.prefill(self.model.model, x, positions, seen, cache, taps=taps), {}

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: KeyValueCache,
        later: Later,
        taps: dict[str, Tensor] | None,
    ) -> Tensor:
        """See `EagerRuntime.step`."""
        return idefics3.decode(self.model.model, tokens, positions, seen, cache, taps=taps)
