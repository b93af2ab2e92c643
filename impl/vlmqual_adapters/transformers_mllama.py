"""Mllama in the installed transformers, from 4.45 on.

Legend of shapes: B rows, S token positions, N image slots, T tiles, I = B * N images, L positions of a tile, M = L
padded to a multiple of 8, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmqual_adapters.transformers_session import TransformersFeatures, TransformersSession, watched
from vlmqual_contract.target import Inputs, Options

_MASK = "cross_attention_mask"


class MllamaSession(TransformersSession):
    """Features stay beside the text; the library caches their keys and values."""

    features_name = "cross_attention_states"

    def __init__(self, torch: Any, library: Any, model: Any, path: Path, options: Options) -> None:
        super().__init__(torch, library, model, path, options)
        # Before 5.0 the parts stand in the model itself, afterwards in a trunk of it.
        self._trunk = model if hasattr(model, "vision_model") else model.model
        self._computed: dict[int, int] = {}
        if options.taps:
            for index, layer in enumerate(self.text_model.layers):
                if hasattr(layer, "cross_attn"):
                    layer.cross_attn.k_proj.register_forward_hook(self._counting(index))

    @property
    def text_model(self) -> Any:
        """The decoder."""
        language = self._trunk.language_model
        return language.model if hasattr(language, "model") else language

    def new_cache(self) -> Any:
        """An empty cache; from 5.0 on it wants to know the layers."""
        kind = self._library.DynamicCache
        if "config" in inspect.signature(kind.__init__).parameters:
            return kind(config=self.text_model.config)
        return kind()

    def vision(self, inputs: Inputs) -> TransformersFeatures:
        """Run vision model and projector, to (B, N * T * L, D).

        Raises:
            UsageError: the inputs have no pixel values.
        """
        pixels = self.pixels(inputs, ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
        model, projector = self._trunk.vision_model, self._trunk.multi_modal_projector
        pixels["pixel_values"] = pixels["pixel_values"].to(self.model.dtype)
        points = _vision_points(model) if self.options.taps else {}
        with self.torch.inference_mode(), watched(points) as seen:
            states = model(**pixels)[0]
            hidden = projector(states).flatten(1, 3)
        taps: dict[str, Any] = {}
        if self.options.taps:
            rows, slots, tiles, positions, _ = states.shape
            for name, value in seen.items():
                taps[name] = value.reshape(rows * slots, tiles, -1, value.shape[-1])[:, :, :positions]
            between = states[..., model.config.hidden_size :]
            taps["vision.intermediate_states"] = between.reshape(rows * slots, tiles, positions, -1)
            taps["connector"] = hidden
        return TransformersFeatures(self.features_name, hidden, taps)

    def first_call(self, ids: Any, hidden: Any, inputs: Inputs) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """See `TransformersSession.first_call`; later tokens see what the prompt's last position sees."""
        self._computed.clear()
        call = {"input_ids": ids}
        if hidden is not None:
            call["cross_attention_states"] = hidden
        if _MASK not in inputs:
            return call, {}
        mask = self.tensor(inputs[_MASK])
        return {**call, _MASK: mask}, {_MASK: mask[:, -1:]}

    def next_call(self, later: Mapping[str, Any]) -> dict[str, Any]:
        """The mask's row of the new token."""
        return dict(later)

    def count_taps(self) -> dict[str, Any]:
        """How often each cross-attention layer computed keys of images since the prefill began."""
        if not self._computed:
            return {}
        crossing = [index for index, layer in enumerate(self.text_model.layers) if hasattr(layer, "cross_attn")]
        counts = [self._computed.get(index, 0) for index in crossing]
        return {"counters.cross_attention_kv": self.torch.tensor(counts)}

    def _counting(self, index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._computed[index] = self._computed.get(index, 0) + 1

        return hook


def _vision_points(model: Any) -> Mapping[str, Any]:
    """Modules whose outputs are (I * T, L, width), (I, T, L, width) or (I, T * M, width)."""
    return {
        "vision.embeddings": model.layernorm_pre,
        **{f"vision.layers.{index}": layer for index, layer in enumerate(model.transformer.layers)},
        "vision.layernorm_post": model.layernorm_post,
        **{f"vision.global_layers.{index}": layer for index, layer in enumerate(model.global_transformer.layers)},
    }
