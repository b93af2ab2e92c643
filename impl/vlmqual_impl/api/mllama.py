"""The documented Mllama model with images.

Legend of shapes: B rows, S token positions of this call, N image slots, T tiles, L image tokens of a tile,
K = N * T * L image tokens of a row, D text width, H heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlmqual_impl.api.arguments import cached_positions, one_of
from vlmqual_impl.api.mllama_text import MllamaForCausalLM
from vlmqual_impl.api.mllama_vision import MllamaVisionModel
from vlmqual_impl.api.outputs import CausalLMOutputWithPast
from vlmqual_impl.api.pretrained import PreTrainedModel, default_generation
from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import MllamaConfig
from vlmqual_impl.models import mllama
from vlmqual_impl.models.mllama import Mllama
from vlmqual_impl.runtime.base import Runtime
from vlmqual_impl.runtime.eager_mllama import MllamaRuntime


class MllamaForConditionalGeneration(Mllama, PreTrainedModel):
    """Vision model, projector, text model and head."""

    config_class = MllamaConfig
    may_tie = False
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = mllama.RENAME
    inputs = (
        *PreTrainedModel.inputs,
        "pixel_values",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "cross_attention_mask",
    )
    features = "cross_attention_states"
    config: MllamaConfig
    vision_model: MllamaVisionModel
    language_model: MllamaForCausalLM

    def __init__(self, config: MllamaConfig) -> None:
        """Make a model with random weights.

        Raises:
            TypeError: the configuration is not a `MllamaConfig`.
            ConfigError: its values do not fit together.
        """
        if not isinstance(config, MllamaConfig):
            raise TypeError(f"MllamaForConditionalGeneration takes a MllamaConfig, not a {type(config).__name__}")
        Mllama.__init__(self, config, MllamaVisionModel(config.vision_config), MllamaForCausalLM(config.text_config))
        self.generation_config = default_generation(config)
        nn.init.normal_(self.multi_modal_projector.weight, 0.0, config.text_config.initializer_range)
        nn.init.zeros_(self.multi_modal_projector.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The language model head."""
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another language model head in place."""
        self.language_model.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Not offered; see `MllamaTextModel.resize_token_embeddings`."""
        return self.language_model.resize_token_embeddings(new_num_tokens)

    def _set_attention(self, implementation: str) -> None:
        self.implementation = implementation
        self.vision_model.set_attention(implementation)
        self.language_model.set_attention(implementation)

    def runtime(self) -> Runtime:
        """This model, ready to run."""
        return MllamaRuntime(self)

    def forward(  # MLLAMA-CGEN-001
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
        aspect_ratio_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        num_logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of prompts with images, or of further tokens with a cache, and the loss where labels are given.

        Args:
            input_ids: (B, S) int64.
            pixel_values: (B, N, T, 3, t, t); not needed again once the cache holds the images.
            aspect_ratio_mask: (B, N, T), needed with pixel values (MLLAMA-CGEN-015).
            aspect_ratio_ids: (B, N), needed with pixel values (MLLAMA-CGEN-014).
            attention_mask: (B, cached + S), 0 for padding.
            cross_attention_mask: (B, S or cached + S, N, T), 1 for tiles that a token attends to; without it every
                token attends to every tile (MLLAMA-CGEN-016, MLLAMA-CGEN-017).
            cross_attention_states: projected features, in place of pixel values (MLLAMA-CGEN-009).
            position_ids: as in `MllamaTextModel.forward`.
            past_key_values: as there.
            inputs_embeds: as there.
            labels: as in `MllamaForCausalLM.forward`; image tokens have to be -100 (MLLAMA-CGEN-006).
            use_cache: as there.
            output_attentions: as there; cross-attention layers give (B, H, S, K) (MLLAMA-CGEN-026).
            output_hidden_states: as there (MLLAMA-CGEN-025).
            return_dict: as there.
            cache_position: as there.
            num_logits_to_keep: as there (MLLAMA-CGEN-008).

        Raises:
            ValueError: inputs are missing, contradict each other or have another shape than documented.
            LabelError: a label is neither -100 nor below the vocabulary's size.
        """
        if pixel_values is not None and cross_attention_states is not None:  # MLLAMA-CGEN-010
            raise ValueError("pixel_values and cross_attention_states are both given; one of them is enough")
        states = cross_attention_states
        if pixel_values is not None:
            for name, given in (("aspect_ratio_ids", aspect_ratio_ids), ("aspect_ratio_mask", aspect_ratio_mask)):
                if given is None:
                    raise ValueError(f"{name} is missing; pixel_values need aspect_ratio_ids and aspect_ratio_mask")
            assert aspect_ratio_ids is not None, "just looked at"
            assert aspect_ratio_mask is not None, "just looked at"
            states = mllama.encode_images(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        bias = rows = None
        if cross_attention_mask is not None:
            tokens = one_of(input_ids, inputs_embeds).shape[1]
            caching = self.config.text_config.use_cache if use_cache is None else use_cache
            past = cached_positions(past_key_values, caching)
            mask = _mask_of_new_tokens(cross_attention_mask, past, tokens)
            per_tile = self.config.vision_config.patches_per_tile
            bias, kept = mllama.visible_tokens(mask, per_tile, self.multi_modal_projector.weight)
            rows = kept[:, None]
        output: CausalLMOutputWithPast | tuple[Any, ...] = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cross_attention_states=states,
            cross_attention_mask=bias,
            full_text_row_masked_out_mask=rows,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=self.config.return_dict if return_dict is None else return_dict,
            cache_position=cache_position,
            num_logits_to_keep=num_logits_to_keep,
        )
        return output


def _mask_of_new_tokens(mask: Tensor, past: int, tokens: int) -> Tensor:
    """The rows of a cross-attention mask that belong to the tokens of this call."""
    if mask.ndim != 4 or mask.shape[1] not in (tokens, past + tokens):
        raise ValueError(
            f"cross_attention_mask is {tuple(mask.shape)}; with {past} cached and {tokens} new tokens it has to be "
            f"(batch, {tokens} or {past + tokens}, images, tiles)"
        )
    return mask[:, -tokens:]
