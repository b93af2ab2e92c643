"""What all documented model classes share: files, dtype and device, embeddings, generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlmqual_impl import weights
from vlmqual_impl.checkpoints import locate
from vlmqual_impl.configs import PretrainedConfig, read_config, read_json
from vlmqual_impl.generate import GenerationConfig, Streamer, generate, with_defaults
from vlmqual_impl.runtime.base import Runtime

ATTENTION = ("eager", "sdpa")


class PreTrainedModel(nn.Module):
    """Base of the documented model classes."""

    config_class: ClassVar[type[PretrainedConfig]] = PretrainedConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    rename: ClassVar[tuple[tuple[str, str | None], ...]] = ()
    may_tie: ClassVar[bool] = True  # the head can be the embedding's matrix
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
    features: ClassVar[str] = ""  # documented name of image features, where there are any

    config: PretrainedConfig
    generation_config: GenerationConfig

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point parameters."""
        return next(parameter.dtype for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; shared ones count once."""
        tables = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        skip = {id(table) for table in tables} if exclude_embeddings else set()
        chosen = [p for p in self.parameters() if id(p) not in skip and (p.requires_grad or not only_trainable)]
        return sum(parameter.numel() for parameter in chosen)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        raise NotImplementedError(f"{type(self).__name__} has no token embedding")

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language model head, None where there is none."""
        return None

    def can_generate(self) -> bool:
        """True when there is a language model head."""
        return self.get_output_embeddings() is not None

    def set_attention(self, implementation: str) -> None:
        """Choose how attention is computed.

        Raises:
            ValueError: the name is not known.
        """
        if implementation not in ATTENTION:
            raise ValueError(f"attn_implementation {implementation!r} is not offered; valid are {', '.join(ATTENTION)}")
        self._set_attention(implementation)

    def _set_attention(self, implementation: str) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no attention to choose")

    def runtime(self) -> Runtime:
        """This model, ready to run.

        Raises:
            ValueError: there is no language model head.
        """
        raise ValueError(f"{type(self).__name__} has no language model head; it cannot generate")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights: normal with the configuration's deviation, biases 0, norms 1."""
        deviation = float(getattr(self.config, "text_config", self.config).initializer_range)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, deviation)
                bias = getattr(module, "bias", None)
                if bias is not None:
                    nn.init.zeros_(bias)

    # --------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Self:
        """A model with random weights; `torch_dtype` or `dtype` and `attn_implementation` as in `from_pretrained`."""
        chosen = _options(cls.__name__, kwargs)
        model = cls(config)
        dtype = parsed_dtype(chosen.get("torch_dtype", chosen.get("dtype")), torch.float32)
        _attention(model, chosen)
        return model.to(device=_device(chosen), dtype=dtype)

    _from_config = from_config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: PretrainedConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint: safetensors in one file or in shards, as transformers 4.46 and 5.x write it.

        Args:
            pretrained_model_name_or_path: a directory, or the id of a hub repository.
            config: used in place of config.json.
            torch_dtype: dtype of the parameters, its name, or "auto" for the stored one; float32 by default.
            dtype: newer name of `torch_dtype`.
            **kwargs: `device` or `device_map` (a device or "auto"), `attn_implementation` or `_attn_implementation`
                ("eager", "sdpa"), `revision`, `cache_dir`, `local_files_only`, `token`, `low_cpu_mem_usage`,
                `use_safetensors` and `trust_remote_code` (the last three are accepted; loading is always so).

        Raises:
            ConfigError: config.json cannot be read or names another `model_type`.
            CheckpointError: there is no such checkpoint, or its tensors do not fit.
            TypeError: an unknown keyword.
        """
        chosen = _options(cls.__name__, kwargs)
        hub = {key: chosen[key] for key in ("revision", "cache_dir", "local_files_only", "token") if key in chosen}
        directory = locate(pretrained_model_name_or_path, **hub)
        if config is None:
            values = read_config(directory)
            config = cls.config_class.from_dict(values)
            if cls.may_tie and weights.ties_head(values, directory) != config.tie_word_embeddings:
                config = config.replace(tie_word_embeddings=not config.tie_word_embeddings)
        asked = torch_dtype if torch_dtype is not None else dtype
        if asked == "auto":
            asked = config.torch_dtype or weights.stored_dtype(directory)
        with weights.unfilled():
            model = cls(config)
        weights.load(
            model,
            directory,
            rename=cls.rename,
            dtype=parsed_dtype(asked, torch.float32),  # IDEFICS3-LM-017
            device=_device(chosen),
        )
        _attention(model, chosen)
        settings = directory / "generation_config.json"
        if settings.is_file():
            model.generation_config = GenerationConfig.from_dict(read_json(settings))
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write config.json, generation_config.json and the weights so that transformers 4.46 and 5.x load them.

        Args:
            save_directory: made when it is missing.
            max_shard_size: bytes, or a text such as "5GB"; what is larger is split.
        """
        directory = Path(save_directory)
        name = str(self.dtype).removeprefix("torch.")
        config = self.config.replace(architectures=[type(self).__name__], torch_dtype=name)
        weights.save(self, directory, max_shard_size)
        config.save_pretrained(directory)
        if self.can_generate():
            text = json.dumps(self.generation_config.to_dict(), indent=2, sort_keys=True)
            (directory / "generation_config.json").write_text(text + "\n", encoding="utf-8")

    # ---------------------------------------------------------------------------------------------- vocabulary

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Change the number of embedding rows, and of the head's; rows that stay keep their values.

        Raises:
            ValueError: the number is not positive.
        """
        table = self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == table.num_embeddings:
            return table
        if new_num_tokens < 1:
            raise ValueError(f"new_num_tokens is {new_num_tokens}; it has to be positive")
        head = self.get_output_embeddings()
        shared = head is not None and head.weight is table.weight
        weight = self._resized(table.weight, new_num_tokens)
        table.weight, table.num_embeddings = weight, new_num_tokens
        if head is not None:
            head.weight = weight if shared else self._resized(head.weight, new_num_tokens)
            head.out_features = new_num_tokens
        text = getattr(self.config, "text_config", None)
        if text is None:
            self._set_config(self.config.replace(vocab_size=new_num_tokens))
        else:
            self._set_config(self.config.replace(text_config=text.replace(vocab_size=new_num_tokens)))
        return table

    def _set_config(self, config: PretrainedConfig) -> None:
        self.config = config

    @torch.no_grad()
    def _resized(self, old: Tensor, rows: int) -> nn.Parameter:
        deviation = float(getattr(self.config, "text_config", self.config).initializer_range)
        new = torch.empty((rows, old.shape[1]), dtype=old.dtype, device=old.device).normal_(0.0, deviation)
        kept = min(rows, old.shape[0])
        new[:kept] = old[:kept]
        return nn.Parameter(new, requires_grad=old.requires_grad)

    # ----------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        streamer: Streamer | Callable[[Tensor], object] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue prompts, greedily or by sampling.

        Args:
            inputs: `input_ids` by position.
            generation_config: settings in place of generation_config.json's.
            generator: source of randomness.
            seed: makes a generator of its own.
            streamer: object with `put` and `end`, or a function of the (B,) ids of every step.
            **kwargs: the model's inputs (`input_ids`, `attention_mask`, `pixel_values`, ...) and settings
                (`max_new_tokens`, `max_length`, `do_sample`, `temperature`, `top_k`, `top_p`, `eos_token_id`, ...).

        Returns:
            (B, S + new) int64: prompt and continuation (IDEFICS3-LM-019).

        Raises:
            ValueError: an unknown or unoffered setting, or inputs that do not fit.
        """
        base = generation_config or self.generation_config
        tensors, features, settings = read_request(self.inputs, self.features, base, inputs, kwargs)
        if seed is not None:
            if generator is not None:
                raise ValueError("seed and generator are both given; one of them is enough")
            generator = torch.Generator(device=self.device).manual_seed(seed)
        was_training = self.training
        self.eval()
        try:
            return generate(
                self.runtime(), tensors, settings, features=features, generator=generator, streamer=streamer
            )
        finally:
            self.train(was_training)


def read_request(
    names: Sequence[str],
    features_name: str,
    base: GenerationConfig,
    inputs: Tensor | None,
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, Tensor], Tensor | None, GenerationConfig]:
    """What `generate` was given.

    Args:
        names: the model's inputs.
        features_name: documented name of image features, "" where there are none.
        base: settings that `kwargs` change.
        inputs: `input_ids` by position.
        kwargs: inputs and settings.

    Returns:
        inputs that are not None, image features, settings.

    Raises:
        ValueError: there are no tokens, images are given twice, or a setting is not known or not offered.
    """
    rest = dict(kwargs)
    given = {key: rest.pop(key) for key in names if key in rest}
    tensors = {key: value for key, value in given.items() if value is not None}
    features = rest.pop(features_name, None) if features_name else None
    if inputs is not None:
        tensors["input_ids"] = inputs
    if "input_ids" not in tensors and "inputs_embeds" not in tensors:
        raise ValueError("generate needs input_ids or inputs_embeds")
    if features is not None and "pixel_values" in tensors:
        raise ValueError(f"pixel_values and {features_name} are both given; one of them is enough")
    return tensors, features, base.changed(rest)


def default_generation(config: PretrainedConfig) -> GenerationConfig:
    """Settings of a model that has no generation_config.json: greedy, with the configuration's special ids."""
    return with_defaults(GenerationConfig(others={"_from_model_config": True}), **_token_ids(config))


def _token_ids(config: PretrainedConfig) -> dict[str, Any]:
    text = getattr(config, "text_config", config)
    ids = {key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = config.pad_token_id
    return ids


_KEYWORDS = (
    "torch_dtype",
    "dtype",
    "device",
    "device_map",
    "attn_implementation",
    "_attn_implementation",  # IDEFICS3-CARD-013
    "revision",
    "cache_dir",
    "local_files_only",
    "token",
    "low_cpu_mem_usage",
    "use_safetensors",
    "trust_remote_code",
)


def _options(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    for key in kwargs:
        if key not in _KEYWORDS:
            raise TypeError(f"{name} does not know the keyword {key!r}; it knows {', '.join(_KEYWORDS)}")
    return {key: value for key, value in kwargs.items() if value is not None}


def parsed_dtype(value: torch.dtype | str | None, default: torch.dtype = torch.float32) -> torch.dtype:
    """A floating-point dtype or its name; the default for None.

    Raises:
        ValueError: it is neither.
    """
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if found is None and value is None:
        return default
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {value!r} is not known; valid are float64, float32, bfloat16, float16")
    return found


def _device(chosen: Mapping[str, Any]) -> torch.device:
    value = chosen.get("device", chosen.get("device_map", "cpu"))
    if value == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(value, (str, int, torch.device)):
        return torch.device(value)
    raise ValueError(f"device_map {value!r} is not offered; a model stands on one device")


def _attention(model: PreTrainedModel, chosen: Mapping[str, Any]) -> None:
    name = chosen.get("attn_implementation", chosen.get("_attn_implementation"))
    if name is not None:
        model.set_attention(name)
