"""Idefics as torch executes it operation by operation.

Legend of shapes: B rows, S token positions, N image slots of a row, L features of an image, E width of the vision
tower, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.models import idefics
from vlmqual_impl.models.idefics import Idefics, Images
from vlmqual_impl.runtime.eager import EagerRuntime, Later

MASK = "image_attention_mask"
INTERPOLATE = "interpolate_pos_encoding"
COUNTER = "counters.cross_attention_kv"


class IdeficsRuntime(EagerRuntime):
    """The whole model: features stay beside the text and are read by gated cross-attention blocks."""

    merges = False

    def __init__(self, model: Idefics) -> None:
        self.model = model
        self.trunk = model.model

    @property
    def table(self) -> nn.Embedding:
        """The token embedding."""
        return self.trunk.embed_tokens

    @property
    def lm_head(self) -> nn.Linear:
        """The language model head."""
        return self.model.lm_head

    @property
    def vocabulary(self) -> int:
        """Ids that can be chosen: of both heads."""
        return self.model.config.vocabulary

    @property
    def ids(self) -> int:
        """Ids that can be read: of both tables."""
        return self.model.config.vocabulary

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Image features (B, N, L, E) of `pixel_values`; `interpolate_pos_encoding` of 1 allows other sizes.

        Raises:
            ValueError: a shape is not the documented one.
        """
        interpolate = inputs.get(INTERPOLATE)
        return idefics.encode_images(
            self.trunk,
            inputs["pixel_values"].to(self.device),
            interpolate=interpolate is not None and bool(interpolate.any()),
            taps=taps,
        )

    def place(self, x: Tensor, ids: Tensor | None, features: Tensor) -> Tensor:
        """Not done in this family: the image token keeps its own embedding."""
        return x

    def new_cache(self, rows: int, max_length: int) -> KeyValueCache:
        """An empty cache."""
        return idefics.new_cache(self.trunk, rows, max_length)

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
        """See `EagerRuntime.start`; later tokens see what the prompt's last position sees (IDEFICS-DEC-002).

        Raises:
            ValueError: there are no image features: this family has no text without an image slot (IDEFICS-MODEL-018).
        """
        if features is None:
            raise ValueError(
                "Idefics needs exactly one of pixel_values, image_encoder_embeddings and perceiver_embeddings; "
                "a text without images has one slot of zeros that none of its tokens sees"
            )
        images = idefics.images_for(self.trunk, features.to(x), inputs.get(MASK), x)
        hidden = self._run(x, positions, seen, cache, images, taps)
        return hidden, {"image_bias": images.bias[:, :, -1:], "image_seeing": images.seeing[:, -1:]}

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: KeyValueCache,
        later: Later,
        taps: dict[str, Tensor] | None,
    ) -> Tensor:
        """See `EagerRuntime.step`; keys and values of images come from the cache (IDEFICS-DEC-003)."""
        seen = None if seen is None else seen[:, : cache.length + 1]
        images = Images(None, later["image_bias"], later["image_seeing"])
        return self._run(self.table(tokens), positions, seen, cache, images, taps)

    def _run(
        self,
        x: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: KeyValueCache,
        images: Images,
        taps: dict[str, Tensor] | None,
    ) -> Tensor:
        hidden = idefics.run(self.trunk, x, positions, seen, cache, images, taps=taps)
        if taps is not None and cache.cross:
            taps[COUNTER] = torch.tensor(list(cache.cross.computed.values()), dtype=torch.float32)
        return hidden
