"""OpenVINO: CPU, GPU and NPU by their device strings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmqual_impl.entries import Entry
from vlmqual_impl.runtime.engines import Forms, States, exported, quiet

FILE = "model.xml"
#: What OpenVINO is told to compute in; without it a CPU with bfloat16 units computes float32 models in bfloat16.
_PRECISION = {torch.float32: "f32", torch.float16: "f16"}


class OpenVinoEngine:
    """Converts exported entries and compiles them for a device.

    Attributes:
        name: see `Engine.name`.
        device: for example "CPU" or "NPU".
    """

    def __init__(self, shelf: Forms, device: str = "CPU", threads: int = 0) -> None:
        """Import OpenVINO.

        Args:
            shelf: where converted functions are kept.
            device: OpenVINO's name of it.
            threads: CPU threads, 0 for as many as torch uses.

        Raises:
            ValueError: there is no such device here.
        """
        self._library = library()
        self._core = core(device)
        self.name = f"openvino {self._library.__version__.partition('-')[0]}"
        self.device = device
        self._threads = threads or torch.get_num_threads()
        self._shelf = shelf

    @property
    def made_s(self) -> Mapping[str, float]:
        """See `Engine.made_s`."""
        return self._shelf.made_s

    def program(self, entry: Entry, mates: Sequence[Entry] = ()) -> OpenVinoProgram:
        """See `Engine.program`."""
        folder = self._shelf.place(entry, self.name, lambda target: self._convert(entry, target / FILE))
        options = {"INFERENCE_PRECISION_HINT": _PRECISION[entry.outputs[0].dtype], "PERFORMANCE_HINT": "LATENCY"}
        if self.device.startswith("CPU"):
            options["INFERENCE_NUM_THREADS"] = str(self._threads)
        try:
            compiled = self._core.compile_model(str(folder / FILE), self.device, options)
        except Exception as error:  # the library raises plain RuntimeError and its own classes
            reason = " ".join(str(error).split())
            raise ValueError(f"{entry.name}: {self.name} cannot compile it for {self.device}: {reason}") from error
        return OpenVinoProgram(compiled, entry)

    def _convert(self, entry: Entry, path: Path) -> None:
        with quiet():
            model = self._library.convert_model(exported(entry))
        self._library.save_model(model, str(path), compress_to_fp16=False)

    def new_states(self, entry: Entry) -> States:
        """See `Engine.new_states`."""
        return [state.zeros().numpy() for state in entry.states]


def library() -> Any:
    """OpenVINO without its telemetry, which otherwise tells its maker of every import and conversion."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it fails from now on
    return import_module("openvino")


def core(device: str) -> Any:
    """OpenVINO's core, when it has the device.

    Args:
        device: for example "CPU", "GPU.1", "NPU".

    Raises:
        ValueError: it is not there; names those that are.
    """
    found = library().Core()
    have = found.available_devices
    if device not in have and device not in {each.partition(".")[0] for each in have}:
        raise ValueError(f"OpenVINO device {device!r} is not here; there are {', '.join(have)}")
    return found


class OpenVinoProgram:
    """A compiled model."""

    def __init__(self, compiled: Any, entry: Entry) -> None:
        self._request = compiled.create_infer_request()
        self._count = len(entry.outputs)
        self._size = len(compiled.outputs)

    def __call__(self, inputs: Sequence[Tensor], states: States = None) -> tuple[list[Tensor], States]:
        """See `Program`."""
        arrays = [tensor.numpy() for tensor in inputs] + list(states or ())
        made = self._request.infer(dict(enumerate(arrays)), share_inputs=True)
        results = [made[index] for index in range(self._size)]
        return [torch.from_numpy(array) for array in results[: self._count]], results[self._count :]
