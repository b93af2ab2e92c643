"""Configurations as config.json spells them. Defaults are those of the documented version; objects are frozen.

Two layouts are read: the one that transformers 4.46 writes (`rope_theta`, `rope_scaling`, `torch_dtype`) and the one of
5.x (`rope_parameters`, `dtype`, `_pad_token_id`, vision `model_type` "idefics3_vision"). The first is what is written,
because both versions read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from vlmqual_impl.checkpoints import locate

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
ROPE_TYPES = ("default", "linear", "llama3")

# Keys that the reference writes into every config.json and that no model of ours reads: generation settings of old,
# bookkeeping of pipelines. They are kept as attributes, but reporting them as unknown would only be noise.
_BOOKKEEPING = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers_version typical_p use_bfloat16
    """.split()  # noqa: SIM905  # a list of seventy lines says no more
)


class ConfigError(ValueError):
    """A configuration that cannot be read or does not fit together: one sentence that names key and value."""


class PretrainedConfig:
    """Base of all configurations: named values, unknown ones kept beside them, files, and frozen once made.

    Attributes:
        output_hidden_states: default of the model's argument of that name.
        output_attentions: default of the model's argument of that name.
        return_dict: default of the model's argument of that name.
        tie_word_embeddings: the language model head shares the input embedding's matrix.
        torch_dtype: name of the dtype that the checkpoint was saved in, or None.
        architectures: class names that the checkpoint was saved from, or None.
    """

    model_type: ClassVar[str] = ""
    nested: ClassVar[str] = ""  # key under which a composite config.json holds this configuration

    output_hidden_states: bool
    output_attentions: bool
    return_dict: bool
    tie_word_embeddings: bool
    torch_dtype: str | None
    architectures: list[str] | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None

    def __init__(self, **kwargs: Any) -> None:
        self._fill({}, kwargs)

    def _fill(self, named: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        """Store the named values, the common ones, and whatever else was given; then freeze."""
        rest = dict(others)
        rest.pop("model_type", None)
        values: dict[str, Any] = {
            "output_hidden_states": False,
            "output_attentions": False,
            "return_dict": True,
            "tie_word_embeddings": False,
            "architectures": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        dtype = rest.pop("torch_dtype", None) or rest.pop("dtype", None)
        rest.pop("dtype", None)
        values["torch_dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        values |= named
        read = frozenset(values)
        values |= {key: value for key, value in rest.items() if key not in named}
        for key, value in values.items():
            object.__setattr__(self, key, value)
        object.__setattr__(self, "_read", read)
        self._check()
        object.__setattr__(self, "_frozen", True)

    def _check(self) -> None:
        """Refuse values that do not fit together."""

    def _refuse(self, key: str, rule: str) -> NoReturn:
        raise ConfigError(f"{self._title()}.{key} is {getattr(self, key)!r}; {rule}")

    def _title(self) -> str:
        return self.nested or self.model_type or type(self).__name__

    def _positive(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                self._refuse(key, "it has to be a positive integer")

    def _number(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                self._refuse(key, "it has to be a number of at least 0")

    def __setattr__(self, key: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            raise AttributeError(f"{type(self).__name__} is frozen; replace({key}={value!r}) gives a changed copy")
        object.__setattr__(self, key, value)

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; {key} cannot be deleted")

    def __getattr__(self, key: str) -> Any:
        # Only reached when nothing of this name is stored; typed as Any because unknown keys become attributes.
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {key!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and type(self) is type(other) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json_string())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def use_return_dict(self) -> bool:
        """Name under which the reference's models read `return_dict`."""
        return self.return_dict

    def unknown(self) -> tuple[str, ...]:
        """Keys that were given, are kept as attributes, and are read by nothing here."""
        stored = {key for key in vars(self) if key not in ("_frozen", "_read")}
        return tuple(sorted(stored - self._read - _BOOKKEEPING))

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed."""
        values = {key: value for key, value in vars(self).items() if key not in ("_frozen", "_read")}
        return type(self)(**(values | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested configurations as mappings, with `model_type`."""
        values: dict[str, Any] = {}
        for key, value in vars(self).items():
            if key in ("_frozen", "_read"):
                continue
            values[key] = value.to_dict() if isinstance(value, PretrainedConfig) else _plain(value)
        values["model_type"] = self.model_type
        return values

    def to_json_string(self) -> str:
        """What `save_pretrained` writes: sorted keys, two blanks of indentation."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n"

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json into a directory, which is made when it is missing."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Make a configuration from a mapping as config.json holds it; keyword arguments override it.

        Raises:
            ConfigError: `model_type` names another model, or a value does not fit.
        """
        values = dict(config_dict)
        kind = values.get("model_type", cls.model_type)
        if kind != cls.model_type and cls.nested and isinstance(values.get(cls.nested), Mapping):
            values = dict(values[cls.nested])
            kind = values.get("model_type", cls.model_type)
        if cls.model_type and kind not in cls._accepted():
            raise ConfigError(
                f"{cls.nested or 'config'}.model_type is {kind!r}; {cls.__name__} reads {cls.model_type!r}"
            )
        return cls(**(values | kwargs))

    @classmethod
    def _accepted(cls) -> tuple[str, ...]:
        return (cls.model_type,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read config.json of a directory (or the file itself, or a hub id); keyword arguments override its values.

        Raises:
            ConfigError: there is no such file, it is no JSON object, or a value does not fit.
        """
        return cls.from_dict(read_config(pretrained_model_name_or_path), **kwargs)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ConfigError: the file is missing, no UTF-8, no JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_config(place: str | Path) -> dict[str, Any]:
    """The mapping in config.json of a directory, of a file that is config.json itself, or of a hub id."""
    path = Path(place)
    if path.is_file():
        return read_json(path)
    if not path.is_dir():
        path = locate(str(place), patterns=("config.json",))
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: there is no config.json in this directory")
    return read_json(path / "config.json")


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


class LlamaConfig(PretrainedConfig):
    """The text model."""

    model_type = "llama"
    nested = "text_config"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    use_cache: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None
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
        parameters = others.pop("rope_parameters", None)
        if parameters:  # the layout of 5.x: base and scaling in one mapping
            named["rope_theta"] = parameters.get("rope_theta", rope_theta)
            scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
            named["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        self._fill(named, others)

    def rope(self) -> dict[str, Any]:
        """The rotary scaling as a mapping with `rope_type`, the spelling `type` of older files included."""
        scaling = dict(self.rope_scaling or {})
        kind = scaling.pop("type", None)
        return {"rope_type": kind or "default"} | scaling

    def _check(self) -> None:
        self._positive("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self._positive("num_key_value_heads", "head_dim", "max_position_embeddings", "pretraining_tp")
        self._number("rms_norm_eps", "rope_theta", "attention_dropout")
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(getattr(self, key, None), (Mapping, type(None))):
                self._refuse(key, "it has to be a mapping")
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
            raise _wrong_type("vision_config", vision_config, "Idefics3VisionConfig")
        if text_config is None:  # IDEFICS3-CFG-010; the epsilon is the documented version's
            text_config = LlamaConfig(rms_norm_eps=1e-5, pad_token_id=pad_token_id, tie_word_embeddings=False)
        elif isinstance(text_config, Mapping):
            text_config = LlamaConfig.from_dict(text_config)  # IDEFICS3-CFG-013
        elif not isinstance(text_config, LlamaConfig):
            raise _wrong_type("text_config", text_config, "LlamaConfig")
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


def _wrong_type(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{key} is a {type(value).__name__}; expected {expected}, a mapping or None")


CONFIGS: Mapping[str, type[PretrainedConfig]] = {"idefics3": Idefics3Config}


def config_for(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration object of a config.json mapping, by its `model_type`.

    Raises:
        ConfigError: `model_type` is missing or unknown.
    """
    kind = str(values.get("model_type"))
    if kind not in CONFIGS:
        raise ConfigError(f"config.model_type is {kind!r}; known model types are {', '.join(CONFIGS)}")
    return CONFIGS[kind].from_dict(values)
