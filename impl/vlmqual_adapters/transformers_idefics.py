"""Idefics, the first, in the installed transformers, from 4.45 on.

Legend of shapes: B rows, S token positions, N image slots of a row, I = B * N images, L features of an image, E width
of the vision tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmqual_adapters.transformers_session import TransformersFeatures, TransformersSession, watched
from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import MARKERS, Inputs, Options, Prompt

_MASK, _INTERPOLATE = "image_attention_mask", "interpolate_pos_encoding"


class IdeficsSession(TransformersSession):
    """Features stay beside the text; the library computes their keys and values anew at every step."""

    def __init__(self, torch: Any, library: Any, model: Any, path: Path, options: Options) -> None:
        super().__init__(torch, library, model, path, options)
        self.features_name = "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"
        self._computed = [0] * len(model.model.gated_cross_attn_layers)
        if options.taps:
            for index, layer in enumerate(model.model.gated_cross_attn_layers):
                layer.cross_attn.k_proj.register_forward_hook(self._counting(index))

    @property
    def text_model(self) -> Any:
        """The decoder, which holds the image side as well."""
        return self.model.model

    def text_points(self) -> dict[str, Any]:
        """See `TransformersSession.text_points`; a gated cross-attention block has the number of the layer after it."""
        interval = self.model.config.cross_layer_interval
        blocks = enumerate(self.text_model.gated_cross_attn_layers)
        return super().text_points() | {f"text.cross_layers.{index * interval}": block for index, block in blocks}

    def new_cache(self) -> Any:
        """An empty cache; from 5.0 on it wants to know the layers."""
        kind = self._library.DynamicCache
        if "config" in inspect.signature(kind.__init__).parameters:
            return kind(config=self.model.config)
        return kind()

    def call_processor(self, processor: Any, prompts: Sequence[Prompt], images: list[list[Any]]) -> Mapping[str, Any]:
        """See `TransformersSession.call_processor`; a prompt is a list of texts and images here."""
        # 4.45 has another name for prompts.
        name = "text" if "text" in inspect.signature(type(processor).__call__).parameters else "prompts"
        listed = [items(prompt, read) for prompt, read in zip(prompts, images, strict=True)]
        made: Mapping[str, Any] = processor(**{name: listed}, padding="longest", return_tensors="pt")
        return made

    def vision(self, inputs: Inputs) -> TransformersFeatures:
        """Run vision tower and resampler, to (B, N, L, E).

        Raises:
            UsageError: the inputs have no pixel values.
        """
        pixels = self.pixels(inputs, ("pixel_values",))["pixel_values"].to(self.model.dtype)
        trunk = self.text_model
        points = self._vision_points() if self.options.taps else {}
        interpolate = bool(inputs[_INTERPOLATE].any()) if _INTERPOLATE in inputs else False
        with self.torch.inference_mode(), watched(points) as seen:
            hidden = trunk.vision_model(pixels.flatten(0, 1), interpolate_pos_encoding=interpolate).last_hidden_state
            if self.model.config.use_resampler:
                hidden = trunk.perceiver_resampler(hidden)
        # What leaves a block of the resampler is its second module's output added to that module's input.
        taps = {name: value for name, value in seen.items() if not name.endswith(".input")}
        taps |= {name: value + seen[f"{name}.input"] for name, value in taps.items() if f"{name}.input" in seen}
        return TransformersFeatures(self.features_name, hidden.view(*pixels.shape[:2], *hidden.shape[1:]), taps)

    def first_call(self, ids: Any, hidden: Any, inputs: Inputs) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """See `TransformersSession.first_call`; later tokens see what the prompt's last position sees.

        Raises:
            UsageError: there is no mask over images, which the library cannot do without.
        """
        if _MASK not in inputs:
            raise UsageError(f"prefill needs {_MASK}; the inputs are {', '.join(inputs)}")
        self._computed = [0] * len(self._computed)
        mask = self.tensor(inputs[_MASK])
        images = {} if hidden is None else {self.features_name: hidden}
        return {"input_ids": ids, **images, _MASK: mask}, {**images, _MASK: mask[:, -1:]}

    def next_call(self, later: Mapping[str, Any]) -> dict[str, Any]:
        """The features once more, and the mask's row of the new token."""
        return dict(later)

    def count_taps(self) -> dict[str, Any]:
        """How often each cross-attention block computed keys of images since the prefill began."""
        return {"counters.cross_attention_kv": self.torch.tensor(self._computed)}

    def _vision_points(self) -> dict[str, Any]:
        """Modules whose outputs are (I, L, E)."""
        tower = self.text_model.vision_model
        points: dict[str, Any] = {"vision.embeddings": tower.pre_layrnorm}
        points |= {f"vision.layers.{index}": layer for index, layer in enumerate(tower.encoder.layers)}
        if self.model.config.use_resampler:
            for index, (_, feed) in enumerate(self.text_model.perceiver_resampler.blocks):
                points |= {f"resampler.blocks.{index}": feed, f"resampler.blocks.{index}.input": _Entry(feed)}
        return points

    def _counting(self, index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._computed[index] += 1

        return hook


class _Entry:
    """What enters a module, watched as if it were an output."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def register_forward_hook(self, hook: Any) -> Any:
        """Call `hook` with the module's first argument in the place of its output."""
        return self._module.register_forward_hook(lambda module, args, output: hook(module, args, args[0]))


def items(prompt: Prompt, images: Sequence[Any]) -> list[Any]:
    """The documented list of texts and images: an image for each marker, and no empty text.

    Raises:
        UsageError: there are more or fewer images than markers.
    """
    marker = MARKERS["idefics"]
    texts = prompt.text.split(marker)
    if len(images) != len(texts) - 1:
        raise UsageError(f"the prompt has {len(texts) - 1} markers {marker} and {len(images)} images: {prompt.text!r}")
    listed: list[Any] = [texts[0]]
    for image, text in zip(images, texts[1:], strict=True):
        listed += [image, text]
    return [item for item in listed if not (isinstance(item, str) and item == "")]
