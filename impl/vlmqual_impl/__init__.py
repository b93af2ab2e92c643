"""The bundled implementation. Importing the package is cheap; torch is loaded with the first name that needs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmqual_impl.api.auto import AutoConfig, AutoImageProcessor, AutoModelForVision2Seq, AutoProcessor
    from vlmqual_impl.api.idefics import IdeficsCausalLMOutputWithPast, IdeficsForVisionText2Text
    from vlmqual_impl.api.idefics3 import (
        Idefics3BaseModelOutputWithPast,
        Idefics3CausalLMOutputWithPast,
        Idefics3ForConditionalGeneration,
        Idefics3Model,
    )
    from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor
    from vlmqual_impl.api.idefics_model import IdeficsBaseModelOutputWithPast, IdeficsModel
    from vlmqual_impl.api.idefics_processing import IdeficsImageProcessor, IdeficsProcessor
    from vlmqual_impl.api.mllama import MllamaForConditionalGeneration
    from vlmqual_impl.api.mllama_processing import MllamaImageProcessor, MllamaProcessor
    from vlmqual_impl.api.mllama_text import MllamaForCausalLM, MllamaTextModel
    from vlmqual_impl.api.mllama_vision import MllamaVisionModel
    from vlmqual_impl.api.outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput
    from vlmqual_impl.api.pretrained import PreTrainedModel
    from vlmqual_impl.api.rbln import (
        RBLNIdefics3ForConditionalGeneration,
        RBLNIdeficsForVisionText2Text,
        RBLNMllamaForConditionalGeneration,
        RBLNModel,
    )
    from vlmqual_impl.api.rbln_config import (
        RBLNCrossTextModelConfig,
        RBLNIdefics3ForConditionalGenerationConfig,
        RBLNIdeficsForVisionText2TextConfig,
        RBLNMllamaForConditionalGenerationConfig,
        RBLNModelConfig,
        RBLNTextModelConfig,
        RBLNVisionModelConfig,
    )
    from vlmqual_impl.configs import (
        Idefics3Config,
        Idefics3VisionConfig,
        IdeficsConfig,
        IdeficsPerceiverConfig,
        IdeficsVisionConfig,
        LlamaConfig,
        MllamaConfig,
        MllamaTextConfig,
        MllamaVisionConfig,
        PretrainedConfig,
    )

_HOMES = {
    "AutoConfig": "vlmqual_impl.api.auto",
    "AutoImageProcessor": "vlmqual_impl.api.auto",
    "AutoModelForVision2Seq": "vlmqual_impl.api.auto",
    "AutoProcessor": "vlmqual_impl.api.auto",
    "BaseModelOutput": "vlmqual_impl.api.outputs",
    "BaseModelOutputWithPast": "vlmqual_impl.api.outputs",
    "CausalLMOutputWithPast": "vlmqual_impl.api.outputs",
    "Idefics3BaseModelOutputWithPast": "vlmqual_impl.api.idefics3",
    "Idefics3CausalLMOutputWithPast": "vlmqual_impl.api.idefics3",
    "Idefics3Config": "vlmqual_impl.configs",
    "Idefics3ForConditionalGeneration": "vlmqual_impl.api.idefics3",
    "Idefics3ImageProcessor": "vlmqual_impl.api.idefics3_processing",
    "Idefics3Model": "vlmqual_impl.api.idefics3",
    "Idefics3Processor": "vlmqual_impl.api.idefics3_processing",
    "Idefics3VisionConfig": "vlmqual_impl.configs",
    "IdeficsBaseModelOutputWithPast": "vlmqual_impl.api.idefics_model",
    "IdeficsCausalLMOutputWithPast": "vlmqual_impl.api.idefics",
    "IdeficsConfig": "vlmqual_impl.configs",
    "IdeficsForVisionText2Text": "vlmqual_impl.api.idefics",
    "IdeficsImageProcessor": "vlmqual_impl.api.idefics_processing",
    "IdeficsModel": "vlmqual_impl.api.idefics_model",
    "IdeficsPerceiverConfig": "vlmqual_impl.configs",
    "IdeficsProcessor": "vlmqual_impl.api.idefics_processing",
    "IdeficsVisionConfig": "vlmqual_impl.configs",
    "LlamaConfig": "vlmqual_impl.configs",
    "MllamaConfig": "vlmqual_impl.configs",
    "MllamaForCausalLM": "vlmqual_impl.api.mllama_text",
    "MllamaForConditionalGeneration": "vlmqual_impl.api.mllama",
    "MllamaImageProcessor": "vlmqual_impl.api.mllama_processing",
    "MllamaProcessor": "vlmqual_impl.api.mllama_processing",
    "MllamaTextConfig": "vlmqual_impl.configs",
    "MllamaTextModel": "vlmqual_impl.api.mllama_text",
    "MllamaVisionConfig": "vlmqual_impl.configs",
    "MllamaVisionModel": "vlmqual_impl.api.mllama_vision",
    "ModelOutput": "vlmqual_impl.api.outputs",
    "PreTrainedModel": "vlmqual_impl.api.pretrained",
    "PretrainedConfig": "vlmqual_impl.configs",
    "RBLNCrossTextModelConfig": "vlmqual_impl.api.rbln_config",
    "RBLNIdefics3ForConditionalGeneration": "vlmqual_impl.api.rbln",
    "RBLNIdefics3ForConditionalGenerationConfig": "vlmqual_impl.api.rbln_config",
    "RBLNIdeficsForVisionText2Text": "vlmqual_impl.api.rbln",
    "RBLNIdeficsForVisionText2TextConfig": "vlmqual_impl.api.rbln_config",
    "RBLNMllamaForConditionalGeneration": "vlmqual_impl.api.rbln",
    "RBLNMllamaForConditionalGenerationConfig": "vlmqual_impl.api.rbln_config",
    "RBLNModel": "vlmqual_impl.api.rbln",
    "RBLNModelConfig": "vlmqual_impl.api.rbln_config",
    "RBLNTextModelConfig": "vlmqual_impl.api.rbln_config",
    "RBLNVisionModelConfig": "vlmqual_impl.api.rbln_config",
}

__all__ = [
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "BaseModelOutput",
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "Idefics3BaseModelOutputWithPast",
    "Idefics3CausalLMOutputWithPast",
    "Idefics3Config",
    "Idefics3ForConditionalGeneration",
    "Idefics3ImageProcessor",
    "Idefics3Model",
    "Idefics3Processor",
    "Idefics3VisionConfig",
    "IdeficsBaseModelOutputWithPast",
    "IdeficsCausalLMOutputWithPast",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsImageProcessor",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsProcessor",
    "IdeficsVisionConfig",
    "LlamaConfig",
    "MllamaConfig",
    "MllamaForCausalLM",
    "MllamaForConditionalGeneration",
    "MllamaImageProcessor",
    "MllamaProcessor",
    "MllamaTextConfig",
    "MllamaTextModel",
    "MllamaVisionConfig",
    "MllamaVisionModel",
    "ModelOutput",
    "PreTrainedModel",
    "PretrainedConfig",
    "RBLNCrossTextModelConfig",
    "RBLNIdefics3ForConditionalGeneration",
    "RBLNIdefics3ForConditionalGenerationConfig",
    "RBLNIdeficsForVisionText2Text",
    "RBLNIdeficsForVisionText2TextConfig",
    "RBLNMllamaForConditionalGeneration",
    "RBLNMllamaForConditionalGenerationConfig",
    "RBLNModel",
    "RBLNModelConfig",
    "RBLNTextModelConfig",
    "RBLNVisionModelConfig",
]


def __getattr__(name: str) -> Any:  # IDEFICS3-CFG-022
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
