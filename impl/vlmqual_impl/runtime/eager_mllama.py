"""Mllama as torch executes it operation by operation.

Legend of shapes: B rows, S token positions, N image slots of a row, T tiles of an image, L image tokens of a tile,
K = N * T * L image tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.models import mllama
from vlmqual_impl.models.mllama import Images, Mllama, MllamaLanguage
from vlmqual_impl.runtime.eager import EagerRuntime, Later

MASK = "cross_attention_mask"
COUNTER = "counters.cross_attention_kv"


class MllamaTextRuntime(EagerRuntime):
    """The text model alone, for text without images."""

    merges = False

    def __init__(self, language: MllamaLanguage, implementation: str) -> None:
        self.language = language
        self.implementation = implementation

    @property
    def table(self) -> nn.Embedding:
        """The token embedding."""
        return self.language.model.embed_tokens

    @property
    def lm_head(self) -> nn.Linear:
        """The language model head."""
        return self.language.lm_head

    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError("this model has no vision model; images need MllamaForConditionalGeneration")

    def place(self, x: Tensor, ids: Tensor | None, features: Tensor) -> Tensor:
        """Not done in this family: the image token keeps its own embedding."""
        return x

    def new_cache(self, rows: int, max_length: int) -> KeyValueCache:
        """An empty cache."""
        return mllama.new_cache(self.language.model, rows, max_length)

    def images(self, x: Tensor, features: Tensor | None, mask: Tensor | None) -> Images:
        """What the cross-attention layers see of a prompt's images: nothing.

        Raises:
            ValueError: there are images.
        """
        if features is not None or mask is not None:
            raise ValueError("this model has no vision model; images need MllamaForConditionalGeneration")
        return Images()

    def later_images(self, x: Tensor, later: Later) -> Images:
        """What they see of them for a later token."""
        return Images()

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
        """See `EagerRuntime.start`; later tokens see what the prompt's last position sees (MLLAMA-DEC-004)."""
        mask = inputs.get(MASK)
        hidden = self._run(x, positions, seen, cache, self.images(x, features, mask), taps)
        return hidden, {} if mask is None else {MASK: mask[:, -1:]}

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: KeyValueCache,
        later: Later,
        taps: dict[str, Tensor] | None,
    ) -> Tensor:
        """See `EagerRuntime.step`; keys and values of images come from the cache."""
        x = self.table(tokens)
        seen = None if seen is None else seen[:, : cache.length + 1]
        return self._run(x, positions, seen, cache, self.later_images(x, later), taps)

    def _run(
        self,
        x: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        cache: KeyValueCache,
        images: Images,
        taps: dict[str, Tensor] | None,
    ) -> Tensor:
        text = self.language.model
        hidden = mllama.run(text, x, positions, seen, cache, images, implementation=self.implementation, taps=taps)
        if taps is not None and cache.cross:  # MLLAMA-DEC-005
            taps[COUNTER] = torch.tensor(list(cache.cross.computed.values()), dtype=torch.float32)
        return hidden


class MllamaRuntime(MllamaTextRuntime):
    """The whole model: features stay beside the text and are read by cross-attention layers."""

    def __init__(self, model: Mllama) -> None:
        super().__init__(model.language_model, model.implementation)
        self.model = model

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Image features (B, K, D) of `pixel_values`, `aspect_ratio_ids` and `aspect_ratio_mask`.

        Raises:
            ValueError: one of the three is missing, or a shape is not the documented one.
        """
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        missing = [name for name in names if name not in inputs]
        if missing:  # MLLAMA-CGEN-014, MLLAMA-CGEN-015
            raise ValueError(f"{' and '.join(missing)} is missing; vision needs {', '.join(names)}")
        pixels, ids, mask = (inputs[name] for name in names)
        return mllama.encode_images(self.model, pixels, ids, mask, taps)

    def images(self, x: Tensor, features: Tensor | None, mask: Tensor | None) -> Images:
        """What the cross-attention layers see of a prompt's images."""
        if features is not None:
            features = mllama.row_features(features, x.shape[0]).to(x)
        return mllama.images_for(self.model.config, features, mask, x)

    def later_images(self, x: Tensor, later: Later) -> Images:
        """What they see of them for a later token; keys and values are cached."""
        if MASK not in later:
            return Images()
        per_tile = self.model.config.vision_config.patches_per_tile
        bias, some = mllama.visible_tokens(later[MASK], per_tile, x)
        return Images(bias=bias, rows=some)
