"""Configurations of Idefics3: vision tower and composite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from vlmqual_impl.configs.base import ACTIVATIONS, ConfigError, PretrainedConfig, wrong_type
from vlmqual_impl.configs.llama import LlamaConfig


class Idefics3VisionConfig(PretrainedConfig):
    """The vision tower. Defaults are a small SigLIP geometry, not the released model's 364/14 (IDEFICS3-CFG-018)."""

    model_type = "idefics3"
    nested = "vision_config"

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    initializer_range: float

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        kind = kwargs.get("model_type", self.model_type)
        if kind not in self._accepted():
            raise ConfigError(f"vision_config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        self._fill(named, kwargs)

    @classmethod
    def _accepted(cls) -> tuple[str, ...]:
        return ("idefics3", "idefics3_vision")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """As the base class does; a composite config.json, of the same `model_type`, gives its `vision_config`."""
        if isinstance(config_dict.get("vision_config"), Mapping):
            config_dict = config_dict["vision_config"]
        return super().from_dict(config_dict, **kwargs)

    def _check(self) -> None:
        for key in ("image_size", "patch_size"):
            value = getattr(self, key)
            if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
                object.__setattr__(self, key, value[0])
        self._positive("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
        self._positive("image_size", "patch_size")
        self._number("layer_norm_eps", "attention_dropout")
        if self.hidden_size % self.num_attention_heads:
            self._refuse("hidden_size", f"it does not divide by num_attention_heads {self.num_attention_heads}")
        if self.patch_size > self.image_size:
            self._refuse("patch_size", f"it is larger than image_size {self.image_size}")
        if self.hidden_act not in ACTIVATIONS:
            self._refuse("hidden_act", f"known activations are {', '.join(ACTIVATIONS)}")


class Idefics3Config(PretrainedConfig):
    """The composite: vision tower, text model and what joins them.

    `pad_token_id` is stored here and reaches the text configuration only when that is the default one
    (IDEFICS3-CFG-005, IDEFICS3-CFG-006, IDEFICS3-CFG-007).
    """

    model_type = "idefics3"

    use_cache: bool
    image_token_id: int
    vision_config: Idefics3VisionConfig
    text_config: LlamaConfig
    scale_factor: int

    def __init__(  # IDEFICS3-CFG-011
        self,
        use_cache: bool = True,
        image_token_id: int = 128257,
        tie_word_embeddings: bool = False,
        vision_config: Idefics3VisionConfig | Mapping[str, Any] | None = None,
        text_config: LlamaConfig | Mapping[str, Any] | None = None,
        scale_factor: int = 2,
        pad_token_id: int | None = 128002,
        **kwargs: Any,
    ) -> None:
        others = dict(kwargs)
        kind = others.get("model_type", self.model_type)
        if kind != self.model_type:
            raise ConfigError(f"config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        saved_pad = others.pop("_pad_token_id", None)  # the name that 5.x writes
        if pad_token_id is None or (saved_pad is not None and pad_token_id == 128002):
            pad_token_id = 128002 if saved_pad is None else saved_pad
        if vision_config is None:
            vision_config = Idefics3VisionConfig()  # IDEFICS3-CFG-008
        elif isinstance(vision_config, Mapping):
            vision_config = Idefics3VisionConfig.from_dict(vision_config)  # IDEFICS3-CFG-012
        elif not isinstance(vision_config, Idefics3VisionConfig):
            raise wrong_type("vision_config", vision_config, "Idefics3VisionConfig")
        if text_config is None:  # IDEFICS3-CFG-010; the epsilon is the documented version's
            text_config = LlamaConfig(rms_norm_eps=1e-5, pad_token_id=pad_token_id, tie_word_embeddings=False)
        elif isinstance(text_config, Mapping):
            text_config = LlamaConfig.from_dict(text_config)  # IDEFICS3-CFG-013
        elif not isinstance(text_config, LlamaConfig):
            raise wrong_type("text_config", text_config, "LlamaConfig")
        named = {
            "use_cache": use_cache,
            "image_token_id": image_token_id,
            "tie_word_embeddings": tie_word_embeddings,
            "vision_config": vision_config,
            "text_config": text_config,
            "scale_factor": scale_factor,
            "pad_token_id": pad_token_id,
        }
        self._fill(named, others)

    def _check(self) -> None:
        self._positive("scale_factor")
        if isinstance(self.image_token_id, bool) or not isinstance(self.image_token_id, int) or self.image_token_id < 0:
            self._refuse("image_token_id", "it has to be a token id")

    @property
    def tokens_per_frame(self) -> int:
        """Image tokens of one frame (IDEFICS3-MODEL-029)."""
        vision = self.vision_config
        return int(((vision.image_size // vision.patch_size) ** 2) / (self.scale_factor**2))
