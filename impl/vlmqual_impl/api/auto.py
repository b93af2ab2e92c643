"""Classes by what a checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration
from vlmqual_impl.api.idefics3_processing import Idefics3Processor
from vlmqual_impl.api.mllama import MllamaForConditionalGeneration
from vlmqual_impl.api.mllama_processing import MllamaProcessor
from vlmqual_impl.api.pretrained import PreTrainedModel
from vlmqual_impl.checkpoints import locate
from vlmqual_impl.configs import PretrainedConfig, config_for, read_config, read_json

MODELS: Mapping[str, type[PreTrainedModel]] = {
    "idefics3": Idefics3ForConditionalGeneration,
    "mllama": MllamaForConditionalGeneration,
}
PROCESSORS: Mapping[str, Any] = {"idefics3": Idefics3Processor, "mllama": MllamaProcessor}
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class AutoConfig:
    """The configuration class of a checkpoint."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PretrainedConfig:
        """Read config.json; keyword arguments override its values.

        Raises:
            ConfigError: its `model_type` is unknown.
        """
        values = read_config(pretrained_model_name_or_path)
        return config_for(values | kwargs)


class AutoModelForVision2Seq:
    """The generating model class of a checkpoint (IDEFICS3-LM-016, IDEFICS3-CARD-002)."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
        """Load a checkpoint with the class that its `model_type` names; arguments as there."""
        hub = {k: v for k, v in kwargs.items() if k in ("revision", "cache_dir", "local_files_only", "token")}
        directory = locate(pretrained_model_name_or_path, **hub)
        return MODELS[config_for(read_config(directory)).model_type].from_pretrained(directory, **kwargs)


class AutoProcessor:
    """The processor class of a checkpoint (IDEFICS3-CARD-001, MLLAMA-PROC-022)."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load the processor of a checkpoint; arguments as there.

        config.json decides where there is one, otherwise the `processor_class` of a processor file.

        Raises:
            ConfigError: config.json names no known family.
            ValueError: neither does a processor file.
        """
        hub = {k: v for k, v in kwargs.items() if k in ("revision", "cache_dir", "local_files_only", "token")}
        directory = locate(pretrained_model_name_or_path, patterns=("*.json", "*.jinja", "*.model", "*.txt"), **hub)
        if (directory / "config.json").is_file():
            return PROCESSORS[config_for(read_config(directory)).model_type].from_pretrained(directory, **kwargs)
        files = [directory / name for name in _PROCESSOR_FILES]
        named = {str(read_json(path).get("processor_class")) for path in files if path.is_file()}
        known = {kind.__name__: kind for kind in PROCESSORS.values()}
        found = [known[name] for name in sorted(named) if name in known]
        if not found:
            said = ", ".join(sorted(named)) or "not said"
            raise ValueError(f"{directory}: processor_class is {said}; known are {', '.join(known)}")
        return found[0].from_pretrained(directory, **kwargs)
