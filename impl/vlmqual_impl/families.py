"""The families that can be run: for each, what it takes to read, build, cut and execute a checkpoint of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlmqual_impl.configs import ConfigError, Idefics3Config, IdeficsConfig, MllamaConfig, PretrainedConfig
from vlmqual_impl.models import idefics, idefics3, mllama
from vlmqual_impl.runtime.eager import EagerRuntime
from vlmqual_impl.runtime.eager_idefics import IdeficsRuntime
from vlmqual_impl.runtime.eager_idefics3 import Idefics3Runtime
from vlmqual_impl.runtime.eager_mllama import MllamaRuntime
from vlmqual_impl.weights import ties_head


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: `model_type`.
        network: makes the model from its configuration.
        rename: names of checkpoint tensors that differ, see `weights.wanted_name`.
        plan: what tensor parallelism cuts, see `tp`.
        divisible: counts that tensor parallelism has to divide.
        features: documented name of the image features of a configuration.
        prompted: the processor's arguments for texts with markers and their images.
        prepared: the configuration as the checkpoint's tensors want it.
        runtime: makes the runtime of a loaded model whose attention is computed in the named way.
    """

    name: str
    network: Callable[[Any], nn.Module]
    rename: Sequence[tuple[str, str | None]]
    plan: Sequence[tuple[str, str]]
    divisible: Callable[[Any], Iterator[tuple[str, str, int, str]]]
    features: Callable[[Any], str]
    prompted: Callable[[Sequence[str], Sequence[Sequence[Any]]], dict[str, Any]]
    prepared: Callable[[Any, Mapping[str, Any], Path], PretrainedConfig]
    runtime: Callable[[Any, str], EagerRuntime]


def _beside(texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"images": images if any(images) else None, "text": texts}


def _between(texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
    from vlmqual_impl.processors_idefics import items

    return {"text": [items(text, pictures) for text, pictures in zip(texts, images, strict=True)]}


def _tied(config: Idefics3Config | IdeficsConfig, values: Mapping[str, Any], directory: Path) -> PretrainedConfig:
    return config.replace(tie_word_embeddings=ties_head(values, directory))


def _as_read(config: MllamaConfig, values: Mapping[str, Any], directory: Path) -> PretrainedConfig:
    return config


def _idefics_runtime(network: idefics.Idefics, attention: str) -> EagerRuntime:
    network.model.implementation = attention
    return IdeficsRuntime(network)


def _idefics3_runtime(network: idefics3.Idefics3, attention: str) -> EagerRuntime:
    network.model.implementation = attention
    return Idefics3Runtime(network)


def _mllama_runtime(network: mllama.Mllama, attention: str) -> EagerRuntime:
    network.implementation = attention
    return MllamaRuntime(network)


FAMILIES: Mapping[str, Family] = {
    "idefics": Family(
        name="idefics",
        network=idefics.Idefics,
        rename=idefics.RENAME,
        plan=idefics.PLAN,
        divisible=idefics.divisible,
        features=idefics.features_name,
        prompted=_between,
        prepared=_tied,
        runtime=_idefics_runtime,
    ),
    "idefics3": Family(
        name="idefics3",
        network=idefics3.Idefics3,
        rename=idefics3.RENAME,
        plan=idefics3.PLAN,
        divisible=idefics3.divisible,
        features=lambda config: "image_hidden_states",
        prompted=_beside,
        prepared=_tied,
        runtime=_idefics3_runtime,
    ),
    "mllama": Family(
        name="mllama",
        network=mllama.Mllama,
        rename=mllama.RENAME,
        plan=mllama.PLAN,
        divisible=mllama.divisible,
        features=lambda config: "cross_attention_states",
        prompted=_beside,
        prepared=_as_read,
        runtime=_mllama_runtime,
    ),
}


def family(name: str) -> Family:
    """The family of this `model_type`.

    Raises:
        ConfigError: it is not known.
    """
    if name not in FAMILIES:
        raise ConfigError(f"family {name!r} cannot be opened; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]
