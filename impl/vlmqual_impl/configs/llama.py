"""The Llama text model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmqual_impl.configs.base import ACTIVATIONS, ROPE_TYPES, ConfigError, PretrainedConfig


class DecoderConfig(PretrainedConfig):
    """What Llama-like text configurations share: grouped heads and the scaling of rotary positions."""

    nested = "text_config"

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None

    def _named_rope(self, theta: float, scaling: Any, others: dict[str, Any]) -> dict[str, Any]:
        """Base and scaling from either layout; 5.x holds both in `rope_parameters`, which is taken out of `others`."""
        parameters = others.pop("rope_parameters", None)
        if not parameters:
            return {"rope_theta": theta, "rope_scaling": scaling}
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"{self._title()}.rope_parameters is {parameters!r}; it has to be a mapping")
        given = parameters.get("rope_theta")
        rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
        return {
            "rope_theta": theta if given is None else given,
            "rope_scaling": None if rest.get("rope_type", "default") == "default" else rest,
        }

    def rope(self) -> dict[str, Any]:
        """The rotary scaling as a mapping with `rope_type`, the spelling `type` of older files included."""
        scaling = dict(self.rope_scaling or {})
        kind = scaling.pop("type", None)
        return {"rope_type": kind or "default"} | scaling

    def _check_decoder(self) -> None:
        self._positive("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self._positive("num_key_value_heads", "head_dim", "max_position_embeddings")
        self._number("rms_norm_eps", "rope_theta")
        if not isinstance(self.rope_scaling, (Mapping, type(None))):
            self._refuse("rope_scaling", "it has to be a mapping")
        if self.num_attention_heads % self.num_key_value_heads:
            rule = f"it does not divide by num_key_value_heads {self.num_key_value_heads}"
            self._refuse("num_attention_heads", rule)
        if self.head_dim % 2:
            self._refuse("head_dim", "rotary embedding needs an even number")
        if self.hidden_act not in ACTIVATIONS:
            self._refuse("hidden_act", f"known activations are {', '.join(ACTIVATIONS)}")
        rope = self.rope()
        if rope["rope_type"] not in ROPE_TYPES:
            self._refuse("rope_scaling", f"its rope_type has to be one of {', '.join(ROPE_TYPES)}")
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }[rope["rope_type"]]
        missing = [key for key in needed if not isinstance(rope.get(key), (int, float))]
        if missing:
            self._refuse("rope_scaling", f"rope_type {rope['rope_type']!r} needs numbers for {', '.join(missing)}")


class LlamaConfig(DecoderConfig):
    """The text model."""

    model_type = "llama"

    vocab_size: int
    initializer_range: float
    use_cache: bool
    attention_bias: bool
    attention_dropout: float
    mlp_bias: bool
    head_dim: int

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pretraining_tp: int = 1,
        tie_word_embeddings: bool = False,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        head_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        named = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        kind = kwargs.get("model_type", self.model_type)
        if kind != self.model_type:
            raise ConfigError(f"text_config.model_type is {kind!r}; {type(self).__name__} reads {self.model_type!r}")
        if num_key_value_heads is None:
            named["num_key_value_heads"] = num_attention_heads
        if head_dim is None and isinstance(hidden_size, int) and isinstance(num_attention_heads, int):
            named["head_dim"] = hidden_size // max(num_attention_heads, 1)
        others = dict(kwargs)
        named |= self._named_rope(rope_theta, rope_scaling, others)
        self._fill(named, others)

    def _check(self) -> None:
        self._positive("vocab_size", "pretraining_tp")
        self._number("attention_dropout")
        self._check_decoder()
