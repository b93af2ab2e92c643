"""The bundled implementation. Importing the package is cheap; torch is loaded with the first name that needs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmqual_impl.api.idefics3 import (
        Idefics3BaseModelOutputWithPast,
        Idefics3CausalLMOutputWithPast,
        Idefics3ForConditionalGeneration,
        Idefics3Model,
    )
    from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor
    from vlmqual_impl.api.pretrained import (
        AutoConfig,
        AutoModelForVision2Seq,
        AutoProcessor,
        ModelOutput,
        PreTrainedModel,
    )
    from vlmqual_impl.configs import Idefics3Config, Idefics3VisionConfig, LlamaConfig, PretrainedConfig

_HOMES = {
    "AutoConfig": "vlmqual_impl.api.pretrained",
    "AutoModelForVision2Seq": "vlmqual_impl.api.pretrained",
    "AutoProcessor": "vlmqual_impl.api.pretrained",
    "Idefics3BaseModelOutputWithPast": "vlmqual_impl.api.idefics3",
    "Idefics3CausalLMOutputWithPast": "vlmqual_impl.api.idefics3",
    "Idefics3Config": "vlmqual_impl.configs",
    "Idefics3ForConditionalGeneration": "vlmqual_impl.api.idefics3",
    "Idefics3ImageProcessor": "vlmqual_impl.api.idefics3_processing",
    "Idefics3Model": "vlmqual_impl.api.idefics3",
    "Idefics3Processor": "vlmqual_impl.api.idefics3_processing",
    "Idefics3VisionConfig": "vlmqual_impl.configs",
    "LlamaConfig": "vlmqual_impl.configs",
    "ModelOutput": "vlmqual_impl.api.pretrained",
    "PreTrainedModel": "vlmqual_impl.api.pretrained",
    "PretrainedConfig": "vlmqual_impl.configs",
}

__all__ = [
    "AutoConfig",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "Idefics3BaseModelOutputWithPast",
    "Idefics3CausalLMOutputWithPast",
    "Idefics3Config",
    "Idefics3ForConditionalGeneration",
    "Idefics3ImageProcessor",
    "Idefics3Model",
    "Idefics3Processor",
    "Idefics3VisionConfig",
    "LlamaConfig",
    "ModelOutput",
    "PreTrainedModel",
    "PretrainedConfig",
]


def __getattr__(name: str) -> Any:  # IDEFICS3-CFG-022
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
