"""ONNX Runtime: any execution provider that is installed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmqual_impl.entries import Entry
from vlmqual_impl.runtime.engines import Forms, States, exported, quiet

FILE = "model.onnx"
_ENDING = "ExecutionProvider"


class OnnxEngine:
    """Exports entries with torch.export and runs them in sessions of ONNX Runtime.

    Attributes:
        name: see `Engine.name`.
        provider: the execution provider.
    """

    def __init__(self, shelf: Forms, device: str = "CPU", threads: int = 0) -> None:
        """Import ONNX Runtime.

        Args:
            shelf: where exported functions are kept.
            device: see `provider`.
            threads: CPU threads, 0 for as many as torch uses.

        Raises:
            ValueError: the provider is not installed.
        """
        self._runtime: Any = import_module("onnxruntime")
        self.name = f"onnxruntime {self._runtime.__version__}"
        self.provider = provider(device)
        self._threads = threads or torch.get_num_threads()
        self._shelf = shelf

    @property
    def made_s(self) -> Mapping[str, float]:
        """See `Engine.made_s`."""
        return self._shelf.made_s

    def program(self, entry: Entry, mates: Sequence[Entry] = ()) -> OnnxProgram:
        """See `Engine.program`."""
        folder = self._shelf.place(entry, self.name, lambda target: export(entry, target / FILE))
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            session = self._runtime.InferenceSession(str(folder / FILE), options, providers=[self.provider])
        except Exception as error:  # the library's errors have no common base class
            raise ValueError(f"{entry.name}: {self.name} cannot compile it for {self.provider}: {error}") from error
        return OnnxProgram(session, entry)

    def new_states(self, entry: Entry) -> States:
        """See `Engine.new_states`."""
        return [state.zeros().numpy() for state in entry.states]


class OnnxProgram:
    """A session."""

    def __init__(self, session: Any, entry: Entry) -> None:
        self._session = session
        self._count = len(entry.outputs)
        self._names = [each.name for each in session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor], states: States = None) -> tuple[list[Tensor], States]:
        """See `Program`."""
        arrays = [tensor.numpy() for tensor in inputs] + list(states or ())
        made = self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in made[: self._count]], made[self._count :]


def provider(device: str) -> str:
    """The execution provider of this name.

    Args:
        device: with or without its ending: "CPU", "CPUExecutionProvider", "QNN".

    Raises:
        ValueError: it is not installed; names those that are.
    """
    have = import_module("onnxruntime").get_available_providers()
    name = f"{device.removesuffix(_ENDING)}{_ENDING}"
    if name not in have:
        valid = ", ".join(each.removesuffix(_ENDING) for each in have)
        raise ValueError(f"ONNX Runtime device {device!r} is not here; there are {valid}")
    return name


def export(entry: Entry, path: Path) -> None:
    """Write an entry as an ONNX file, its weights beside it where they are large."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), quiet():
        made = torch.onnx.export(
            exported(entry),
            dynamo=True,
            optimize=False,  # ONNX Runtime does that itself, and faster
            input_names=[spec.name for spec in (*entry.inputs, *entry.states)],
            output_names=[spec.name for spec in entry.outputs] + [f"{spec.name}.new" for spec in entry.states],
        )
        assert made is not None
        made.save(str(path), external_data=entry.weights_bytes > 1 << 30)
