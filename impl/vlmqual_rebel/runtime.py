"""`rebel.Runtime` and `rebel.AsyncRuntime`: a compiled model on devices, to be called."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import RBLNRuntimeError
from .graph import Graph, Port
from .machine import current
from .model import RBLNCompiledModel
from .pools import join
from .weights import dtype_name

TENSOR_TYPES: dict[str, type] = {"np": np.ndarray, "pt": Tensor}


class Runtime:
    """A compiled model on devices. Its buffers are shared as `vlmqual_rebel.pools.join` says.

    Every program runs whole on the CPU, in the numeric mode of the settings; `num_devices` divides the accounted
    memory only. Latency means nothing here.

    Args:
        compiled_model: the model, or the path of its file.
        tensor_type: "np" takes and returns numpy arrays, "pt" torch tensors on the CPU.
        device: an id, a list of as many ids as the model was compiled for, or None for the first ones.
        activate_profiler: not emulated; None or False.
        timeout: seconds as a Python int, or None; accepted, never reached.

    Raises:
        TypeError: an argument is of another type.
        ValueError: `tensor_type` is another word.
        RBLNRuntimeError: an NPU is missing or does not match, there is a "Lack of device memory", or what was asked
            for is not emulated.
    """

    def __init__(
        self,
        compiled_model: RBLNCompiledModel | str | os.PathLike[str],
        *,
        tensor_type: str = "np",
        device: int | list[int] | None = None,
        activate_profiler: bool | None = None,
        timeout: int | None = None,
    ) -> None:
        if tensor_type not in TENSOR_TYPES:
            raise ValueError(f"tensor_type: {tensor_type!r}; valid: {', '.join(TENSOR_TYPES)}.")
        if timeout is not None and (not isinstance(timeout, int) or isinstance(timeout, bool)):
            raise TypeError(f"timeout: {timeout!r} is a {type(timeout).__name__}; valid: a Python int of seconds.")
        if activate_profiler:
            raise RBLNRuntimeError("activate_profiler: an emulator has nothing to profile.")
        model = compiled_model if isinstance(compiled_model, RBLNCompiledModel) else RBLNCompiledModel(compiled_model)
        machine = current()
        compiled = model.compiled
        if tensor_type == "np":
            for port in (port for graph in compiled.graphs for port in (*graph.passed, *graph.outputs)):
                _refuse_unknown_to_numpy(port)
        self.tensor_type = tensor_type
        self.devices = machine.select(device, compiled.num_devices, compiled.npu)
        self._mode = machine.settings.numeric
        self._compiled = compiled
        self._pool = join(machine, self, compiled, self.devices)
        self._lock = machine.lock
        self._modules = [graph.module() for graph in compiled.graphs]
        kept = [weight.tensor for weight in compiled.weights.values()] + list(self._pool.buffers.values())
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in kept}

    def __repr__(self) -> str:
        return f"<Runtime of {self._compiled.uuid[:8]} on {list(self.devices)}, emulated>"

    def __call__(self, *inputs: Any, out: Any = None, **named: Any) -> Any:
        """Run the model once.

        Args:
            inputs: those that are not static, in the order of `input_info`.
            out: an array, or a list of one for each output, that the outputs are written into.
            named: inputs by their names, instead of by position.

        Returns:
            `out` if given; else the output, or a list of the outputs if there are several, nested ones in order.

        Raises:
            RBLNRuntimeError: an input or `out` is missing, not known, or of another type, shape or dtype; names it.
        """
        index, arrays = self._bind(inputs, named)
        graph = self._compiled.graphs[index]
        into = None if out is None else self._check_out(graph, out)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            # The program gets copies, as a device does: what it does to its inputs does not reach the caller.
            copies = iter([self._tensor(array).clone(memory_format=torch.contiguous_format) for array in arrays])
            tensors = [
                next(copies) if port.static is None else self._pool.buffers[port.static] for port in graph.inputs
            ]
            results = self._run(self._modules[index], tensors)
        if into is not None:
            with torch.inference_mode():  # which may write into any tensor, also one made in inference mode
                for one, result in zip(into, results, strict=True):
                    self._tensor(one).copy_(result)
            return out
        arrays = results if self.tensor_type == "pt" else [result.numpy() for result in results]
        return arrays[0] if len(arrays) == 1 else arrays

    def run(self, *inputs: Any, out: Any = None, **named: Any) -> Any:
        """As calling the runtime."""
        return self(*inputs, out=out, **named)

    def _run(self, module: torch.fx.GraphModule, tensors: Sequence[Tensor]) -> list[Tensor]:
        from .numeric import MODES

        with MODES[self._mode]():
            results = pytree.tree_leaves(module.forward(*tensors))
        # A buffer or weight that is returned is returned as it is now.
        return [
            one.clone() if one.untyped_storage().data_ptr() in self._kept else one
            for one in results
            if isinstance(one, Tensor)
        ]

    def _tensor(self, array: Any) -> Tensor:
        return array if isinstance(array, Tensor) else torch.as_tensor(array)

    def _bind(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> tuple[int, list[Any]]:
        """The graph that the inputs fit, and the inputs in its order."""
        faults = []
        for index, graph in enumerate(self._compiled.graphs):
            try:
                return index, self._arrange(graph, inputs, named)
            except RBLNRuntimeError as error:
                faults.append(str(error))
        if len(faults) == 1:
            raise RBLNRuntimeError(faults[0])
        raise RBLNRuntimeError(f"The inputs fit none of {len(faults)} sets of shapes; the first: {faults[0]}")

    def _arrange(self, graph: Graph, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        ports = graph.passed
        names = [port.name for port in ports]
        if len(inputs) > len(ports):
            raise RBLNRuntimeError(f"{len(inputs)} inputs for a model of {len(ports)}: {', '.join(names)}.")
        given = dict(zip(names, inputs, strict=False))
        for name in named:
            if name not in names:
                raise RBLNRuntimeError(f"{name} is not an input of the model; valid: {', '.join(names)}.")
            if name in given:
                raise RBLNRuntimeError(f"{name} is given by position and by name.")
        given |= named
        missing = [name for name in names if name not in given]
        if missing:
            raise RBLNRuntimeError(f"missing input {', '.join(missing)}; the model takes: {', '.join(names)}.")
        for port in ports:
            self._check("input", port, given[port.name])
        return [given[name] for name in names]

    def _check(self, kind: str, port: Port, array: Any) -> None:
        wanted: Any = TENSOR_TYPES[self.tensor_type]
        if not isinstance(array, wanted):
            found = f"{type(array).__module__}.{type(array).__name__}"
            raise RBLNRuntimeError(f"{kind} {port.name} is a {found}; tensor_type={self.tensor_type!r} needs {wanted}.")
        if isinstance(array, Tensor) and array.device.type != "cpu":
            raise RBLNRuntimeError(f"{kind} {port.name} is on the device {array.device}; valid: cpu.")
        dtype = dtype_name(array.dtype) if isinstance(array, Tensor) else str(array.dtype)
        if tuple(array.shape) != port.shape or dtype != port.dtype:
            raise RBLNRuntimeError(
                f"{kind} {port.name} is {dtype}{list(array.shape)}; "
                f"the model was compiled for {port.dtype}{list(port.shape)}."
            )

    def _check_out(self, graph: Graph, out: Any) -> list[Any]:
        into = list(out) if isinstance(out, list | tuple) else [out]
        if len(into) != len(graph.outputs):
            raise RBLNRuntimeError(f"out: {len(into)} arrays for {len(graph.outputs)} outputs.")
        for port, one in zip(graph.outputs, into, strict=True):
            self._check("out", port, one)
        return into


class AsyncRuntime:
    """A runtime whose calls are awaited; they run one after the other in a thread.

    Args:
        compiled_model, device, tensor_type, timeout: as `Runtime`.
        parallel: 1, 2 or None; how many calls the NPU overlaps, which is not emulated.
    """

    def __init__(
        self,
        compiled_model: RBLNCompiledModel | str | os.PathLike[str],
        *,
        device: int | list[int] | None = None,
        tensor_type: str = "np",
        parallel: int | None = None,
        timeout: int | None = None,
    ) -> None:
        if parallel not in (None, 1, 2):
            raise ValueError(f"parallel: {parallel!r}; valid: 1, 2 or None.")
        self._runtime = Runtime(compiled_model, device=device, tensor_type=tensor_type, timeout=timeout)

    async def async_run(self, *inputs: Any, out: Any = None, **named: Any) -> Any:
        """As calling a `Runtime`."""
        return await asyncio.to_thread(self._runtime, *inputs, out=out, **named)


def _refuse_unknown_to_numpy(port: Port) -> None:
    try:
        own = np.dtype(port.dtype).isbuiltin == 1  # other packages may have registered types of this name
    except TypeError:
        own = False
    if not own:
        raise RBLNRuntimeError(f"{port.name} is {port.dtype}, which numpy does not have; use tensor_type='pt'.")
