"""The documented Idefics model with its language model head.

Legend of shapes: B rows, S token positions of this call, N image slots of a row, L features of an image, E width of the
vision tower, D text width, V vocabulary with the additional ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmqual_impl.api.idefics_model import IdeficsModel, Past, checked
from vlmqual_impl.api.outputs import ModelOutput, next_token_loss
from vlmqual_impl.api.pretrained import PreTrainedModel, default_generation
from vlmqual_impl.configs import IdeficsConfig, PretrainedConfig
from vlmqual_impl.layers import at_least_float32
from vlmqual_impl.models import idefics
from vlmqual_impl.models.idefics import Idefics
from vlmqual_impl.runtime.base import Runtime
from vlmqual_impl.runtime.eager_idefics import INTERPOLATE, MASK, IdeficsRuntime


@dataclass
class IdeficsCausalLMOutputWithPast(ModelOutput):
    """Result of the model with head.

    Attributes:
        loss: scalar (IDEFICS-LM-006), only with labels.
        logits: (B, S, V), of the additional ids last (IDEFICS-LM-003, IDEFICS-LM-004).
        past_key_values: as in the model without head (IDEFICS-LM-012).
        hidden_states: as in the model without head (IDEFICS-LM-013).
        attentions: as in the model without head.
        image_hidden_states: one tensor (B, N, L, E) (IDEFICS-LM-010, IDEFICS-LM-011).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Past | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class IdeficsForVisionText2Text(Idefics, PreTrainedModel):
    """The model with its head; see `IdeficsModel` for sizes and freezing."""

    config_class = IdeficsConfig
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = idefics.RENAME
    inputs = (*PreTrainedModel.inputs, "pixel_values", MASK, INTERPOLATE)
    features = "image_hidden_states"
    config: IdeficsConfig
    model: IdeficsModel

    def __init__(self, config: IdeficsConfig) -> None:
        """Make a model with random weights, frozen as the configuration says.

        Raises:
            TypeError: the configuration is not an `IdeficsConfig`.
        """
        config = checked("IdeficsForVisionText2Text", config)
        Idefics.__init__(self, config, IdeficsModel(config))  # ties (IDEFICS-CFG-054)
        self.generation_config = default_generation(config)
        if not config.tie_word_embeddings:  # a tied head is frozen with its table
            for head in (self.lm_head, self.lm_head.additional_fc):
                if head is not None:
                    nn.init.normal_(head.weight, 0.0, config.initializer_range)
            self.lm_head.weight.requires_grad_(not config.freeze_lm_head)  # IDEFICS-CFG-050

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, which holds the additional one."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place; a tied head follows it."""
        self.model.set_input_embeddings(value)
        self.tie()

    def get_output_embeddings(self) -> nn.Linear:
        """The language model head, which holds the additional one."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another language model head in place."""
        self.lm_head = new_embeddings  # type: ignore[assignment]  # whoever puts a plain one has no additional ids

    def _set_attention(self, implementation: str) -> None:
        self.model.set_attention(implementation)

    def _set_config(self, config: PretrainedConfig) -> None:
        self.config = self.model.config = checked(type(self).__name__, config)

    def runtime(self) -> Runtime:
        """This model, ready to run."""
        return IdeficsRuntime(self)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Continue prompts, greedily or by sampling.

        Args:
            inputs: `input_ids` by position.
            **kwargs: as in `PreTrainedModel.generate`. Images are exactly one of `pixel_values` (with
                `interpolate_pos_encoding` where their size is another one), `image_encoder_embeddings`,
                `perceiver_embeddings` and `image_hidden_states` of an earlier call; `image_attention_mask` (B, S, N)
                belongs to the prompt, and tokens that follow see what its last position sees.

        Returns:
            (B, S + new) int64: prompt and continuation (IDEFICS-LM-015).

        Raises:
            ValueError: an unknown or unoffered setting, or inputs that do not fit (IDEFICS-LM-018).
        """
        names = ("image_encoder_embeddings", "perceiver_embeddings", self.features)
        brought = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        pixels = kwargs.get("pixel_values")
        if len(brought) + (pixels is not None) != 1:
            raise ValueError(f"exactly one of pixel_values, {', '.join(names)} is needed")
        interpolate = kwargs.pop(INTERPOLATE, None)
        if interpolate is not None:
            kwargs[INTERPOLATE] = torch.as_tensor(interpolate)
        if brought and self.features not in brought:
            states = [brought.get(name) for name in names[:2]]
            brought = {self.features: self.model.image_features(None, *states)}
        return super().generate(inputs, **brought, **kwargs)

    def forward(  # IDEFICS-LM-001
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
    ) -> IdeficsCausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of prompts, or of further tokens with a cache, and the loss where labels are given.

        Args:
            input_ids: as in `IdeficsModel.forward`, like all arguments but `labels`.
            attention_mask: as there; labels of padding are dropped.
            position_ids: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            pixel_values: as there.
            image_encoder_embeddings: as there.
            perceiver_embeddings: as there.
            image_attention_mask: as there.
            labels: (B, S) int64, -100 to ignore a position; additional ids are targets as well (IDEFICS-LM-007,
                IDEFICS-LM-008, IDEFICS-LM-019).
            use_cache: as there.
            output_attentions: as there.
            output_hidden_states: as there.
            interpolate_pos_encoding: as there.
            return_dict: as there.
            cache_position: as there.

        Raises:
            ValueError: as there.
            LabelError: a label is neither -100 nor below the vocabulary's size (IDEFICS-LM-009).
        """
        inner = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_encoder_embeddings=image_encoder_embeddings,
            perceiver_embeddings=perceiver_embeddings,
            image_attention_mask=image_attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            cache_position=cache_position,
        )
        logits = self.lm_head(inner.last_hidden_state)
        loss = None
        if labels is not None:  # IDEFICS-LM-005
            loss = next_token_loss(logits.to(at_least_float32(logits.dtype)), labels, attention_mask)
        output = IdeficsCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=inner.past_key_values,
            hidden_states=inner.hidden_states,
            attentions=inner.attentions,
            image_hidden_states=inner.image_hidden_states,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()  # IDEFICS-LM-014
