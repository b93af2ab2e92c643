"""The documented Idefics model without head.

Legend of shapes: B rows, S token positions of this call, N image slots of a row, P positions of a picture in the vision
tower, L features of an image (P, or latents of the resampler), E width of the tower, D text width, H heads, d head
width, K cached and new positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmqual_impl.api.arguments import one_of, real_slots, rotary_positions
from vlmqual_impl.api.outputs import ModelOutput
from vlmqual_impl.api.pretrained import PreTrainedModel, default_generation
from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import IdeficsConfig, PretrainedConfig
from vlmqual_impl.models import idefics
from vlmqual_impl.models.idefics import IdeficsTrunk
from vlmqual_impl.runtime.eager import check_ids

Past = tuple[tuple[Tensor, Tensor], ...]  # keys and values of every decoder layer, (B, H, K, d) each
FREEZABLE: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "Linear": nn.Linear, "Embedding": nn.Embedding}


@dataclass
class IdeficsBaseModelOutputWithPast(ModelOutput):
    """Result of the model without head.

    Attributes:
        last_hidden_state: (B, S, D) (IDEFICS-MODEL-003).
        past_key_values: for each decoder layer keys and values, (B, H, K, d) each (IDEFICS-MODEL-009).
        hidden_states: (B, S, D) each: what enters every decoder layer and the cross-attention block before it, and the
            output (IDEFICS-MODEL-015).
        attentions: one (B, H, S, K) for each decoder layer (IDEFICS-MODEL-014).
        image_hidden_states: one tensor (B, N, L, E).
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Past | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


def checked(name: str, config: PretrainedConfig) -> IdeficsConfig:
    """The configuration, when it is one of this family.

    Raises:
        TypeError: it is another one.
    """
    if not isinstance(config, IdeficsConfig):
        raise TypeError(f"{name} takes an IdeficsConfig, not a {type(config).__name__}")
    return config


class IdeficsModel(IdeficsTrunk, PreTrainedModel):
    """Vision tower, resampler where there is one, and the text model with its gated cross-attention blocks.

    `resize_token_embeddings` changes the main table (IDEFICS-MODEL-024). Ids of the additional one follow the last of
    the main one, so they move with its size.
    """

    config_class = IdeficsConfig
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = idefics.RENAME
    config: IdeficsConfig

    def __init__(self, config: IdeficsConfig) -> None:  # IDEFICS-CFG-036
        """Make a model with random weights, frozen as the configuration says.

        Raises:
            TypeError: the configuration is not an `IdeficsConfig`.
        """
        IdeficsTrunk.__init__(self, checked("IdeficsModel", config))
        self.generation_config = default_generation(config)
        self.init_weights()
        self.embed_tokens.weight.requires_grad_(not config.freeze_text_layers)  # IDEFICS-CFG-040
        self.freeze_relevant_params()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the base class does (IDEFICS-CFG-057); the padding id's row is 0."""
        super().init_weights()
        padding = self.config.pad_token_id
        if padding is not None and 0 <= padding < self.embed_tokens.num_embeddings:
            self.embed_tokens.weight[padding].zero_()

    # -------------------------------------------------------------------------------------------------- freezing

    def freeze_relevant_params(self, config: IdeficsConfig | None = None) -> None:
        """Freeze what a configuration says, by default the model's own."""
        config = self.config if config is None else config
        if config.freeze_text_layers:  # IDEFICS-CFG-047, IDEFICS-CFG-048
            self.freeze_text_layers(config.freeze_text_module_exceptions)
        if config.freeze_vision_layers:  # IDEFICS-CFG-051, IDEFICS-CFG-052
            self.freeze_vision_layers(config.freeze_vision_module_exceptions)

    def freeze_text_layers(self, module_exceptions: Sequence[str] = ()) -> None:
        """Freeze decoder layers and final norm, not the cross-attention blocks; see `freeze_vision_layers`."""
        for part in (self.layers, self.norm):
            _freeze(part, module_exceptions)

    def freeze_vision_layers(self, module_exceptions: Sequence[str] = ()) -> None:
        """Freeze the vision tower.

        Args:
            module_exceptions: kinds of modules that stay trainable: "LayerNorm", "Linear", "Embedding". RMS norms are
                of no kind.

        Raises:
            ValueError: a kind is unknown.
        """
        _freeze(self.vision_model, module_exceptions)

    # ------------------------------------------------------------------------------------------------ embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, which holds the additional one."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place."""
        self.embed_tokens = value  # type: ignore[assignment]  # whoever puts a plain one has no additional ids

    def _set_attention(self, implementation: str) -> None:
        self.implementation = implementation

    # --------------------------------------------------------------------------------------------------- forward

    def forward(  # IDEFICS-MODEL-001
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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
    ) -> IdeficsBaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of prompts, or of further tokens with a cache.

        Every call brings all images; their keys and values are no part of `past_key_values` (IDEFICS-MODEL-010).

        Args:
            input_ids: (B, S) int64, up to `vocab_size + additional_vocab_size - 1`.
            attention_mask: (B, cached + S), 0 for padding; all ones by default (IDEFICS-MODEL-005).
            position_ids: (B, S); by default real tokens are counted from 0 and padding has 1 (IDEFICS-MODEL-006).
            past_key_values: what an earlier call returned (IDEFICS-MODEL-011, IDEFICS-MODEL-012).
            inputs_embeds: (B, S, D), in place of `input_ids` (IDEFICS-MODEL-007).
            pixel_values: (B, N, 3, height, width).
            image_encoder_embeddings: (B, N, P, E), in place of pixel values (IDEFICS-MODEL-020).
            perceiver_embeddings: (B, N, L, E) of the resampler, in place of both (IDEFICS-MODEL-021).
            image_attention_mask: (B, S, N), not 0 for images that a token sees; needed (IDEFICS-MODEL-019).
            use_cache: return keys and values; the configuration's value by default (IDEFICS-MODEL-013).
            output_attentions: return attention weights (IDEFICS-MODEL-014).
            output_hidden_states: return hidden states (IDEFICS-MODEL-015).
            interpolate_pos_encoding: take pictures of another size than the configuration's (IDEFICS-MODEL-022).
            return_dict: False for a plain tuple (IDEFICS-MODEL-016).
            cache_position: (S,), positions in the cache; has to be what the cache says (IDEFICS-MODEL-017).

        Raises:
            ValueError: inputs are missing, contradict each other or have another shape than documented.
        """
        config = self.config
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        caching = config.use_cache if use_cache is None else use_cache
        x = self._tokens(input_ids, inputs_embeds)
        rows, tokens = x.shape[:2]
        past = self._cached(past_key_values, rows, caching)
        if cache_position is not None and cache_position.tolist() != list(range(past, past + tokens)):
            wanted = f"{past} to {past + tokens - 1}"
            raise ValueError(f"cache_position is {cache_position.tolist()}; the cache makes it {wanted}")
        given = (pixel_values, image_encoder_embeddings, perceiver_embeddings)
        features = self.image_features(*given, interpolate=bool(interpolate_pos_encoding)).to(x)
        images = idefics.images_for(self, features, image_attention_mask, x)
        valid = real_slots(attention_mask, rows, past, tokens, x.device)
        if position_ids is None and attention_mask is not None:
            position_ids = _counted(attention_mask, tokens)
        positions = rotary_positions(position_ids, rows, past, tokens, x.device)
        cache = self._cache(past_key_values, rows, past + tokens) if caching else None
        taps: dict[str, Tensor] | None = {} if wants_states else None
        attentions: list[Tensor] | None = [] if wants_attentions else None
        hidden = idefics.run(self, x, positions, valid, cache, images, taps=taps, attentions=attentions)
        states: tuple[Tensor, ...] | None = None
        if taps is not None:
            inner = [taps[f"text.layers.{index}"] for index in range(len(self.layers) - 1)]
            states = (taps["text.embeddings"], *inner, taps["text.norm"])
        output = IdeficsBaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=None if cache is None else tuple(cache),
            hidden_states=states,
            attentions=None if attentions is None else tuple(attentions),
            image_hidden_states=features,
        )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def image_features(
        self, pixels: Tensor | None, encoded: Tensor | None, resampled: Tensor | None, *, interpolate: bool = False
    ) -> Tensor:
        """What cross-attention reads, (B, N, L, E), from the one of three inputs that is given.

        Args:
            pixels: `pixel_values`.
            encoded: `image_encoder_embeddings`.
            resampled: `perceiver_embeddings`.
            interpolate: see `forward`.

        Raises:
            ValueError: not exactly one is given, its shape is not the documented one, or `resampled` is given to a
                model without resampler.
        """
        if sum(given is not None for given in (pixels, encoded, resampled)) != 1:  # IDEFICS-MODEL-018
            raise ValueError("exactly one of pixel_values, image_encoder_embeddings and perceiver_embeddings is needed")
        if pixels is not None:
            return idefics.encode_images(self, pixels, interpolate=interpolate)
        if resampled is not None:
            if self.perceiver_resampler is None:
                raise ValueError("perceiver_embeddings are given, but the model has no resampler (use_resampler)")
            return resampled
        assert encoded is not None, "one of the three is given"
        width = self.config.vision_config.embed_dim
        if encoded.ndim != 4 or encoded.shape[-1] != width:
            rule = f"it has to be (batch, images, positions, {width})"
            raise ValueError(f"image_encoder_embeddings is {tuple(encoded.shape)}; {rule}")
        return idefics.resampled(self, encoded.to(self.embed_tokens.weight))

    def _tokens(self, ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        one_of(ids, embeddings)  # IDEFICS-MODEL-008
        weight = self.embed_tokens.weight
        if ids is not None:
            check_ids(ids, self.config.vocabulary)
            embedded: Tensor = self.embed_tokens(ids.to(weight.device))
            return embedded
        assert embeddings is not None, "one of the two is given"
        if embeddings.ndim != 3 or embeddings.shape[-1] != weight.shape[1]:
            width = weight.shape[1]
            raise ValueError(f"inputs_embeds is {tuple(embeddings.shape)}; it has to be (batch, tokens, {width})")
        return embeddings.to(weight)

    def _cached(self, past: Past | None, rows: int, caching: bool) -> int:
        """Cached positions."""
        if past is None:
            return 0
        if not caching:
            raise ValueError("past_key_values is given, but use_cache is False; a cache can only be continued")
        layers, heads = len(self.layers), self.config.num_attention_heads
        width = self.config.hidden_size // heads
        wanted = f"{layers} pairs of keys and values ({rows}, {heads}, positions, {width})"
        if not isinstance(past, (tuple, list)) or len(past) != layers:
            held = f" of {len(past)}" if isinstance(past, (tuple, list)) else ""
            raise ValueError(f"past_key_values is a {type(past).__name__}{held}; it has to be {wanted}")
        length = 0
        for index, pair in enumerate(past):
            tensors = pair if isinstance(pair, (tuple, list)) else ()
            shapes = [tuple(tensor.shape) for tensor in tensors if isinstance(tensor, Tensor)]
            if index == 0 and shapes and len(shapes[0]) == 4:
                length = shapes[0][2]
            if shapes != [(rows, heads, length, width)] * 2 or len(tensors) != 2:
                raise ValueError(f"past_key_values has {shapes} for layer {index}; it has to be {wanted}")
        return length

    def _cache(self, past: Past | None, rows: int, slots: int) -> KeyValueCache:
        """A cache for this call, which holds what is given."""
        cache = idefics.new_cache(self, rows, slots)
        if past is not None:
            for index, (keys, values) in enumerate(past):
                cache.write(index, keys, values)
            cache.advance(past[0][0].shape[-2])
        return cache


def _counted(mask: Tensor, tokens: int) -> Tensor:
    real = mask != 0
    return (real.long().cumsum(-1) - 1).masked_fill(~real, 1)[:, -tokens:]


def _freeze(part: nn.Module, exceptions: Sequence[str]) -> None:
    unknown = [name for name in exceptions if name not in FREEZABLE]
    if unknown:
        raise ValueError(f"module_exceptions holds {unknown[0]!r}; known are {', '.join(FREEZABLE)}")
    kept = tuple(FREEZABLE[name] for name in exceptions)
    for module in part.modules():  # parents before what they hold
        module.requires_grad_(isinstance(module, kept))
