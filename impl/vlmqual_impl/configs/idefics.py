"""Configurations of Idefics: vision tower, resampler, composite.

Source of names and defaults: Idefics documentation 4.46; those of the parts, which it does not print, are the
documented version's (4.46.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from vlmqual_impl.configs.base import ACTIVATIONS, ConfigError, PretrainedConfig, wrong_type

ALPHA_TYPES = ("float", "vector")
ALPHA_INITIALIZERS = ("zeros", "ones", "normal", "gaussian", "random")
FREEZE_EXCEPTIONS = ("LayerNorm", "Linear", "Embedding")
ROTARY_BASE = 10000.0  # fixed in this family


def _mapping_of(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a composite config.json; all parts carry the composite's `model_type` in the layout of 4.46."""
    part = values.get(key)
    return part if isinstance(part, Mapping) else values


def _check_switches(config: PretrainedConfig, *keys: str) -> None:
    for key in keys:
        if not isinstance(getattr(config, key), bool):
            config._refuse(key, "it has to be true or false")


def _check_dropout(config: PretrainedConfig, key: str) -> None:
    config._number(key)
    if getattr(config, key) > 1:
        config._refuse(key, "it is a probability, at most 1")


class IdeficsVisionConfig(PretrainedConfig):
    """The vision tower. `embed_dim` is the stored name of `hidden_size`.

    `initializer_range` and `initializer_factor` are inert: random weights follow the composite's `initializer_range`.
    """

    model_type = "idefics"
    nested = "vision_config"

    embed_dim: int
    image_size: int
    intermediate_size: int
    patch_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    initializer_range: float
    initializer_factor: float

    def __init__(
        self,
        embed_dim: int = 768,
        image_size: int = 224,
        intermediate_size: int = 5120,
        patch_size: int = 14,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        others = dict(kwargs)
        kind = others.get("model_type", self.model_type)
        if kind not in self._accepted():
            raise ConfigError(f"vision_config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        if "hidden_size" in others:
            named["embed_dim"] = others.pop("hidden_size")
        self._fill(named, others)

    @classmethod
    def _accepted(cls) -> tuple[str, ...]:
        return ("idefics", "idefics_vision", "clip_vision_model")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """As the base class does; a composite config.json, of the same `model_type`, gives its `vision_config`."""
        return super().from_dict(_mapping_of(config_dict, "vision_config"), **kwargs)

    @property
    def hidden_size(self) -> int:
        """The documented synonym of `embed_dim`."""
        return self.embed_dim

    @property
    def num_patches(self) -> int:
        """Patches of an image of the usual size."""
        return (self.image_size // self.patch_size) ** 2

    def _check(self) -> None:
        self._positive("embed_dim", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
        self._positive("image_size", "patch_size")
        self._number("layer_norm_eps")
        _check_dropout(self, "attention_dropout")
        if self.embed_dim % self.num_attention_heads:
            self._refuse("embed_dim", f"it does not divide by num_attention_heads {self.num_attention_heads}")
        if self.patch_size > self.image_size:
            self._refuse("patch_size", f"it is larger than image_size {self.image_size}")
        if self.hidden_act not in ACTIVATIONS:
            self._refuse("hidden_act", f"known activations are {', '.join(ACTIVATIONS)}")


class IdeficsPerceiverConfig(PretrainedConfig):
    """The resampler. Whether there is one is said by the composite's `use_resampler`; the one here is inert."""

    model_type = "idefics"
    nested = "perceiver_config"

    use_resampler: bool
    resampler_n_latents: int
    resampler_depth: int
    resampler_n_heads: int
    resampler_head_dim: int
    qk_layer_norms_perceiver: bool

    def __init__(
        self,
        use_resampler: bool = False,
        resampler_n_latents: int = 64,
        resampler_depth: int = 6,
        resampler_n_heads: int = 16,
        resampler_head_dim: int = 96,
        qk_layer_norms_perceiver: bool = False,
        **kwargs: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        kind = kwargs.get("model_type", self.model_type)
        if kind not in self._accepted():
            rule = f"{type(self).__name__} reads {self.model_type!r}"
            raise ConfigError(f"perceiver_config.model_type is {kind!r}; {rule}")
        self._fill(named, kwargs)

    @classmethod
    def _accepted(cls) -> tuple[str, ...]:
        return ("idefics", "idefics_perciever")  # the second is spelled so by 5.x

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """As the base class does; a composite config.json, of the same `model_type`, gives its `perceiver_config`."""
        return super().from_dict(_mapping_of(config_dict, "perceiver_config"), **kwargs)

    def _check(self) -> None:
        self._positive("resampler_n_latents", "resampler_depth", "resampler_n_heads", "resampler_head_dim")
        _check_switches(self, "use_resampler", "qk_layer_norms_perceiver")


class IdeficsConfig(PretrainedConfig):
    """The composite: text model, gated cross-attention, vision tower and resampler.

    `max_position_embeddings` and `rope_parameters`, which 5.x writes, are read and inert: rotary positions have no end,
    and their base is fixed, so another one is refused. `alphas_initializer_range` is read only where
    `alpha_initializer` is random, and `perceiver_config` only where `use_resampler` is true.
    """

    model_type = "idefics"

    vocab_size: int
    additional_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    dropout: float
    hidden_act: str
    initializer_range: float
    alpha_initializer: str
    alphas_initializer_range: float
    alpha_type: str
    rms_norm_eps: float
    use_cache: bool
    cross_layer_interval: int
    qk_layer_norms: bool
    freeze_text_layers: bool
    freeze_text_module_exceptions: list[str]
    freeze_lm_head: bool
    freeze_vision_layers: bool
    freeze_vision_module_exceptions: list[str]
    use_resampler: bool
    vision_config: IdeficsVisionConfig
    perceiver_config: IdeficsPerceiverConfig

    def __init__(  # IDEFICS-CFG-029
        self,
        vocab_size: int = 32000,
        additional_vocab_size: int = 0,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        dropout: float = 0.0,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
        alpha_initializer: str = "zeros",
        alphas_initializer_range: float = 0.0,
        alpha_type: str = "float",
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        cross_layer_interval: int = 1,
        qk_layer_norms: bool = False,
        freeze_text_layers: bool = True,
        freeze_text_module_exceptions: Sequence[str] = [],  # the documented default; copied, never changed
        freeze_lm_head: bool = False,
        freeze_vision_layers: bool = True,
        freeze_vision_module_exceptions: Sequence[str] = [],  # as above
        use_resampler: bool = False,
        vision_config: IdeficsVisionConfig | Mapping[str, Any] | None = None,
        perceiver_config: IdeficsPerceiverConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        others = dict(kwargs)
        kind = others.get("model_type", self.model_type)
        if kind != self.model_type:
            raise ConfigError(f"config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        # What 5.x writes of the rotary embedding, whose base nothing changes in this family.
        named["max_position_embeddings"] = others.pop("max_position_embeddings", 2048)
        named["rope_parameters"] = others.pop("rope_parameters", None)
        for key in ("freeze_text_module_exceptions", "freeze_vision_module_exceptions"):
            given = named[key]
            named[key] = list(given) if isinstance(given, (list, tuple)) else given
        if vision_config is None:
            named["vision_config"] = IdeficsVisionConfig()  # IDEFICS-CFG-027
        elif isinstance(vision_config, Mapping):
            named["vision_config"] = IdeficsVisionConfig.from_dict(vision_config)  # IDEFICS-CFG-032
        elif not isinstance(vision_config, IdeficsVisionConfig):
            raise wrong_type("vision_config", vision_config, "IdeficsVisionConfig")
        if perceiver_config is None:
            named["perceiver_config"] = IdeficsPerceiverConfig()  # IDEFICS-CFG-028
        elif isinstance(perceiver_config, Mapping):
            named["perceiver_config"] = IdeficsPerceiverConfig.from_dict(perceiver_config)  # IDEFICS-CFG-033
        elif not isinstance(perceiver_config, IdeficsPerceiverConfig):
            raise wrong_type("perceiver_config", perceiver_config, "IdeficsPerceiverConfig")
        self._fill(named, others)

    @property
    def vocabulary(self) -> int:
        """Ids that there are, the additional ones included."""
        return self.vocab_size + self.additional_vocab_size

    def to_dict(self) -> dict[str, Any]:
        """As the base class does, without what only 5.x knows."""
        values = super().to_dict()
        return {
            key: value for key, value in values.items() if key not in ("max_position_embeddings", "rope_parameters")
        }

    def _check(self) -> None:
        self._positive("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self._positive("cross_layer_interval")
        self._number("initializer_range", "alphas_initializer_range", "rms_norm_eps")
        _check_dropout(self, "dropout")
        _check_switches(self, "use_cache", "tie_word_embeddings", "qk_layer_norms", "use_resampler")
        _check_switches(self, "freeze_text_layers", "freeze_lm_head", "freeze_vision_layers")
        extra = self.additional_vocab_size
        if isinstance(extra, bool) or not isinstance(extra, int) or extra < 0:
            self._refuse("additional_vocab_size", "it has to be a number of at least 0")
        if self.hidden_size % self.num_attention_heads:
            self._refuse("hidden_size", f"it does not divide by num_attention_heads {self.num_attention_heads}")
        if (self.hidden_size // self.num_attention_heads) % 2:
            self._refuse("hidden_size", f"rotary embedding needs {self.num_attention_heads} heads of even width")
        if self.num_hidden_layers % self.cross_layer_interval:
            self._refuse("cross_layer_interval", f"num_hidden_layers {self.num_hidden_layers} does not divide by it")
        if self.hidden_act not in ACTIVATIONS:
            self._refuse("hidden_act", f"known activations are {', '.join(ACTIVATIONS)}")
        if self.alpha_type not in ALPHA_TYPES:
            self._refuse("alpha_type", f"valid are {', '.join(ALPHA_TYPES)}")
        if self.alpha_initializer not in ALPHA_INITIALIZERS:
            self._refuse("alpha_initializer", f"valid are {', '.join(ALPHA_INITIALIZERS)}")
        for key in ("freeze_text_module_exceptions", "freeze_vision_module_exceptions"):  # IDEFICS-CFG-049
            given = getattr(self, key)
            if not isinstance(given, list) or [item for item in given if item not in FREEZE_EXCEPTIONS]:
                self._refuse(key, f"it has to be a list of some of {', '.join(FREEZE_EXCEPTIONS)}")
        rope = {} if self.rope_parameters is None else self.rope_parameters
        if not isinstance(rope, Mapping):
            self._refuse("rope_parameters", "it has to be a mapping")
        if rope.get("rope_theta", ROTARY_BASE) != ROTARY_BASE or rope.get("rope_type", "default") != "default":
            self._refuse("rope_parameters", f"the base of this family's rotary embedding is fixed to {ROTARY_BASE:g}")
