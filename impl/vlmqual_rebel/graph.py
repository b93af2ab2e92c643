"""One traced program: its inputs in order, its outputs, its constants and its operations."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from .errors import RBLNCompileError
from .weights import Weight, dtype_name, hollow, intern


@dataclass(frozen=True)
class Port:
    """An input or output: its name, shape and dtype as in "int16"; `static` is the buffer that it stands for."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    static: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Graph:
    """A program with fixed shapes. `weights` are by their name in the traced model, and only those that are used."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: Mapping[str, Weight]
    program: ExportedProgram = field(repr=False)

    @property
    def passed(self) -> tuple[Port, ...]:
        """The inputs that a call passes, in order: those that are not static."""
        return tuple(port for port in self.inputs if port.static is None)

    @property
    def static(self) -> dict[str, Port]:
        """The buffers, by their names."""
        return {port.static: port for port in self.inputs if port.static is not None}

    def resized(self, blocks: Mapping[str, int]) -> Graph:
        """The same graph with another first size of these buffers."""
        inputs = (
            dataclasses.replace(port, shape=(blocks[port.static], *port.shape[1:]))
            if port.static and port.static in blocks
            else port
            for port in self.inputs
        )
        return dataclasses.replace(self, inputs=tuple(inputs))

    def module(self) -> torch.fx.GraphModule:
        """The operations as a module with the constants in place. Call its `forward`: the hooks check old shapes."""
        with torch.inference_mode(False), _constants(self.program, {k: w.tensor for k, w in self.weights.items()}):
            # The guards check the shapes of the trace, which a resized buffer no longer has.
            module: torch.fx.GraphModule = self.program.module(check_guards=False)
            return module

    def operations(self) -> bytes:
        """The operations in torch's archive format, without the constants."""
        archive = io.BytesIO()
        with torch.inference_mode(False), _constants(self.program, {}), warnings.catch_warnings():
            # Said of a tensor that owns less than it shows, which every hollow one does.
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")
            torch.export.save(self.program, archive)
        return archive.getvalue()


def torch_dtype(name: str) -> torch.dtype:
    """int16 -> torch.int16.

    Raises:
        ValueError: it is not the name of a dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a dtype; valid are those of torch, as in float32 or int16.")
    return dtype


def trace(model: torch.nn.Module, ports: Sequence[Port], examples: Sequence[Tensor]) -> Graph:
    """Follow the model over its inputs, now: what happens to it or to torch's functions later changes nothing.

    Args:
        model: called with the inputs by position.
        ports: names, shapes, dtypes and static buffers of its inputs.
        examples: a tensor for each; those on the meta device and static ones are taken as zeros.

    Raises:
        RBLNCompileError: the model does not run over these inputs, or changes a tensor of its own.
    """
    if torch.is_inference_mode_enabled():
        # torch.export sets requires_grad as it found it, which is refused for tensors made in inference mode.
        for parameter in model.parameters():
            if parameter.is_inference():
                parameter.requires_grad_(False)
    with torch.inference_mode(False), torch.no_grad():
        inputs = tuple(
            torch.zeros(port.shape, dtype=torch_dtype(port.dtype))
            if port.static or example.is_meta
            else example.detach().cpu().clone()
            for port, example in zip(ports, examples, strict=True)
        )
        try:
            program = torch.export.export(model, inputs, strict=False)
        except Exception as error:
            raise RBLNCompileError(f"Model Conversion: {type(error).__name__}: {error}") from error
    program._example_inputs = None  # a cache would be saved with the program
    _refuse_changed_weights(program)
    used = _used_targets(program)
    constants = program.state_dict | program.constants
    odd = [name for name in used if not isinstance(constants[name], Tensor)]
    if odd:
        raise RBLNCompileError(f"Graph Generation: {odd[0]} is a {type(constants[odd[0]]).__name__}, not a tensor.")
    with torch.inference_mode(False):
        weights = {name: intern(constants[name]) for name in used}
    graph = Graph(tuple(ports), _outputs(program), weights, program)
    _put(program, {name: hollow(value) for name, value in constants.items() if isinstance(value, Tensor)})
    return graph


def restore(operations: bytes, inputs: Sequence[Port], outputs: Sequence[Port], weights: Mapping[str, Weight]) -> Graph:
    """The graph of saved operations."""
    program = torch.export.load(io.BytesIO(operations))
    return Graph(tuple(inputs), tuple(outputs), dict(weights), program)


def _used_targets(program: ExportedProgram) -> list[str]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [
        spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target is not None and nodes[spec.arg.name].users
    ]


def _outputs(program: ExportedProgram) -> tuple[Port, ...]:
    """Every tensor of the result, nested ones in the order of torch's pytree."""
    (results,) = program.graph.output_node().args
    values = [node.meta.get("val") for node in results if isinstance(node, torch.fx.Node)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tuple(Port(f"output_{i}", tuple(one.shape), dtype_name(one.dtype)) for i, one in enumerate(tensors))


def _refuse_changed_weights(program: ExportedProgram) -> None:
    own = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }
    for node in program.graph.nodes:
        for changed in _written(node):
            while changed.op == "call_function" and changed.args and isinstance(changed.args[0], torch.fx.Node):
                schema = getattr(changed.target, "_schema", None)
                if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
                    break
                changed = changed.args[0]
            if changed.op == "placeholder" and changed.name in own:
                raise RBLNCompileError(
                    f"Graph Generation: the model changes its own {own[changed.name]}; "
                    "make it an input, and mark it with CompileContext.mark_static_address."
                )


def _written(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The tensors that an operation changes in place."""
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema else ()):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.fx.Node):
            yield value


class _constants:
    """While entered, the constants of a program are these; the others, and afterwards all, are hollow."""

    def __init__(self, program: ExportedProgram, values: Mapping[str, Tensor]) -> None:
        self.program, self.values = program, values
        self.hollow = {
            name: value for name, value in (program.state_dict | program.constants).items() if isinstance(value, Tensor)
        }

    def __enter__(self) -> None:
        _put(self.program, self.values)

    def __exit__(self, *error: object) -> None:
        _put(self.program, self.hollow)


def _put(program: ExportedProgram, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in program.state_dict:
            parameter = isinstance(program.state_dict[name], torch.nn.Parameter)
            program.state_dict[name] = torch.nn.Parameter(value, requires_grad=False) if parameter else value
        else:
            program.constants[name] = value
