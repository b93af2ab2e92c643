"""The documented Idefics3 model classes.

Legend of shapes: B rows, S token positions of this call, N image slots, F real frames, L image tokens of a frame,
D text width, H heads, K cached and new positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmqual_impl.api.arguments import SPARE_SLOTS, cached_positions, real_slots, rotary_positions, with_room
from vlmqual_impl.api.outputs import ModelOutput, next_token_loss
from vlmqual_impl.api.pretrained import PreTrainedModel, default_generation
from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import Idefics3Config, PretrainedConfig
from vlmqual_impl.layers import at_least_float32
from vlmqual_impl.models import idefics3
from vlmqual_impl.models.idefics3 import Idefics3, Idefics3Trunk
from vlmqual_impl.runtime.base import Runtime
from vlmqual_impl.runtime.eager import check_ids
from vlmqual_impl.runtime.eager_idefics3 import Idefics3Runtime


@dataclass
class Idefics3BaseModelOutputWithPast(ModelOutput):
    """Result of the model without head.

    Attributes:
        last_hidden_state: (B, S, D).
        past_key_values: the cache (IDEFICS3-MODEL-008).
        hidden_states: one (B, S, D) for the embeddings and one for each layer, the last after the final norm.
        attentions: one (B, H, S, K) for each layer.
        image_hidden_states: (F, L, D) (IDEFICS3-MODEL-021).
    """

    last_hidden_state: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class Idefics3CausalLMOutputWithPast(ModelOutput):
    """Result of the model with head.

    Attributes:
        loss: scalar (IDEFICS3-LM-008), only with labels.
        logits: (B, S, V).
        past_key_values: the cache (IDEFICS3-LM-011).
        hidden_states: as in the model without head.
        attentions: as in the model without head.
        image_hidden_states: one tensor (F, L, D) (IDEFICS3-LM-013, IDEFICS3-LM-014).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


def _checked(name: str, config: PretrainedConfig) -> Idefics3Config:
    if not isinstance(config, Idefics3Config):  # IDEFICS3-MODEL-003
        raise TypeError(f"{name} takes an Idefics3Config, not a {type(config).__name__}")
    return config


class Idefics3Model(Idefics3Trunk, PreTrainedModel):
    """Vision tower, connector and text model."""

    config_class = Idefics3Config
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = idefics3.RENAME
    config: Idefics3Config

    def __init__(self, config: Idefics3Config) -> None:
        """Make a model with random weights.

        Raises:
            TypeError: the configuration is not an `Idefics3Config`.
        """
        Idefics3Trunk.__init__(self, _checked("Idefics3Model", config))
        self.image_token_id = config.image_token_id
        self.generation_config = default_generation(config)
        self.init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.text_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place."""
        self.text_model.embed_tokens = value

    def _set_attention(self, implementation: str) -> None:
        self.implementation = implementation

    def forward(  # IDEFICS3-MODEL-001
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Idefics3BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of prompts, or of further tokens with a cache.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, cached + S), 0 for padding; all ones by default (IDEFICS3-MODEL-006).
            position_ids: (B, S), counted from the number of cached positions by default (IDEFICS3-MODEL-007).
            past_key_values: cache of an earlier call; it is continued in place.
            inputs_embeds: (B, S, D), in place of the embeddings of `input_ids`. Without `input_ids`, image positions
                are those that equal the image token's embedding (IDEFICS3-MODEL-013).
            pixel_values: (B, N, 3, height, width); frames of zeros are padding.
            pixel_attention_mask: (B, N, height, width), 0 for padding; all ones by default.
            image_hidden_states: (F, L, D), in place of pixel values (IDEFICS3-MODEL-020).
            use_cache: return a cache; the configuration's value by default (IDEFICS3-MODEL-025).
            output_attentions: return attention weights (IDEFICS3-MODEL-026).
            output_hidden_states: return hidden states (IDEFICS3-MODEL-027).
            return_dict: False for a plain tuple (IDEFICS3-MODEL-028).

        Raises:
            ValueError: inputs are missing, contradict each other or have another shape than documented.
        """
        config = self.config
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        caching = config.use_cache if use_cache is None else use_cache
        past = cached_positions(past_key_values, caching)
        x, places = self._tokens(input_ids, inputs_embeds, past)
        rows, tokens = x.shape[:2]
        if pixel_values is not None and image_hidden_states is not None:
            raise ValueError("pixel_values and image_hidden_states are both given; one of them is enough")
        features = image_hidden_states
        if pixel_values is not None:
            if pixel_values.shape[0] != rows:
                raise ValueError(f"pixel_values has {pixel_values.shape[0]} rows; the tokens have {rows}")
            features = idefics3.encode_images(self, pixel_values, pixel_attention_mask)
        elif features is not None:
            features = features.to(device=x.device, dtype=x.dtype)
        # A later call carries the features of the first along; they are merged only where image tokens ask for them.
        if features is not None and (past == 0 or bool(places.any())):
            x = idefics3.merge(x, places, features)
        valid = real_slots(attention_mask, rows, past, tokens, x.device)
        positions = rotary_positions(position_ids, rows, past, tokens, x.device)
        cache = with_room(past_key_values, rows, tokens)
        if caching and cache is None:
            cache = idefics3.new_cache(self, rows, tokens + SPARE_SLOTS)
        taps: dict[str, Tensor] | None = {} if wants_states else None
        attentions: list[Tensor] | None = [] if wants_attentions else None
        hidden = idefics3.prefill(self, x, positions, valid, cache, taps=taps, attentions=attentions)
        states: tuple[Tensor, ...] | None = None
        if taps is not None:
            inner = [taps[f"text.layers.{index}"] for index in range(len(self.text_model.layers) - 1)]
            states = (taps["text.embeddings"], *inner, taps["text.norm"])
        output = Idefics3BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=states,
            attentions=None if attentions is None else tuple(attentions),
            image_hidden_states=features,
        )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _tokens(self, ids: Tensor | None, embeddings: Tensor | None, past: int) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S, D) and where image tokens are (B, S)."""
        table = self.text_model.embed_tokens
        if ids is not None:
            check_ids(ids, table.num_embeddings)
            ids = ids.to(table.weight.device)
        if embeddings is None:
            if ids is None:
                raise ValueError(
                    "neither input_ids nor inputs_embeds is given; one of them is needed"
                )  # IDEFICS3-MODEL-014
            return table(ids), ids == self.image_token_id
        width = table.embedding_dim
        if embeddings.ndim != 3 or embeddings.shape[-1] != width:
            raise ValueError(f"inputs_embeds is {tuple(embeddings.shape)}; it has to be (batch, tokens, {width})")
        x = embeddings.to(device=table.weight.device, dtype=table.weight.dtype)
        if ids is not None:
            if ids.shape != x.shape[:2]:
                raise ValueError(f"input_ids is {tuple(ids.shape)}, inputs_embeds is {tuple(x.shape)}; they differ")
            return x, ids == self.image_token_id
        if self.image_token_id >= table.num_embeddings:
            return x, torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        return x, (x == table.weight[self.image_token_id]).all(-1)


class Idefics3ForConditionalGeneration(Idefics3, PreTrainedModel):
    """The model with its language model head."""

    config_class = Idefics3Config
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = idefics3.RENAME
    inputs = (*PreTrainedModel.inputs, "pixel_values", "pixel_attention_mask")
    features = "image_hidden_states"
    config: Idefics3Config
    model: Idefics3Model

    def __init__(self, config: Idefics3Config) -> None:
        """Make a model with random weights.

        Raises:
            TypeError: the configuration is not an `Idefics3Config`.
        """
        config = _checked("Idefics3ForConditionalGeneration", config)
        Idefics3.__init__(self, config, Idefics3Model(config))
        self.image_token_id = config.image_token_id  # IDEFICS3-LM-007
        self.generation_config = default_generation(config)
        if not config.tie_word_embeddings:
            nn.init.normal_(self.lm_head.weight, 0.0, config.text_config.initializer_range)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place; a tied head follows it."""
        self.model.set_input_embeddings(value)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = value.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The language model head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another language model head in place."""
        self.lm_head = new_embeddings

    def _set_attention(self, implementation: str) -> None:
        self.model.set_attention(implementation)

    def _set_config(self, config: PretrainedConfig) -> None:
        self.config = self.model.config = _checked(type(self).__name__, config)

    def runtime(self) -> Runtime:
        """This model, ready to run."""
        return Idefics3Runtime(self)

    def forward(  # IDEFICS3-LM-001
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Idefics3CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of prompts, or of further tokens with a cache, and the loss where labels are given.

        Args:
            input_ids: as in `Idefics3Model.forward`, like all arguments but `labels`.
            attention_mask: as there.
            position_ids: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            pixel_values: as there.
            pixel_attention_mask: as there.
            image_hidden_states: as there.
            labels: (B, S) int64, -100 to ignore a position. Image tokens are ordinary targets (IDEFICS3-LM-005).
            use_cache: as there.
            output_attentions: as there.
            output_hidden_states: as there.
            return_dict: as there.

        Raises:
            ValueError: as there.
            LabelError: a label is neither -100 nor below the vocabulary's size (IDEFICS3-LM-010).
        """
        inner = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            image_hidden_states=image_hidden_states,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(inner.last_hidden_state)
        loss = None
        if labels is not None:
            logits = logits.to(at_least_float32(logits.dtype))
            loss = next_token_loss(logits, labels, attention_mask)
        output = Idefics3CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=inner.past_key_values,
            hidden_states=inner.hidden_states,
            attentions=inner.attentions,
            image_hidden_states=inner.image_hidden_states,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()  # IDEFICS3-LM-015
