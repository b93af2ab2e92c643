"""`rebel.compile_from_torch`: a torch module and fixed input shapes to a compiled model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .context import CompileContext
from .graph import Port, torch_dtype, trace
from .machine import current
from .model import Compiled, RBLNCompiledModel, new_uuid
from .settings import GROUP_SIZES, NPUS
from .weights import dtype_name

InputInfo = Sequence[tuple[str, Sequence[int], str | torch.dtype]]
TRACE_METHODS = ("export", "jittrace")


def compile(
    mod: torch.nn.Module,
    input_info: InputInfo | Sequence[InputInfo],
    *,
    npu: str | None = None,
    num_devices: int | None = None,
    tensor_parallel_size: int | None = None,
    example_inputs: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
    compile_context: CompileContext | None = None,
    model_trace_method: str = "export",
) -> RBLNCompiledModel:
    """Trace a module over inputs of fixed shapes, and keep its weights as they are now.

    Args:
        mod: called with its inputs by position, in the order of `input_info`.
        input_info: (name, shape, dtype) of each input, the dtype as "int16" or torch.int16; or a list of such lists,
            of which a call takes the first whose shapes fit.
        npu: name of the NPU to compile for; None is that of device 0. The host need not have it.
        num_devices: devices to divide the model over: 1, 2, 4, 8, 16 or 32. Divides the accounted memory; the
            division is not emulated.
        tensor_parallel_size: the older name of `num_devices`.
        example_inputs: a tensor for each input. Those that `compile_context` has marked become static buffers.
        compile_context: what this program shares with others.
        model_trace_method: "export" or "jittrace"; both trace with torch.export here.

    Raises:
        TypeError, ValueError: an argument is wrong; names it, its value and what is valid.
        RBLNCompileError: the module does not run over these inputs; names the stage.
    """
    if not isinstance(mod, torch.nn.Module):
        raise TypeError(f"mod: a {type(mod).__name__} is not a torch.nn.Module.")
    if model_trace_method not in TRACE_METHODS:
        raise ValueError(f"model_trace_method: {model_trace_method!r}; valid: {', '.join(TRACE_METHODS)}.")
    if compile_context is not None and not isinstance(compile_context, CompileContext):
        raise TypeError(f"compile_context: a {type(compile_context).__name__} is not a rebel.CompileContext.")
    target = _npu(npu)
    count = _count(target, num_devices, tensor_parallel_size)
    context = CompileContext() if compile_context is None else compile_context
    graphs = []
    for ports, examples in _shapes(input_info, example_inputs):
        named = [
            Port(port.name, port.shape, port.dtype, context.static_name(example))
            for port, example in zip(ports, examples, strict=True)
        ]
        graphs.append(trace(mod, named, examples))
    compiled = Compiled(
        graphs=tuple(graphs),
        npu=target,
        num_devices=count,
        uuid=new_uuid(),
        context=context.uuid,
        shares_weights=context.use_weight_sharing,
        owned=context.claim(weight for graph in graphs for weight in graph.weights.values()),
        version=current().settings.version,
    )
    return RBLNCompiledModel.of(compiled)


def compile_from_torch(
    mod: torch.nn.Module, input_info: InputInfo | Sequence[InputInfo], **kwargs: Any
) -> RBLNCompiledModel:
    """As `compile`, whose keyword arguments it takes. The vendor's function forwards in the same way."""
    return compile(mod, input_info, **kwargs)


def _npu(npu: str | None) -> str:
    if npu is None:
        settings = current().settings
        if not settings.devices:
            raise ValueError(f"npu: the host has no NPU, so its name must be given; valid: {', '.join(NPUS)}.")
        return settings.npu
    if npu not in NPUS:
        raise ValueError(f"npu: {npu!r} is not the name of an NPU; valid: {', '.join(NPUS)}.")
    return npu


def _count(npu: str, num_devices: int | None, tensor_parallel_size: int | None) -> int:
    if None not in (num_devices, tensor_parallel_size) and num_devices != tensor_parallel_size:
        raise ValueError(
            f"num_devices: {num_devices}, but tensor_parallel_size, its older name, is {tensor_parallel_size}."
        )
    name = "num_devices" if tensor_parallel_size is None else "tensor_parallel_size"
    count = tensor_parallel_size if num_devices is None else num_devices
    if count is None:
        return 1
    if isinstance(count, bool) or count not in GROUP_SIZES:
        raise ValueError(f"{name}: {count!r}; valid: {', '.join(map(str, GROUP_SIZES))}.")
    if count > 1 and not NPUS[npu].divisible:
        raise ValueError(f"{name}: {count}, but {npu} does not divide a model over devices; valid: 1.")
    return count


def _shapes(input_info: object, example_inputs: Sequence[Any] | None) -> list[tuple[list[Port], Sequence[Tensor]]]:
    """Ports and example tensors of each set of shapes."""
    if not isinstance(input_info, list | tuple) or not input_info:
        raise TypeError("input_info: must be a list of (name, shape, dtype), or a list of such lists.")
    several = all(isinstance(entry, list | tuple) and entry and not isinstance(entry[0], str) for entry in input_info)
    infos = list(input_info) if several else [input_info]
    examples: list[Any] = [None] * len(infos)
    if example_inputs is not None:
        examples = list(example_inputs) if several else [example_inputs]
        if len(examples) != len(infos):
            raise ValueError(f"example_inputs: {len(examples)} lists for {len(infos)} lists of input_info.")
    return [_ports(info, example) for info, example in zip(infos, examples, strict=True)]


def _ports(info: Sequence[Any], examples: Sequence[Any] | None) -> tuple[list[Port], Sequence[Tensor]]:
    ports = [_port(entry) for entry in info]
    names = [port.name for port in ports]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"input_info: {twice[0]} is there twice.")
    if examples is None:
        return ports, [torch.zeros(port.shape, dtype=torch_dtype(port.dtype)) for port in ports]
    if len(examples) != len(ports):
        raise ValueError(f"example_inputs: {len(examples)} tensors for the {len(ports)} inputs of input_info.")
    for port, example in zip(ports, examples, strict=True):
        if not isinstance(example, Tensor):
            raise TypeError(f"example_inputs: {port.name} is a {type(example).__name__}, not a torch.Tensor.")
        found = Port(port.name, tuple(example.shape), dtype_name(example.dtype))
        if found != port:
            raise ValueError(f"example_inputs: {found}, but input_info says {port}.")
    return ports, examples


def _port(entry: object) -> Port:
    if not isinstance(entry, list | tuple) or len(entry) != 3 or not isinstance(entry[0], str):
        raise TypeError(f"input_info: {entry!r} is not (name, shape, dtype).")
    name, shape, dtype = entry
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"input_info: {name} has the shape {shape!r}; valid: positive whole numbers.")
    if not isinstance(dtype, str | torch.dtype):
        raise TypeError(f"input_info: {name} has the dtype {dtype!r}; valid: a name as in 'int16', or a torch.dtype.")
    try:
        known = dtype if isinstance(dtype, torch.dtype) else torch_dtype(dtype.removeprefix("torch."))
    except ValueError as error:
        raise ValueError(f"input_info: {name}: {error}") from error
    return Port(name, tuple(shape), dtype_name(known))
