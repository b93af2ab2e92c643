"""The documented text models of Mllama.

Legend of shapes: B rows, S token positions of this call, N image slots, T tiles, L image tokens of a tile,
K = N * T * L image tokens of a row, D text width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlmqual_impl.api.arguments import SPARE_SLOTS, cached_positions, one_of, real_slots, rotary_positions, with_room
from vlmqual_impl.api.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, next_token_loss
from vlmqual_impl.api.pretrained import PreTrainedModel, default_generation
from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import MllamaConfig, MllamaTextConfig, PretrainedConfig
from vlmqual_impl.layers import at_least_float32
from vlmqual_impl.models import mllama
from vlmqual_impl.models.mllama import Images, MllamaLanguage, MllamaText
from vlmqual_impl.runtime.base import Runtime
from vlmqual_impl.runtime.eager import check_ids
from vlmqual_impl.runtime.eager_mllama import MllamaTextRuntime

_NOT_TEXT = (r"^(model\.)?(vision_model|multi_modal_projector)\.", None)


def _text_config(name: str, config: PretrainedConfig) -> MllamaTextConfig:
    if isinstance(config, MllamaConfig):  # MLLAMA-CLM-002
        return config.text_config
    if not isinstance(config, MllamaTextConfig):
        raise TypeError(f"{name} takes a MllamaTextConfig or a MllamaConfig, not a {type(config).__name__}")
    return config


class MllamaTextModel(MllamaText, PreTrainedModel):
    """The text model without head: Llama layers and cross-attention layers (MLLAMA-TEXT-005)."""

    config_class = MllamaTextConfig
    may_tie = False
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = (  # MLLAMA-TEXT-011
        _NOT_TEXT,
        (r"(^|\.)lm_head\.", None),
        (r"^(model\.language_model|language_model\.model|model)\.", ""),
    )
    config: MllamaTextConfig

    def __init__(self, config: MllamaTextConfig) -> None:
        """Make a model with random weights.

        Raises:
            TypeError: the configuration is of another class.
        """
        text = _text_config("MllamaTextModel", config)
        MllamaText.__init__(self, text)
        self.config = text
        self.implementation = "sdpa"
        self.generation_config = default_generation(text)
        self.init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place."""
        self.embed_tokens = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Not offered: the embedding has image tokens behind the vocabulary, so its rows cannot be added to.

        Raises:
            ValueError: always, but when nothing would change.
        """
        return _unresized(self.embed_tokens, new_num_tokens)

    def _set_attention(self, implementation: str) -> None:
        self.implementation = implementation

    def forward(  # MLLAMA-TEXT-001
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        full_text_row_masked_out_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of prompts, or of further tokens with a cache.

        Args:
            input_ids: (B, S) int64; the image token is the id above the vocabulary.
            attention_mask: (B, cached + S), 0 for padding; all ones by default (MLLAMA-TEXT-007).
            position_ids: (B, S), counted from the number of cached positions by default.
            cross_attention_states: image features in the text width, (B, K, D) or (B * N * T, L, D).
            cross_attention_mask: already expanded, (B, 1, S, K), added to scores.
            full_text_row_masked_out_mask: (B, 1, S, 1), 0 for tokens that see no image.
            past_key_values: cache of an earlier call; it is continued in place.
            inputs_embeds: (B, S, D), in place of `input_ids` (MLLAMA-TEXT-008).
            use_cache: return a cache; the configuration's value by default (MLLAMA-TEXT-009).
            output_attentions: return attention weights of the layers that ran (MLLAMA-TEXT-003).
            output_hidden_states: return hidden states.
            return_dict: False for a plain tuple.
            cache_position: (S,), positions in the cache; has to be what the cache says.

        Raises:
            ValueError: inputs are missing, contradict each other or have another shape than documented.
        """
        config = self.config
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        caching = config.use_cache if use_cache is None else use_cache
        past = cached_positions(past_key_values, caching)
        x = self._tokens(input_ids, inputs_embeds)
        rows, tokens = x.shape[:2]
        images = self._images(cross_attention_states, cross_attention_mask, full_text_row_masked_out_mask, x)
        if cache_position is not None and cache_position.tolist() != list(range(past, past + tokens)):
            wanted = f"{past} to {past + tokens - 1}"
            raise ValueError(f"cache_position is {cache_position.tolist()}; the cache makes it {wanted}")
        positions = rotary_positions(position_ids, rows, past, tokens, x.device)
        valid = real_slots(attention_mask, rows, past, tokens, x.device)
        cache = with_room(past_key_values, rows, tokens)
        if caching and cache is None:
            cache = mllama.new_cache(self, rows, tokens + SPARE_SLOTS)
        taps: dict[str, Tensor] | None = {} if wants_states else None
        attentions: list[Tensor] | None = [] if wants_attentions else None
        hidden = mllama.run(
            self,
            x,
            positions,
            valid,
            cache,
            images,
            implementation=self.implementation,
            taps=taps,
            attentions=attentions,
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=None if taps is None else self._states(taps),
            attentions=None if attentions is None else tuple(attentions),
        )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _tokens(self, ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        one_of(ids, embeddings)
        weight = self.embed_tokens.weight
        if ids is not None:
            check_ids(ids, len(weight))
            embedded: Tensor = self.embed_tokens(ids.to(weight.device))
            return embedded
        assert embeddings is not None, "one of the two is given"
        if embeddings.ndim != 3 or embeddings.shape[-1] != weight.shape[1]:
            width = weight.shape[1]
            raise ValueError(f"inputs_embeds is {tuple(embeddings.shape)}; it has to be (batch, tokens, {width})")
        return embeddings.to(weight)

    @staticmethod
    def _images(states: Tensor | None, bias: Tensor | None, rows: Tensor | None, x: Tensor) -> Images:
        for name, given in (("cross_attention_mask", bias), ("full_text_row_masked_out_mask", rows)):
            if given is not None and (given.ndim != 4 or given.shape[2] not in (1, x.shape[1])):
                raise ValueError(
                    f"{name} is {tuple(given.shape)}; the text model takes it expanded, "
                    f"(batch, 1, {x.shape[1]} tokens, {'image tokens' if given is bias else '1'})"
                )
        return Images(
            states=None if states is None else mllama.row_features(states, x.shape[0]).to(x),
            bias=None if bias is None else bias.to(x),
            rows=None if rows is None else rows[:, 0].to(x),
        )

    def _states(self, taps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What enters each layer, and the output; a layer that was skipped passes on what entered it."""
        state = taps["text.embeddings"]
        states = []
        for index in range(len(self.layers)):
            states.append(state)
            state = taps.get(f"text.layers.{index}", state)
        return (*states, taps["text.norm"])


class MllamaForCausalLM(MllamaLanguage, PreTrainedModel):
    """The text model with its head; no vision model (MLLAMA-CLM-004)."""

    config_class = MllamaTextConfig
    base_model_prefix = "language_model"
    may_tie = False
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = (  # MLLAMA-CLM-005
        _NOT_TEXT,
        (r"^model\.language_model\.", "model."),
        (r"^language_model\.", ""),
    )
    config: MllamaTextConfig
    model: MllamaTextModel

    def __init__(self, config: MllamaTextConfig | MllamaConfig) -> None:  # MLLAMA-CLM-002, MLLAMA-CLM-003
        """Make a model with random weights.

        Raises:
            TypeError: the configuration is of another class.
        """
        text = _text_config("MllamaForCausalLM", config)
        MllamaLanguage.__init__(self, text, MllamaTextModel(text))
        self.config = text
        self.generation_config = default_generation(text)
        nn.init.normal_(self.lm_head.weight, 0.0, text.initializer_range)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The language model head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another language model head in place."""
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Not offered; see `MllamaTextModel.resize_token_embeddings`."""
        return self.model.resize_token_embeddings(new_num_tokens)

    def _set_attention(self, implementation: str) -> None:
        self.model.set_attention(implementation)

    def runtime(self) -> Runtime:
        """This model, ready to run."""
        return MllamaTextRuntime(self, self.model.implementation)

    def forward(  # MLLAMA-CLM-001
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        full_text_row_masked_out_mask: Tensor | None = None,
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
        """Logits, and the loss where labels are given.

        Args:
            input_ids: as in `MllamaTextModel.forward`, like all arguments but `labels` and `num_logits_to_keep`.
            attention_mask: as there.
            position_ids: as there.
            cross_attention_states: as there (MLLAMA-CLM-011).
            cross_attention_mask: as there.
            full_text_row_masked_out_mask: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            labels: (B, S) int64, -100 to ignore a position (MLLAMA-CLM-006).
            use_cache: as there.
            output_attentions: as there.
            output_hidden_states: as there.
            return_dict: as there.
            cache_position: as there.
            num_logits_to_keep: logits of the last so many positions only, 0 for all (MLLAMA-CLM-007).

        Raises:
            ValueError: as there, or `num_logits_to_keep` is no number of positions.
            LabelError: a label is neither -100 nor below the vocabulary's size.
        """
        inner = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cross_attention_states=cross_attention_states,
            cross_attention_mask=cross_attention_mask,
            full_text_row_masked_out_mask=full_text_row_masked_out_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
        )
        hidden = inner.last_hidden_state
        if isinstance(num_logits_to_keep, bool) or not isinstance(num_logits_to_keep, int) or num_logits_to_keep < 0:
            raise ValueError(f"num_logits_to_keep is {num_logits_to_keep!r}; it has to be a number of positions, or 0")
        logits = self.lm_head(hidden[:, -num_logits_to_keep:])
        loss = None
        if labels is not None:
            logits = logits.to(at_least_float32(logits.dtype))
            loss = next_token_loss(logits, labels, None)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=inner.past_key_values,
            hidden_states=inner.hidden_states,
            attentions=inner.attentions,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


def _unresized(table: nn.Embedding, wanted: int | None) -> nn.Embedding:
    if wanted is None or wanted == table.num_embeddings:
        return table
    raise ValueError(
        f"new_num_tokens is {wanted}; the {table.num_embeddings} rows cannot be changed, "
        "since the ids behind the vocabulary stand for images"
    )
