"""The documented vision model of Mllama.

Legend of shapes: B rows, N image slots of a row, T tiles, I = B * N images, L positions of a tile, M = L padded to a
multiple of 8, D width, H heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlmqual_impl.api.outputs import BaseModelOutput
from vlmqual_impl.api.pretrained import PreTrainedModel
from vlmqual_impl.configs import MllamaVisionConfig, PretrainedConfig
from vlmqual_impl.models.mllama_vision import MllamaVision, VisionRecord, check_pixels


class MllamaVisionModel(MllamaVision, PreTrainedModel):
    """Local and global encoder over the tiles of images (MLLAMA-VIS-002)."""

    config_class = MllamaVisionConfig
    main_input_name = "pixel_values"
    may_tie = False
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = (  # MLLAMA-VIS-012
        (r"^(model\.)?(language_model|multi_modal_projector)\.", None),
        (r"^lm_head\.", None),
        (r"^(model\.)?vision_model\.", ""),
    )
    config: MllamaVisionConfig

    def __init__(self, config: MllamaVisionConfig) -> None:
        """Make a model with random weights.

        Raises:
            TypeError: the configuration is not a `MllamaVisionConfig`.
            ConfigError: its values do not fit together.
        """
        if not isinstance(config, MllamaVisionConfig):
            raise TypeError(f"MllamaVisionModel takes a MllamaVisionConfig, not a {type(config).__name__}")
        MllamaVision.__init__(self, config)
        self.config = config
        self.implementation = "sdpa"
        self.init_weights()

    def get_input_embeddings(self) -> nn.Module:  # type: ignore[override]  # pixels are embedded by a convolution
        """The patch embedding."""
        return self.patch_embedding

    def _set_attention(self, implementation: str) -> None:
        self.implementation = implementation

    def _set_config(self, config: PretrainedConfig) -> None:
        if isinstance(config, MllamaVisionConfig):
            self.config = config

    def forward(  # MLLAMA-VIS-001
        self,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor,
        aspect_ratio_mask: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Features of tiles.

        Args:
            pixel_values: (B, N, T, 3, t, t).
            aspect_ratio_ids: (B, N) int64; 0 for padding images (MLLAMA-VIS-006, MLLAMA-VIS-007).
            aspect_ratio_mask: (B, N, T), 0 for tiles that are not there (MLLAMA-VIS-008).
            output_attentions: return (I, H, T * M, T * M) weights of every layer (MLLAMA-VIS-013).
            output_hidden_states: return (I, T * M, D) states, what enters each layer of an encoder and what leaves its
                last, the local encoder first (MLLAMA-VIS-009).
            return_dict: False for a plain tuple (MLLAMA-VIS-010).

        Returns:
            last_hidden_state (B, N, T, L, vision_output_dim) (MLLAMA-VIS-003).

        Raises:
            ValueError: a shape is not the documented one, or an aspect ratio id is unknown.
        """
        config = self.config
        check_pixels(config, pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        record = VisionRecord([] if wants_states else None, [] if wants_attentions else None)
        weight = self.patch_embedding.weight
        features = self.encode(
            pixel_values.to(weight),
            aspect_ratio_ids.to(weight.device),
            aspect_ratio_mask.to(weight.device),
            implementation=self.implementation,
            record=record,
        )
        output = BaseModelOutput(
            last_hidden_state=features,
            hidden_states=None if record.states is None else tuple(record.states),
            attentions=None if record.attentions is None else tuple(record.attentions),
        )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()
