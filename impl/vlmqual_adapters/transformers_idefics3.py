"""Idefics3 in the installed transformers, from 4.46 on."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from vlmqual_adapters.transformers_session import TransformersFeatures, TransformersSession, watched
from vlmqual_contract.target import Inputs


class Idefics3Session(TransformersSession):
    """Features are merged into the embeddings by the library."""

    features_name = "image_hidden_states"

    @property
    def text_model(self) -> Any:
        """The Llama decoder."""
        return self.model.model.text_model

    def vision(self, inputs: Inputs) -> TransformersFeatures:
        """Run the library's image path up to the connector's output.

        Raises:
            UsageError: the inputs have no pixel values.
        """
        pixels = self.pixels(inputs, ("pixel_values", "pixel_attention_mask"))
        base = self.model.model
        points = _vision_points(base) if self.options.taps else {}
        with self.torch.inference_mode(), watched(points) as taps:
            if hasattr(base, "get_image_features"):
                with watched({"connector": base.connector}) as out:
                    base.get_image_features(**pixels)
                hidden = out["connector"]
            else:
                hidden = self._until_connector(pixels)
        return TransformersFeatures(self.features_name, hidden, taps)

    def _until_connector(self, pixels: Mapping[str, Any]) -> Any:
        """Let the model's own forward begin, and leave it when the connector has answered.

        Versions without `get_image_features` have the whole image path inside `forward`.
        """

        def leave(module: Any, args: Any, output: Any) -> None:
            raise _Reached(output)

        base = self.model.model
        handle = base.connector.register_forward_hook(leave)
        try:
            base(input_ids=self.tensor(np.zeros((1, 1), np.int64)), **pixels)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError("the model's forward ended without calling its connector")

    def first_call(self, ids: Any, hidden: Any, inputs: Inputs) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """See `TransformersSession.first_call`."""
        return self._with_features(ids, hidden), {}

    def next_call(self, later: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: the features are in the cache."""
        return {}

    def _with_features(self, ids: Any, hidden: Any) -> dict[str, Any]:
        """The arguments that let the installed version merge `hidden` (F, L, D) into the embeddings of `ids`."""
        if hidden is None:
            return {"input_ids": ids}
        if "image_hidden_states" in self.forward_parameters:
            return {"input_ids": ids, "image_hidden_states": hidden}
        if "mm_encoder_outputs" in self.forward_parameters:
            output = import_module("transformers.modeling_outputs").BaseModelOutputWithPooling
            return {"input_ids": ids, "mm_encoder_outputs": {"image": output(pooler_output=hidden.flatten(0, 1))}}
        base = self.model.model
        embedded = base.get_input_embeddings()(ids)
        return {"inputs_embeds": base.inputs_merger(input_ids=ids, inputs_embeds=embedded, image_hidden_states=hidden)}


class _Reached(Exception):  # not an error: the way out of a forward that has done enough
    def __init__(self, output: Any) -> None:
        super().__init__("the connector has answered")
        self.output = output


def _vision_points(base: Any) -> dict[str, Any]:
    tower = base.vision_model
    return {
        "vision.embeddings": tower.embeddings,
        **{f"vision.layers.{index}": layer for index, layer in enumerate(tower.encoder.layers)},
        "vision.post_layernorm": tower.post_layernorm,
        "connector": base.connector,
    }
