"""Configurations as config.json spells them. Defaults are those of the documented version; objects are frozen.

Two layouts are read: the one that transformers 4.45 and 4.46 write (`rope_theta`, `rope_scaling`, `torch_dtype`) and
the one of 5.x (`rope_parameters`, `dtype`, ...). The first is what is written, because all versions read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmqual_impl.configs.base import (
    ACTIVATIONS,
    ROPE_TYPES,
    ConfigError,
    PretrainedConfig,
    read_config,
    read_json,
)
from vlmqual_impl.configs.idefics import IdeficsConfig, IdeficsPerceiverConfig, IdeficsVisionConfig
from vlmqual_impl.configs.idefics3 import Idefics3Config, Idefics3VisionConfig
from vlmqual_impl.configs.llama import LlamaConfig
from vlmqual_impl.configs.mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

__all__ = [
    "ACTIVATIONS",
    "CONFIGS",
    "ROPE_TYPES",
    "ConfigError",
    "Idefics3Config",
    "Idefics3VisionConfig",
    "IdeficsConfig",
    "IdeficsPerceiverConfig",
    "IdeficsVisionConfig",
    "LlamaConfig",
    "MllamaConfig",
    "MllamaTextConfig",
    "MllamaVisionConfig",
    "PretrainedConfig",
    "config_for",
    "read_config",
    "read_json",
]

CONFIGS: Mapping[str, type[PretrainedConfig]] = {
    "idefics": IdeficsConfig,
    "idefics3": Idefics3Config,
    "mllama": MllamaConfig,
}


def config_for(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration object of a config.json mapping, by its `model_type`.

    Raises:
        ConfigError: `model_type` is missing or unknown.
    """
    kind = str(values.get("model_type"))
    if kind not in CONFIGS:
        raise ConfigError(f"config.model_type is {kind!r}; known model types are {', '.join(CONFIGS)}")
    return CONFIGS[kind].from_dict(values)
