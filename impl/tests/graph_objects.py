"""What the tests of fixed-shape graphs share: tiny models, an engine without a compiler, requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmqual_contract import fixtures
from vlmqual_impl.checkpoints import locate
from vlmqual_impl.configs import config_for, read_config
from vlmqual_impl.entries import Entry, Spec
from vlmqual_impl.families import family
from vlmqual_impl.graphs import GRAPHS, Graphs
from vlmqual_impl.runtime.eager import EagerRuntime
from vlmqual_impl.weights import load, unfilled, wanted_name

CHECKPOINTS = {"idefics": "idefics-tiny", "idefics3": "idefics3-tiny", "mllama": "mllama-tiny"}


def network(checkpoint: str, dtype: torch.dtype = torch.float64) -> tuple[str, Any]:
    """The family's name and the model of a fixture checkpoint."""
    directory = locate(str(fixtures.checkpoint(checkpoint)))
    values = read_config(directory)
    config = config_for(values)
    kind = family(config.model_type)
    with unfilled():
        made = kind.network(kind.prepared(config, values, directory))
    load(made, directory, rename=kind.rename, dtype=dtype)
    return kind.name, made.eval()


def both(checkpoint: str, dtype: torch.dtype = torch.float64) -> tuple[Graphs, EagerRuntime]:
    """Graphs and eager runtime of one model."""
    name, made = network(checkpoint, dtype)
    return GRAPHS[name](made, "sdpa"), family(name).runtime(made, "sdpa")


def request(family_name: str, golden: str) -> dict[str, Tensor]:
    """The input tensors of a golden case."""
    with np.load(fixtures.file(f"goldens/{family_name}/{golden}.npz"), allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("inputs/")]
        return {name.removeprefix("inputs/"): torch.as_tensor(file[name]) for name in names}


def repeated(inputs: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """The same request with other rows; tensors without rows stay."""
    batch = len(inputs["input_ids"])
    return {name: tensor[list(rows)] if len(tensor) == batch else tensor for name, tensor in inputs.items()}


class ModuleEngine:
    """Runs entries as they are, and holds them to the shapes and dtypes that they declare."""

    name = "module 1"

    def __init__(self) -> None:
        self.compiled: list[str] = []

    @property
    def made_s(self) -> Mapping[str, float]:
        return dict.fromkeys(self.compiled, 0.0)

    def program(self, entry: Entry, mates: Sequence[Entry] = ()) -> ModuleProgram:
        self.compiled.append(entry.name)
        return ModuleProgram(entry)

    def new_states(self, entry: Entry) -> list[Tensor]:
        """Not zeros, so that a slot that nobody wrote shows where it is read."""
        return [torch.full(spec.shape, 7.0, dtype=spec.dtype) for spec in entry.states]


class ModuleProgram:
    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __call__(self, inputs: Sequence[Tensor], states: Any = None) -> tuple[list[Tensor], Any]:
        entry = self.entry
        held(entry.inputs, inputs)
        with torch.no_grad():
            made = entry.module(*inputs, *(states or ()))
        count = len(entry.outputs)
        held(entry.outputs, made[:count])
        held(entry.states, made[count:])
        return list(made[:count]), list(made[count:])


def held(specs: Sequence[Spec], tensors: Sequence[Tensor]) -> None:
    """Fail where tensors are not what an entry declares."""
    assert [(spec.shape, spec.dtype) for spec in specs] == [(tuple(t.shape), t.dtype) for t in tensors], (
        f"declared {[str(spec) for spec in specs]}"
    )


def slim(source: str, target: Path) -> Path:
    """A copy of a fixture checkpoint with fewer layers, which compiles faster; Mllama keeps a crossing one."""
    directory = fixtures.checkpoint(source)
    values = json.loads((directory / "config.json").read_text("utf-8"))
    family_name = values["model_type"]
    text = values if family_name == "idefics" else values["text_config"]
    text["num_hidden_layers"] = 2
    vision = values["vision_config"]
    vision["num_hidden_layers"] = 1
    if family_name == "mllama":
        text["cross_attention_layers"] = [1]
        vision |= {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 96}
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(values), "utf-8")
    kind = family(family_name)
    with unfilled():
        wanted = {name: tensor.shape for name, tensor in kind.network(config_for(values)).state_dict().items()}
    kept = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        ours = wanted_name(name, wanted, kind.rename)
        if ours in wanted:
            kept[name] = tensor[tuple(slice(side) for side in wanted[ours])].contiguous()
    save_file(kept, target / "model.safetensors")
    return target
