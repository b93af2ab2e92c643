"""What the RBLN classes compile and load: plan, settings, and RBLN's SDK."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmqual_impl.api.pretrained import PreTrainedModel
from vlmqual_impl.api.rbln_config import CHUNK, CHUNK_CR, RBLNVisionLanguageModelConfig
from vlmqual_impl.bundle import Bundle
from vlmqual_impl.entries import Entry
from vlmqual_impl.graphs import GRAPHS, Graphs
from vlmqual_impl.runtime.graphs import Shapes, text_entries
from vlmqual_impl.runtime.rebel_engine import RebelEngine

MAX_SEQ_LEN = 2048  # of a model that does not say


def planned(graphs: Graphs, config: RBLNVisionLanguageModelConfig, example: Mapping[str, Tensor]) -> list[list[Entry]]:
    """What is compiled: lists of entries, those with states together with all that share them.

    Raises:
        ValueError: the model's vision does not take such pictures.
    """
    tower = graphs.vision(graphs.pictures(example)[0])
    made, states = [[tower]], tower.outputs[0].shape[1]
    for following in (graphs.connector, graphs.cross):
        entry = following(states)
        if entry is not None:
            made.append([entry])
        if following == graphs.connector and entry is not None:
            states = entry.outputs[0].shape[1]
    shapes = shapes_of(config)
    made.append(
        [entry for n in shapes.images or (0,) for entry in text_entries(graphs, shapes, shapes.rows[-1], n * states)]
    )
    return made


def shapes_of(config: RBLNVisionLanguageModelConfig) -> Shapes:
    """The fixed shapes of a compiled model.

    Raises:
        ValueError: its configuration leaves some open.
    """
    text = config.text_model
    if text.prefill_chunk_size is None or text.max_seq_len is None or text.decoder_batch_sizes is None:
        raise ValueError("text_model of a compiled model has to name max_seq_len, prefill_chunk_size and its rows")
    images = tuple(getattr(text, "image_slots", ()))
    return Shapes(text.prefill_chunk_size, text.max_seq_len, tuple(sorted(text.decoder_batch_sizes)), images)


def settled(asked: RBLNVisionLanguageModelConfig, config: Any, rebel: Any) -> RBLNVisionLanguageModelConfig:
    """The configuration with what was left open.

    Raises:
        ValueError: there is no NPU whose name could be taken.
    """
    text, vision = asked.text_model, asked.vision_model
    first = (*text.devices, *asked.devices, 0)[0]
    npu = asked.npu or rebel.get_npu_name(first) or rebel.get_npu_name(0)
    if not npu:
        raise ValueError("npu is not given, and there is no NPU here whose name could be taken; one is 'RBLN-CA25'")
    limits = getattr(config, "text_config", config)
    sizes = text.changed(
        max_seq_len=text.max_seq_len or getattr(limits, "max_position_embeddings", MAX_SEQ_LEN),
        prefill_chunk_size=text.prefill_chunk_size or (CHUNK_CR if "RBLN-CR" in npu else CHUNK),
        decoder_batch_sizes=text.decoder_batch_sizes or [text.batch_size],
    )
    sides = vision.image_size or [config.vision_config.image_size] * 2
    return asked.changed(npu=npu, text_model=sizes, vision_model=vision.changed(image_size=sides))


def joined(
    folder: Path,
    kind: type[RBLNVisionLanguageModelConfig],
    values: Mapping[str, Any],
    asked: RBLNVisionLanguageModelConfig,
) -> RBLNVisionLanguageModelConfig:
    """The settings of a compiled model with the options that were asked for now.

    Raises:
        ValueError: another setting was asked for.
    """
    saved = kind(**{name: values[name] for name in kind.settings if name in values})
    pairs = [("", asked, saved)]
    pairs += [(f"{part}.", getattr(asked, part), getattr(saved, part)) for part in kind.submodules]
    options: dict[str, Any] = {}
    for prefix, wanted, found in pairs:
        names = set(wanted.settings) - set(kind.submodules) - ({"batch_size"} if prefix else set())
        for name in sorted(names & set(wanted.given)):
            if getattr(wanted, name) != getattr(found, name):
                raise ValueError(
                    f"{folder}: {prefix}{name} is {getattr(found, name)!r} in this compiled model; "
                    f"{getattr(wanted, name)!r} needs export=True"
                )
        given = {name: wanted.given[name] for name in wanted.options if name in wanted.given}
        if prefix:
            options[prefix.rstrip(".")] = found.changed(**given)
        else:
            options |= given
    return saved.changed(**options)


def sdk() -> Any:
    """RBLN's SDK, or what stands in its place.

    Raises:
        ImportError: there is none.
    """
    try:
        return import_module("rebel")
    except ImportError as error:
        raise ImportError(
            "rebel cannot be imported: RBLN's SDK, rebel-compiler, comes from https://pypi.rbln.ai/simple; without an "
            "NPU vlmqual_rebel.install() or python -m vlmqual_rebel puts an emulator in its place"
        ) from error


def engine_of(forms: Bundle, config: RBLNVisionLanguageModelConfig) -> RebelEngine:
    """The SDK for a compiled model, each part on its device.

    Raises:
        ImportError: there is no SDK.
    """
    sdk()
    text, vision = config.text_model, config.vision_model
    parts = {"vision": vision.devices or config.devices, "connector": config.devices}
    apart = {name: devices[0] for name, devices in parts.items() if devices}
    options = {"timeout": config.timeout, "activate_profiler": config.activate_profiler}
    given = {name: value for name, value in options.items() if value is not None}
    devices = text.devices or config.devices
    return RebelEngine(forms, config.npu or "", text.num_devices, devices, apart, given)


def graphs_of(network: PreTrainedModel) -> Graphs:
    """The functions of a model as the SDK takes them."""
    made: Graphs = GRAPHS[network.config.model_type](network, "eager", paged=True)
    return made


def fill(table: nn.Module, file: Path) -> None:
    """Give an embedding its weights.

    Raises:
        ValueError: they are another embedding's.
    """
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    wanted = {name: tuple(weight.shape) for name, weight in table.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in stored.items()}
    if wanted != found:
        raise ValueError(f"{file} holds {found}; the embedding of this model is {wanted}")
    for name, weight in stored.items():
        owner, _, last = name.rpartition(".")
        setattr(table.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))
