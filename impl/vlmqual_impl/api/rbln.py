"""Models that are compiled for RBLN's NPUs, with the classes that the documentation of optimum-rbln describes.

They run over `rebel`, RBLN's SDK, or over its emulator where that was put in its place (`vlmqual_rebel`). Nothing here
was ever run on an NPU. Of the three families the documentation has Idefics3; the classes of the others are alike.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmqual_impl import bundle
from vlmqual_impl.api.idefics import IdeficsForVisionText2Text
from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration
from vlmqual_impl.api.mllama import MllamaForConditionalGeneration
from vlmqual_impl.api.pretrained import PreTrainedModel, parsed_dtype, read_request
from vlmqual_impl.api.rbln_config import (
    RBLNIdefics3ForConditionalGenerationConfig,
    RBLNIdeficsForVisionText2TextConfig,
    RBLNMllamaForConditionalGenerationConfig,
    RBLNModelConfig,
    RBLNVisionLanguageModelConfig,
)
from vlmqual_impl.api.rbln_programs import engine_of, fill, graphs_of, joined, planned, sdk, settled, shapes_of
from vlmqual_impl.checkpoints import locate
from vlmqual_impl.configs import PretrainedConfig, read_config, read_json
from vlmqual_impl.generate import GenerationConfig, Streamer, generate
from vlmqual_impl.recording import hollow
from vlmqual_impl.runtime.graphs import GraphRuntime
from vlmqual_impl.weights import unfilled

EMBEDDING = "text_model/embedding.safetensors"
SETTINGS = "generation_config.json"
_PREFIX = "rbln_"
_HUB = ("revision", "cache_dir", "local_files_only", "token")
_LOADING = ("config", "torch_dtype", "dtype", "low_cpu_mem_usage", "use_safetensors", "trust_remote_code", *_HUB)
_PATTERNS = ("*.json", "*.safetensors", "*.rbln")


class RBLNModel:
    """Base of the models that are compiled for RBLN's NPUs. The public ways to one are the class methods.

    Attributes:
        host: the class of the same model on the host.
        configuration: class of `rbln_config`.
        config: of the model.
        generation_config: settings of `generate`.
        rbln_config: what was compiled, and how it is run; nothing in it is left open.
        dtype: of the weights that were compiled.
        device: where tensors are wanted: on the host.
    """

    host: ClassVar[type[PreTrainedModel]]
    configuration: ClassVar[type[RBLNVisionLanguageModelConfig]]

    config: PretrainedConfig
    generation_config: GenerationConfig
    rbln_config: RBLNVisionLanguageModelConfig
    dtype: torch.dtype
    device: torch.device

    def __init__(self, folder: Path, rbln_config: RBLNVisionLanguageModelConfig) -> None:
        """Load a directory of compiled functions; `from_pretrained` and `from_model` do that.

        Args:
            folder: what `save_pretrained` wrote.
            rbln_config: options of the runtime, and settings, which have to be those of the directory.

        Raises:
            ValueError: the directory is not whole, of another class or of other versions, or a device is not there.
            ImportError: there is no SDK.
        """
        values, forms = bundle.read(folder)
        kind = type(self).__name__
        if values.get("cls_name") != kind:
            raise ValueError(f"{folder / bundle.RECORD} is of a {values.get('cls_name')}, not of a {kind}")
        self.rbln_config = joined(folder, self.configuration, values, rbln_config)
        self.dtype, self.device = parsed_dtype(str(values.get("dtype"))), torch.device("cpu")
        self.config = self.host.config_class.from_dict(read_config(folder))
        with unfilled():
            network = self.host(self.config)
        self.generation_config = network.generation_config
        if (folder / SETTINGS).is_file():
            self.generation_config = GenerationConfig.from_dict(read_json(folder / SETTINGS))
        self._folder = folder
        hollow(network, self.dtype).eval()
        graphs = graphs_of(network)
        fill(graphs.eager.table, folder / EMBEDDING)
        engine = engine_of(forms, self.rbln_config)
        self._engine = engine.name
        loaded = self.rbln_config.create_runtimes
        for entry, *mates in planned(graphs, self.rbln_config, self._example(self.config, self.rbln_config)):
            if not loaded:
                engine.prepare(entry, mates)
                continue
            engine.program(entry, mates)
            if entry.states:
                engine.new_states(entry)
        self._runtime = GraphRuntime(graphs, engine, shapes_of(self.rbln_config)) if loaded else None

    @classmethod
    def example(cls, config: Any, sides: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of one picture.

        Args:
            config: of the model.
            sides: height and width that the processor gives it.
        """
        raise NotImplementedError(f"{cls.__name__} is of no family")

    @classmethod
    def _example(cls, config: Any, compiled: RBLNVisionLanguageModelConfig) -> dict[str, Tensor]:
        return cls.example(config, compiled.vision_model.image_size or [])

    # files -----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        export: bool = False,
        rbln_config: Mapping[str, Any] | RBLNModelConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a compiled model, or compile a checkpoint.

        Args:
            model_id: a directory, or the id of a hub repository: of a compiled model, with `export` of a checkpoint.
            export: compile. Without it nothing is.
            rbln_config: settings of the compilation and of the runtime, as a dictionary or an object.
            **kwargs: with the prefix `rbln_` further settings; others as for the class on the host: `config`,
                `torch_dtype` or `dtype`, `revision`, `cache_dir`, `local_files_only`, `token`.

        Raises:
            ValueError: there is no such model, it is not whole or not compiled, or a setting is not valid.
            TypeError: a keyword is not known.
            ImportError: there is no SDK.
        """
        asked, others = cls._asked(rbln_config, kwargs)
        for key in others:
            if key not in _LOADING:
                raise TypeError(f"{cls.__name__} does not know the keyword {key!r}; it knows {', '.join(_LOADING)}")
        hub = {key: others.pop(key) for key in _HUB if key in others}
        folder = locate(model_id, patterns=_PATTERNS, **{key: value for key, value in hub.items() if value is not None})
        if not export:
            made = cls(folder, asked)
            wanted = others.get("torch_dtype") or others.get("dtype")
            if wanted not in (None, "auto") and parsed_dtype(wanted) != made.dtype:
                raise ValueError(f"{folder} was compiled in {made.dtype}; dtype {wanted!r} needs export=True")
            return made
        if (folder / bundle.RECORD).is_file():
            raise ValueError(f"{folder} holds a compiled model; export=True takes a checkpoint")
        return cls._exported(cls.host.from_pretrained(folder, **others), asked)

    @classmethod
    def from_model(
        cls, model: Any, *, rbln_config: Mapping[str, Any] | RBLNModelConfig | None = None, **kwargs: Any
    ) -> Self:
        """Compile a model that is loaded already.

        Args:
            model: of the class on the host, or of the same class of transformers.
            rbln_config: see `from_pretrained`.
            **kwargs: with the prefix `rbln_` further settings.

        Raises:
            ValueError: a setting is not valid, or the model is of another family.
            TypeError: a keyword is not known, or the model is none that can be saved.
            ImportError: there is no SDK.
        """
        asked, others = cls._asked(rbln_config, kwargs)
        for key in others:
            raise TypeError(
                f"{cls.__name__}.from_model does not know the keyword {key!r}; those with {_PREFIX} it does"
            )
        if isinstance(model, cls.host):
            return cls._exported(model, asked)
        if not hasattr(model, "save_pretrained") or not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it has to be a {cls.host.__name__}")
        with tempfile.TemporaryDirectory(prefix="vlmqual-") as folder:
            other: Any = model
            other.save_pretrained(folder)
            return cls._exported(cls.host.from_pretrained(folder, dtype=getattr(model, "dtype", None)), asked)

    @classmethod
    def _asked(
        cls, given: Mapping[str, Any] | RBLNModelConfig | None, kwargs: Mapping[str, Any]
    ) -> tuple[RBLNVisionLanguageModelConfig, dict[str, Any]]:
        """The configuration that was asked for, and the other keywords."""
        prefixed = {key.removeprefix(_PREFIX): value for key, value in kwargs.items() if key.startswith(_PREFIX)}
        others = {key: value for key, value in kwargs.items() if not key.startswith(_PREFIX)}
        if isinstance(given, cls.configuration):
            return given.changed(**prefixed), others
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"rbln_config is a {type(given).__name__}; it has to be a dictionary or a {cls.configuration.__name__}"
            )
        return cls.configuration(**{**(given or {}), **prefixed}), others

    @classmethod
    def _exported(cls, model: PreTrainedModel, asked: RBLNVisionLanguageModelConfig) -> Self:
        """Compile into a directory of its own, which lives as long as the model, and load that."""
        if model.device.type != "cpu":
            raise ValueError(f"model is on {model.device}; it is compiled from the host, move it to 'cpu'")
        config, training = settled(asked, model.config, sdk()), model.training
        folder = Path(tempfile.mkdtemp(prefix="vlmqual-rbln-"))
        try:
            cls._compile(model.eval(), config, folder)
            made = cls(folder, config)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            model.train(training)
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
        return made

    @classmethod
    def _compile(cls, model: PreTrainedModel, config: RBLNVisionLanguageModelConfig, folder: Path) -> None:
        graphs, forms = graphs_of(model), bundle.Bundle(folder)
        engine = engine_of(forms, config)
        for entry, *mates in planned(graphs, config, cls._example(model.config, config)):
            engine.prepare(entry, mates)
        name = str(model.dtype).removeprefix("torch.")
        table = {key: weight.detach().contiguous() for key, weight in graphs.eager.table.state_dict().items()}
        save_file(table, folder / EMBEDDING)
        model.config.replace(architectures=[cls.host.__name__], torch_dtype=name).save_pretrained(folder)
        forms.seal({"cls_name": cls.__name__, "dtype": name, **config.to_dict()})
        bundle.write_json(folder / SETTINGS, model.generation_config.to_dict())

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the compiled functions and configurations; `from_pretrained` loads them from wherever they lie.

        Args:
            save_directory: made, with its parents, when it is missing; other files in it stay. It holds a compiled
                model only when everything is written.

        Raises:
            ValueError: it is a file.
        """
        target = Path(save_directory)
        if target.is_dir() and target.samefile(self._folder):
            bundle.write_json(target / SETTINGS, self.generation_config.to_dict())
            return
        bundle.publish(
            self._folder, target, lambda draft: bundle.write_json(draft / SETTINGS, self.generation_config.to_dict())
        )

    # generation ------------------------------------------------------------------------------------------------------

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
        """Continue prompts; see `PreTrainedModel.generate` for arguments and result.

        Raises:
            ValueError: the model has no runtimes, a batch, prompt or image is larger than what was compiled, or a
                setting is not offered.
        """
        if self._runtime is None:
            raise ValueError(f"{type(self).__name__} was made with create_runtimes=False; it cannot run")
        tensors, features, settings = read_request(
            self.host.inputs, self.host.features, generation_config or self.generation_config, inputs, kwargs
        )
        tensors = {name: _whole(torch.as_tensor(tensor)) for name, tensor in tensors.items()}
        start = tensors["input_ids"] if "input_ids" in tensors else tensors["inputs_embeds"]
        self._check_room(start, settings)
        if seed is not None:
            if generator is not None:
                raise ValueError("seed and generator are both given; one of them is enough")
            generator = torch.Generator().manual_seed(seed)
        return generate(self._runtime, tensors, settings, features=features, generator=generator, streamer=streamer)

    def _check_room(self, start: Tensor, settings: GenerationConfig) -> None:
        rows, tokens = start.shape[:2]
        text = self.rbln_config.text_model
        if rows > text.batch_size:
            raise ValueError(f"the batch has {rows} rows; the model was compiled for batch_size {text.batch_size}")
        new = settings.new_tokens(tokens)
        if text.max_seq_len is not None and tokens + new > text.max_seq_len:
            raise ValueError(
                f"the prompt has {tokens} tokens, and {new} may follow; the model was compiled for max_seq_len "
                f"{text.max_seq_len}"
            )

    def can_generate(self) -> bool:
        """True."""
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no forward pass of its own: what was compiled keeps its cache on the device. "
            "generate runs it"
        )

    def __repr__(self) -> str:
        text = self.rbln_config.text_model
        sizes = f"batch_size {text.batch_size}, max_seq_len {text.max_seq_len}, {self.dtype}"
        return f"{type(self).__name__}({self._engine}, {sizes}, {'loaded' if self._runtime else 'not loaded'})"


class RBLNIdefics3ForConditionalGeneration(RBLNModel):
    """Idefics3: vision model, connector and language model are compiled apart; the embedding stays on the host."""

    host = Idefics3ForConditionalGeneration
    configuration = RBLNIdefics3ForConditionalGenerationConfig

    @classmethod
    def example(cls, config: Any, sides: Sequence[int]) -> dict[str, Tensor]:
        """See `RBLNModel.example`."""
        return {"pixel_values": torch.ones(1, 1, config.vision_config.num_channels, *sides)}


class RBLNMllamaForConditionalGeneration(RBLNModel):
    """Mllama, which optimum-rbln does not have; `image_slots` says with how many images a row can be run."""

    host = MllamaForConditionalGeneration
    configuration = RBLNMllamaForConditionalGenerationConfig

    @classmethod
    def example(cls, config: Any, sides: Sequence[int]) -> dict[str, Tensor]:
        """See `RBLNModel.example`."""
        vision = config.vision_config
        ones = torch.ones(1, 1, vision.max_num_tiles, dtype=torch.int64)
        pixels = torch.ones(1, 1, vision.max_num_tiles, vision.num_channels, *sides)
        return {"pixel_values": pixels, "aspect_ratio_ids": ones[:, :, 0], "aspect_ratio_mask": ones}


class RBLNIdeficsForVisionText2Text(RBLNModel):
    """Idefics, which optimum-rbln does not have; images are `pixel_values` or `image_hidden_states`."""

    host = IdeficsForVisionText2Text
    configuration = RBLNIdeficsForVisionText2TextConfig

    @classmethod
    def example(cls, config: Any, sides: Sequence[int]) -> dict[str, Tensor]:
        """See `RBLNModel.example`; another size than the model's asks for an interpolated position table."""
        vision = config.vision_config
        made = {"pixel_values": torch.ones(1, 1, vision.num_channels, *sides)}
        own = list(sides) == [vision.image_size] * 2
        return made if own else {**made, "interpolate_pos_encoding": torch.ones((), dtype=torch.int64)}


def _whole(tensor: Tensor) -> Tensor:
    """On the host; ids and masks as int64, whatever they came as."""
    return tensor.cpu() if tensor.is_floating_point() else tensor.to(device="cpu", dtype=torch.int64)
