"""RBLN: entries compiled with `rebel`, their states as static buffers on the device.

Entries of the same states are compiled in one CompileContext, in which every state is marked as a static address: it
stays on the device and is no input of a call. The SDK binds programs of one context to one set of buffers in the
order of loading, so every set of sequences that lives at a time loads programs of its own; when a set is no longer
held, the next one takes its programs over.

Never run on an NPU. Facts of the SDK are from its documentation and from the calls of optimum-rbln 0.12.0.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmqual_impl.entries import Entry
from vlmqual_impl.runtime.engines import Forms, States, quiet

SUFFIX = ".rbln"
#: Devices that a program may be divided over.
GROUPS = (1, 2, 4, 8, 16, 32)


class RebelEngine:
    """Compiles entries for an NPU and runs them.

    Attributes:
        name: see `Engine.name`; says so where the SDK is emulated.
        npu: what is compiled for, for example "RBLN-CA25".
        ranks: devices that text entries are divided over.
    """

    def __init__(
        self,
        shelf: Forms,
        npu: str,
        ranks: int = 1,
        devices: Sequence[int] = (),
        apart: Mapping[str, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Import the SDK.

        Args:
            shelf: where compiled forms are kept.
            npu: what is compiled for.
            ranks: devices that text entries are divided over.
            devices: their numbers; empty for the first ones.
            apart: device of entries of another kind, by the first word of their names, for example "vision"; where
                none is named it is the first of `devices`.
            options: further arguments of the SDK's runtimes.

        Raises:
            ValueError: the devices are not as many as the ranks.
        """
        self._rebel: Any = import_module("rebel")
        if devices and len(devices) != ranks:
            raise ValueError(f"device names {len(devices)} devices; tensor-parallel size {ranks} needs {ranks}")
        version = getattr(self._rebel, "__version__", "of unknown version")
        self.npu, self.ranks = npu, ranks
        self.name = f"rebel {version} for {npu} x {ranks}"
        self._devices = list(devices)
        self._apart, self._options = dict(apart or {}), dict(options or {})
        self._shelf = shelf
        self._programs: dict[str, RebelProgram] = {}

    @property
    def made_s(self) -> Mapping[str, float]:
        """See `Engine.made_s`; entries that were compiled together count with the first."""
        return self._shelf.made_s

    def program(self, entry: Entry, mates: Sequence[Entry] = ()) -> RebelProgram:
        """See `Engine.program`."""
        if entry.name not in self._programs:
            group = [entry, *mates]
            folder, made = self._place(group)
            files = {each.name: folder / f"{each.name}{SUFFIX}" for each in group}
            shared = Group(self, files, made, bool(entry.states))
            for each in group:
                self._programs[each.name] = RebelProgram(each, shared)
        return self._programs[entry.name]

    def prepare(self, entry: Entry, mates: Sequence[Entry] = ()) -> None:
        """Compile, and load nothing; no device is touched.

        Raises:
            ValueError: see `Engine.program`.
        """
        self._place([entry, *mates])

    def _place(self, group: Sequence[Entry]) -> tuple[Path, dict[str, Any]]:
        """Where the compiled forms are, and the compiled models that were made for it now, by name."""
        made: dict[str, Any] = {}
        label = "".join(f" with {mate.name}" for mate in group[1:])
        return self._shelf.place(
            group[0], f"{self.name}{label}", lambda target: made.update(self._compile(group, target))
        ), made

    def new_states(self, entry: Entry) -> States:
        """See `Engine.new_states`: programs of their own, over buffers of their own."""
        return self._programs[entry.name].group.free()

    def _compile(self, group: Sequence[Entry], folder: Path) -> dict[str, Any]:
        """Compile and save entries; the compiled models by name."""
        made: dict[str, Any] = {}
        states: dict[str, Tensor] = {}
        context: Any = None
        if group[0].states:
            context = import_module("rebel.compile_context").CompileContext(use_weight_sharing=True)
            for spec in group[0].states:
                states[spec.name] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                context.mark_static_address(states[spec.name], spec.name)
        for entry in group:
            specs = (*entry.inputs, *entry.states)
            options: dict[str, Any] = {"npu": self.npu}
            if context is not None:
                options |= {
                    "compile_context": context,
                    "example_inputs": [states[spec.name] if spec.name in states else spec.zeros() for spec in specs],
                    self._spelled(): self.ranks,
                }
            info = [(spec.name, list(spec.shape), str(spec.dtype).removeprefix("torch.")) for spec in specs]
            try:
                with torch.no_grad(), quiet():
                    compiled = self._rebel.compile_from_torch(Outputs(entry), info, **options)
                compiled.save(str(folder / f"{entry.name}{SUFFIX}"))
                made[entry.name] = compiled
            except Exception as error:  # the SDK's errors have no common base class
                raise ValueError(f"{entry.name}: {self.name} cannot compile it: {_short(error)}") from error
        return made

    def _spelled(self) -> str:
        """The name that this SDK gives to the number of devices: `tensor_parallel_size` in older ones."""
        known = inspect.signature(self._rebel.compile).parameters
        return "num_devices" if "num_devices" in known else "tensor_parallel_size"

    def read(self, path: Path) -> Any:
        """A compiled file.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            return self._rebel.RBLNCompiledModel(os.fspath(path))
        except Exception as error:  # the SDK's errors have no common base class
            raise ValueError(f"{path}: {self.name} cannot read it: {_short(error)}") from error

    def load(self, name: str, compiled: Any, divided: bool) -> Any:
        """A runtime of a compiled model.

        Raises:
            ValueError: the device does not take it.
        """
        devices: Any = None
        kind = name.partition("-")[0]
        if not divided and kind in self._apart:
            devices = self._apart[kind]
        elif self._devices:
            devices = self._devices if divided and self.ranks > 1 else self._devices[0]
        elif divided and self.ranks > 1:
            devices = list(range(self.ranks))
        try:
            return self._rebel.Runtime(compiled, tensor_type="pt", device=devices, **self._options)
        except Exception as error:  # the SDK's errors have no common base class
            raise ValueError(f"{name}: {self.name} cannot load it: {_short(error)}") from error


class Group:
    """Entries that were compiled together, and the loaded programs that nobody holds at the moment."""

    def __init__(self, engine: RebelEngine, files: Mapping[str, Path], models: dict[str, Any], divided: bool) -> None:
        self._engine, self._files, self._models, self._divided = engine, files, models, divided
        self._idle: list[dict[str, Any]] = []

    def free(self) -> Loaded:
        """Loaded programs for a new set of sequences."""
        runtimes = self._idle.pop() if self._idle else self._load()
        held = Loaded(runtimes)
        weakref.finalize(held, self._idle.append, runtimes)
        return held

    def _load(self) -> dict[str, Any]:
        for name, path in self._files.items():
            if name not in self._models:
                self._models[name] = self._engine.read(path)
        return {name: self._engine.load(name, self._models[name], self._divided) for name in self._files}


class Loaded:
    """Programs by the entry's name, bound to one set of buffers."""

    def __init__(self, runtimes: Mapping[str, Any]) -> None:
        self.runtimes = runtimes


class RebelProgram:
    """A compiled entry.

    Attributes:
        group: what it was compiled with.
    """

    def __init__(self, entry: Entry, group: Group) -> None:
        self.group = group
        self._entry = entry
        self._own = None if entry.states else group.free()

    def __call__(self, inputs: Sequence[Tensor], states: States = None) -> tuple[list[Tensor], States]:
        """See `Program`; states are the programs that are bound to them."""
        held = states if self._own is None else self._own
        made = held.runtimes[self._entry.name](*(tensor.contiguous() for tensor in inputs))
        return list(made) if isinstance(made, (list, tuple)) else [made], states


class Outputs(nn.Module):
    """An entry without its states in the result: they stay in their buffers."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.inner = entry.module
        self.count = len(entry.outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs, then states, to the outputs."""
        made: tuple[Tensor, ...] = self.inner(*tensors)
        return made[: self.count]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
