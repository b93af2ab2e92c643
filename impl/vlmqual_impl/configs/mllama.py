"""Configurations of Mllama: vision model, text model with cross-attention layers, composite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmqual_impl.configs.base import ACTIVATIONS, ConfigError, PretrainedConfig, wrong_type
from vlmqual_impl.configs.llama import DecoderConfig

EXTRA_EMBEDDINGS = 8  # rows of the embedding above the vocabulary; the first is the image token (MLLAMA-CFG-012)


def aspect_ratios(tiles: int) -> list[list[int]]:
    """All [tiles high, tiles wide] with at most `tiles` tiles, in the order of their ids (MLLAMA-CFG-014)."""
    sides = range(1, tiles + 1)
    return [[high, wide] for high in sides for wide in sides if high * wide <= tiles]


class MllamaVisionConfig(PretrainedConfig):
    """The vision model. Defaults are the released geometry but for the tile of 448 pixels (MLLAMA-CFG-010).

    `attention_heads` is the stored name of `num_attention_heads`, in every version.
    """

    model_type = "mllama_vision_model"
    nested = "vision_config"

    hidden_size: int
    hidden_act: str
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    num_channels: int
    intermediate_size: int
    vision_output_dim: int
    image_size: int
    patch_size: int
    norm_eps: float
    max_num_tiles: int
    intermediate_layers_indices: list[int]
    supported_aspect_ratios: list[list[int]]
    initializer_range: float

    def __init__(
        self,
        hidden_size: int = 1280,
        hidden_act: str = "gelu",
        num_hidden_layers: int = 32,
        num_global_layers: int = 8,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        intermediate_size: int = 5120,
        vision_output_dim: int = 7680,
        image_size: int = 448,
        patch_size: int = 14,
        norm_eps: float = 1e-5,
        max_num_tiles: int = 4,
        intermediate_layers_indices: list[int] | None = None,
        supported_aspect_ratios: list[list[int]] | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        others = dict(kwargs)
        named["attention_heads"] = others.pop("attention_heads", named.pop("num_attention_heads"))
        if intermediate_layers_indices is None:
            named["intermediate_layers_indices"] = [3, 7, 15, 23, 30]
        if supported_aspect_ratios is None and isinstance(max_num_tiles, int):
            named["supported_aspect_ratios"] = aspect_ratios(max_num_tiles)
        kind = others.get("model_type", self.model_type)
        if kind != self.model_type:
            raise ConfigError(f"vision_config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        self._fill(named, others)

    @property
    def num_attention_heads(self) -> int:
        """Heads of a layer; stored as `attention_heads`."""
        return self.attention_heads

    @property
    def max_aspect_ratio_id(self) -> int:
        """The last aspect ratio id; 0 is padding (MLLAMA-VIS-007)."""
        return len(self.supported_aspect_ratios)

    @property
    def patches_per_tile(self) -> int:
        """Positions of a tile: its patches and the class embedding."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def _check(self) -> None:
        for key in ("image_size", "patch_size"):
            value = getattr(self, key)
            if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
                object.__setattr__(self, key, value[0])
        self._positive("hidden_size", "num_hidden_layers", "attention_heads", "num_channels", "intermediate_size")
        self._positive("vision_output_dim", "image_size", "patch_size", "max_num_tiles")
        self._number("norm_eps", "num_global_layers")
        if self.hidden_size % self.attention_heads:
            self._refuse("hidden_size", f"it does not divide by attention_heads {self.attention_heads}")
        if self.patch_size > self.image_size:
            self._refuse("patch_size", f"it is larger than image_size {self.image_size}")
        if self.hidden_act not in ACTIVATIONS:
            self._refuse("hidden_act", f"known activations are {', '.join(ACTIVATIONS)}")
        ratios = self.supported_aspect_ratios
        pairs = isinstance(ratios, (list, tuple)) and all(isinstance(r, (list, tuple)) and len(r) == 2 for r in ratios)
        if not pairs or not ratios:
            self._refuse("supported_aspect_ratios", "it has to be a list of [tiles high, tiles wide]")
        if not isinstance(self.intermediate_layers_indices, (list, tuple)):
            self._refuse("intermediate_layers_indices", "it has to be a list of layer numbers")

    def require_fitting(self) -> None:
        """Refuse values that no model can be built from, although each of them is possible by itself.

        Raises:
            ConfigError: an intermediate index is no state of the local encoder, or the output width is not that of the
                final state and the intermediate ones together.
        """
        wrong = [index for index in self.intermediate_layers_indices if not 0 <= index <= self.num_hidden_layers]
        if wrong:
            self._refuse("intermediate_layers_indices", f"states are 0 to num_hidden_layers {self.num_hidden_layers}")
        width = self.hidden_size * (1 + len(self.intermediate_layers_indices))
        if self.vision_output_dim != width:  # MLLAMA-VIS-005
            count = len(self.intermediate_layers_indices)
            self._refuse(
                "vision_output_dim", f"hidden_size {self.hidden_size} and {count} intermediate states make {width}"
            )


class MllamaTextConfig(DecoderConfig):
    """The text model: Llama layers, and cross-attention layers at `cross_attention_layers`."""

    model_type = "mllama_text_model"

    vocab_size: int
    initializer_range: float
    use_cache: bool
    cross_attention_layers: list[int]
    dropout: float

    # What the shared Llama layers ask for and this family does not configure.
    attention_bias = False
    mlp_bias = False

    def __init__(
        self,
        vocab_size: int = 128256,
        hidden_size: int = 4096,
        hidden_act: str = "silu",
        num_hidden_layers: int = 40,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        intermediate_size: int = 14_336,
        rope_theta: float = 500_000,
        rope_scaling: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 131_072,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        cross_attention_layers: list[int] | None = None,
        dropout: float = 0,
        bos_token_id: int | None = 128000,
        eos_token_id: int | list[int] | None = 128001,
        pad_token_id: int | None = 128004,
        **kwargs: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        others = dict(kwargs)
        kind = others.get("model_type", self.model_type)
        if kind != self.model_type:
            raise ConfigError(f"text_config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        if cross_attention_layers is None:
            named["cross_attention_layers"] = [3, 8, 13, 18, 23, 28, 33, 38]
        named |= self._named_rope(rope_theta, rope_scaling, others)
        for key in ("head_dim", "attention_bias", "mlp_bias", "attention_dropout"):
            if key in others:
                raise ConfigError(f"text_config.{key} is {others[key]!r}; {type(self).__name__} has no such setting")
        self._fill(named, others)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_dropout(self) -> float:
        """Dropout of attention weights, under the name that the shared layers use."""
        return self.dropout

    def to_dict(self) -> dict[str, Any]:
        """As the base class does; unscaled rotary positions are spelled out, since 4.45.2 needs a mapping to load."""
        values = super().to_dict()
        if values["rope_scaling"] is None:
            values["rope_scaling"] = {"rope_type": "default"}
        return values

    def _check(self) -> None:
        self._positive("vocab_size", "num_attention_heads", "hidden_size")
        self._number("dropout")
        if self.hidden_size % self.num_attention_heads:
            self._refuse("hidden_size", f"it does not divide by num_attention_heads {self.num_attention_heads}")
        self._check_decoder()
        layers = self.cross_attention_layers
        whole = isinstance(layers, (list, tuple)) and all(isinstance(i, int) and i >= 0 for i in layers)
        if not whole:
            self._refuse("cross_attention_layers", "it has to be a list of layer numbers")
        if self.tie_word_embeddings:
            self._refuse(
                "tie_word_embeddings",
                f"the embedding has {EXTRA_EMBEDDINGS} rows more than the head, so they cannot be one matrix",
            )


class MllamaConfig(PretrainedConfig):
    """The composite: vision model, text model, and the id that stands for an image."""

    model_type = "mllama"

    vision_config: MllamaVisionConfig
    text_config: MllamaTextConfig
    image_token_index: int

    def __init__(  # MLLAMA-CFG-001
        self,
        vision_config: MllamaVisionConfig | Mapping[str, Any] | None = None,
        text_config: MllamaTextConfig | Mapping[str, Any] | None = None,
        image_token_index: int = 128256,
        **kwargs: Any,
    ) -> None:
        others = dict(kwargs)
        kind = others.get("model_type", self.model_type)
        if kind != self.model_type:
            raise ConfigError(f"config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        others.pop("tie_word_embeddings", None)  # the text configuration decides
        if "image_token_id" in others:  # the newer name
            image_token_index = others.pop("image_token_id")
        if vision_config is None:
            vision_config = MllamaVisionConfig()  # MLLAMA-CFG-003
        elif isinstance(vision_config, Mapping):
            vision_config = MllamaVisionConfig.from_dict(vision_config)  # MLLAMA-CFG-008
        elif not isinstance(vision_config, MllamaVisionConfig):
            raise wrong_type("vision_config", vision_config, "MllamaVisionConfig")
        if text_config is None:
            text_config = MllamaTextConfig()
        elif isinstance(text_config, Mapping):
            text_config = MllamaTextConfig.from_dict(text_config)
        elif not isinstance(text_config, MllamaTextConfig):
            raise wrong_type("text_config", text_config, "MllamaTextConfig")
        named = {
            "vision_config": vision_config,
            "text_config": text_config,
            "image_token_index": image_token_index,
        }
        self._fill(named, others)

    def get_text_config(self) -> MllamaTextConfig:
        """The text part."""
        return self.text_config

    def _check(self) -> None:
        index, last = self.image_token_index, self.text_config.vocab_size + EXTRA_EMBEDDINGS - 1
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            self._refuse("image_token_index", f"it has to be a token id, at most {last}")
