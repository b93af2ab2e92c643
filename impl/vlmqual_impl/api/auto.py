"""Classes by what a checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmqual_impl.api.idefics import IdeficsForVisionText2Text
from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration
from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor
from vlmqual_impl.api.idefics_processing import IdeficsImageProcessor, IdeficsProcessor
from vlmqual_impl.api.mllama import MllamaForConditionalGeneration
from vlmqual_impl.api.mllama_processing import MllamaImageProcessor, MllamaProcessor
from vlmqual_impl.api.pretrained import PreTrainedModel
from vlmqual_impl.checkpoints import locate
from vlmqual_impl.configs import PretrainedConfig, config_for, read_config, read_json

MODELS: Mapping[str, type[PreTrainedModel]] = {
    "idefics": IdeficsForVisionText2Text,
    "idefics3": Idefics3ForConditionalGeneration,
    "mllama": MllamaForConditionalGeneration,
}
PROCESSORS: Mapping[str, Any] = {
    "idefics": IdeficsProcessor,
    "idefics3": Idefics3Processor,
    "mllama": MllamaProcessor,
}
IMAGE_PROCESSORS: Mapping[str, Any] = {
    "idefics": IdeficsImageProcessor,
    "idefics3": Idefics3ImageProcessor,
    "mllama": MllamaImageProcessor,
}
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
        family, directory = _processor_family(pretrained_model_name_or_path, kwargs)
        return PROCESSORS[family].from_pretrained(directory, **kwargs)


class AutoImageProcessor:
    """The image processor class of a checkpoint."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load the image processor of a checkpoint; arguments and errors as of `AutoProcessor`."""
        family, directory = _processor_family(pretrained_model_name_or_path, kwargs)
        return IMAGE_PROCESSORS[family].from_pretrained(directory, **kwargs)


def _processor_family(place: str | Path, kwargs: Mapping[str, Any]) -> tuple[str, Path]:
    """The family of a checkpoint and its directory."""
    hub = {k: v for k, v in kwargs.items() if k in ("revision", "cache_dir", "local_files_only", "token")}
    directory = locate(place, patterns=("*.json", "*.jinja", "*.model", "*.txt"), **hub)
    if (directory / "config.json").is_file():
        return config_for(read_config(directory)).model_type, directory
    files = [directory / name for name in _PROCESSOR_FILES]
    named = {str(read_json(path).get("processor_class")) for path in files if path.is_file()}
    families = {kind.__name__: family for family, kind in PROCESSORS.items()}
    found = [families[name] for name in sorted(named) if name in families]
    if not found:
        said = ", ".join(sorted(named)) or "not said"
        raise ValueError(f"{directory}: processor_class is {said}; known are {', '.join(families)}")
    return found[0], directory
