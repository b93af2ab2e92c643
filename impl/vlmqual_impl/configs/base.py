"""What all configurations share: named values, unknown ones kept beside them, files, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from vlmqual_impl.checkpoints import locate

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "selu", "silu")
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


def wrong_type(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{key} is a {type(value).__name__}; expected {expected}, a mapping or None")
