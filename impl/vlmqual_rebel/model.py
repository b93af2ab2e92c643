"""`rebel.RBLNCompiledModel`: compiled programs with their weights, their file, and their memory."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import archive
from .errors import RBLNRuntimeError
from .graph import Graph, Port, restore
from .machine import current
from .settings import NPUS
from .weights import Weight

if TYPE_CHECKING:
    from .runtime import AsyncRuntime, Runtime

PARALLELISM = "accounted for (memory, devices), not emulated: every program runs whole on the CPU"
PAGE_BYTES = 2 * 2**20
"""Allocations end on this boundary. Source: optimum-rbln 0.12.0 rounds the cache it plans in this way."""


@dataclass(frozen=True)
class Compiled:
    """What was compiled. `owned`: digests of the weights that no earlier program of the context holds.

    More than one graph: the same model for several input shapes, of which a call takes the one that fits.
    """

    graphs: tuple[Graph, ...]
    npu: str
    num_devices: int
    uuid: str
    context: str
    shares_weights: bool
    owned: frozenset[str]
    version: str

    @property
    def weights(self) -> dict[str, Weight]:
        """The constants of all graphs, by digest."""
        return {weight.digest: weight for graph in self.graphs for weight in graph.weights.values()}

    @property
    def static(self) -> dict[str, Port]:
        """The static buffers of all graphs, by name."""
        return {name: port for graph in self.graphs for name, port in graph.static.items()}

    def share_bytes(self, size_bytes: int) -> int:
        """What one device holds of a tensor: an equal share, rounded up."""
        return -(-size_bytes // self.num_devices)

    @property
    def owned_bytes(self) -> int:
        """Weights on one device, without those that an earlier program of the context brings."""
        return sum(self.share_bytes(w.size_bytes) for digest, w in self.weights.items() if digest in self.owned)


def pages(size_bytes: int) -> int:
    """Bytes that an allocation of this size takes."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class RBLNCompiledModel:
    """A compiled model: from a file, or as `rebel.compile_from_torch` returns it.

    Tensor parallelism is accounted for, not emulated: `num_devices` divides the memory and is checked against the
    devices, and every program runs whole on the CPU.

    Args:
        compiled_model: path of a file that `save` wrote.

    Raises:
        TypeError: it is not a path (documented).
        FileNotFoundError: there is no such file.
        RBLNRuntimeError: the file is cut short, damaged, foreign or of another version.
    """

    def __init__(self, compiled_model: str | os.PathLike[str]) -> None:
        if not isinstance(compiled_model, str | os.PathLike):
            raise TypeError(f"compiled_model: a {type(compiled_model).__name__} is not a path (str or os.PathLike).")
        self._compiled = _load(Path(compiled_model))
        self._kind: str | None = None

    @classmethod
    def of(cls, compiled: Compiled) -> RBLNCompiledModel:
        """The model of what was just compiled; this method is the emulator's own."""
        model = cls.__new__(cls)
        model._compiled, model._kind = compiled, None
        return model

    def __repr__(self) -> str:
        one = self._compiled
        return f"<RBLNCompiledModel {one.uuid[:8]} for {one.num_devices} x {one.npu}, emulated>"

    @property
    def compiled(self) -> Compiled:
        """What was compiled; this attribute is the emulator's own."""
        return self._compiled

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file, whole or not at all.

        Raises:
            TypeError: it is not a path.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: a {type(path).__name__} is not a path (str or os.PathLike).")
        one = self._compiled
        archive.write(
            Path(path),
            _describe(one),
            [graph.operations() for graph in one.graphs],
            one.weights.values(),
            one.context if one.shares_weights else None,
        )

    @staticmethod
    def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
        """What a file holds, without its weights.

        Returns:
            `npu`, `compiler_version`, `inputs` and `outputs` (dicts of name, shape, dtype; of the first graph),
            `num_devices` and `tensor_parallel_size` (the same number), `uuid`, `alloc_per_node` (bytes on each
            device); and the emulator's own `emulated`, `tensor_parallelism`, `static` and `weights_elsewhere`.

        Raises:
            TypeError, FileNotFoundError, RBLNRuntimeError: as the constructor.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: a {type(path).__name__} is not a path (str or os.PathLike).")
        meta = archive.read_meta(Path(path))
        model = meta["model"]
        graph = model["graphs"][0]
        shown = [{"name": port["name"], "shape": port["shape"], "dtype": port["dtype"]} for port in graph["inputs"]]
        return {
            "npu": model["npu"],
            "compiler_version": model["version"],
            "inputs": [one for one, port in zip(shown, graph["inputs"], strict=True) if port["static"] is None],
            "static": [one for one, port in zip(shown, graph["inputs"], strict=True) if port["static"] is not None],
            "outputs": [{key: port[key] for key in ("name", "shape", "dtype")} for port in graph["outputs"]],
            "num_devices": model["num_devices"],
            "tensor_parallel_size": model["num_devices"],
            "uuid": model["uuid"],
            "alloc_per_node": model["alloc_per_node"],
            "emulated": True,
            "tensor_parallelism": PARALLELISM,
            "weights_elsewhere": len(meta["tensors"]) - len(meta["holds"]),
        }

    def create_runtime(self, *, device: int | list[int] | None = 0, tensor_type: str = "np") -> Runtime:
        """A runtime on these devices; documented.

        Raises:
            RBLNRuntimeError: the NPU is missing, does not match, or has too little memory; or this instance has
                already made an asynchronous runtime.
        """
        from .runtime import Runtime

        self._only("create_runtime")
        return Runtime(self, device=device, tensor_type=tensor_type)

    def create_async_runtime(
        self, *, device: int | list[int] | None = 0, tensor_type: str = "np", parallel: int | None = None
    ) -> AsyncRuntime:
        """An asynchronous runtime on these devices; documented.

        Raises:
            RBLNRuntimeError: as `create_runtime`; or this instance has already made a synchronous runtime.
        """
        from .runtime import AsyncRuntime

        self._only("create_async_runtime")
        return AsyncRuntime(self, device=device, tensor_type=tensor_type, parallel=parallel)

    def _only(self, kind: str) -> None:
        if self._kind not in (None, kind):
            raise RBLNRuntimeError(f"{kind}: this RBLNCompiledModel has been used with {self._kind}; load another.")
        self._kind = kind

    def get_alloc_per_chiplet_by_key(self) -> dict[str, list[list[int]]]:
        """Memory in bytes: {"Weight" or "DramTensor": [device][chiplet]}.

        "DramTensor" is what optimum-rbln 0.12.0 calls the static buffers; the other keys of the SDK are not known.
        A weight is counted with the first program of its context.
        """
        one = self._compiled
        static = sum(pages(one.share_bytes(port.size_bytes)) for port in one.static.values())
        return {"Weight": self._spread(pages(one.owned_bytes)), "DramTensor": self._spread(static)}

    def get_alloc_per_node_by_key(self) -> dict[str, list[int]]:
        """Memory in bytes: {"Weight" or "DramTensor": [device]}."""
        return {
            key: [sum(chiplets) for chiplets in nodes] for key, nodes in self.get_alloc_per_chiplet_by_key().items()
        }

    def exp_get_dram_tensor_sizes(self) -> dict[str, list[list[int]]]:
        """Bytes of each static buffer: {name: [device][chiplet]}, not rounded to pages."""
        one = self._compiled
        return {name: self._spread(one.share_bytes(port.size_bytes)) for name, port in one.static.items()}

    def exp_multiply_buffer_size(self, multipliers: Mapping[str, int]) -> None:
        """Make static buffers n times as large along their first axis, for runtimes that are made from now on.

        Raises:
            ValueError: there is no such buffer, or n is not a positive whole number.
        """
        self.exp_rescale_buffer_size({name: (n, 1) for name, n in multipliers.items()})

    def exp_rescale_buffer_size(self, ratios: Mapping[str, tuple[int, int]]) -> None:
        """Make static buffers target / current times as large along their first axis.

        Raises:
            ValueError: there is no such buffer, a number is not positive, or the new size is not whole.
        """
        static, sizes = self._compiled.static, dict[str, int]()
        for name, (target, now) in ratios.items():
            if name not in static:
                raise ValueError(f"{name} is not a static buffer; there are: {', '.join(static) or 'none'}.")
            if not all(isinstance(n, int) and n > 0 for n in (target, now)) or not static[name].shape:
                raise ValueError(f"{name}: {target} / {now} is not a ratio of positive whole numbers.")
            size = Fraction(static[name].shape[0] * target, now)
            if size.denominator != 1:
                raise ValueError(
                    f"{name}: {static[name].shape[0]} blocks times {target} / {now} is not a whole number."
                )
            sizes[name] = int(size)
        graphs = tuple(graph.resized(sizes) for graph in self._compiled.graphs)
        self._compiled = dataclasses.replace(self._compiled, graphs=graphs)

    def _spread(self, device_bytes: int) -> list[list[int]]:
        chiplets = NPUS[self._compiled.npu].chiplets
        return [[-(-device_bytes // chiplets)] * chiplets for _ in range(self._compiled.num_devices)]


def new_uuid() -> str:
    """A name that no other compiled model has."""
    return uuid.uuid4().hex


def _describe(one: Compiled) -> dict[str, Any]:
    allocated = RBLNCompiledModel.of(one).get_alloc_per_node_by_key().values()
    return {
        "npu": one.npu,
        "num_devices": one.num_devices,
        "uuid": one.uuid,
        "context": one.context,
        "shares_weights": one.shares_weights,
        "owned": sorted(one.owned),
        "version": one.version,
        "tensor_parallelism": PARALLELISM,
        "alloc_per_node": [sum(node) for node in zip(*allocated, strict=True)],
        "graphs": [
            {
                "inputs": [dataclasses.asdict(port) for port in graph.inputs],
                "outputs": [dataclasses.asdict(port) for port in graph.outputs],
                "weights": {name: weight.digest for name, weight in graph.weights.items()},
            }
            for graph in one.graphs
        ],
    }


def _load(path: Path) -> Compiled:
    meta, operations, weights = archive.read(path)
    model = meta["model"]
    version = current().settings.version
    if model["version"] != version:
        raise RBLNRuntimeError(f"{path} was compiled with {model['version']}, and this is {version}; compile again.")
    graphs = (
        restore(
            one,
            [_port(port) for port in entry["inputs"]],
            [_port(port) for port in entry["outputs"]],
            {name: weights[digest] for name, digest in entry["weights"].items()},
        )
        for one, entry in zip(operations, model["graphs"], strict=True)
    )
    return Compiled(
        graphs=tuple(graphs),
        npu=model["npu"],
        num_devices=model["num_devices"],
        uuid=model["uuid"],
        context=model["context"],
        shares_weights=model["shares_weights"],
        owned=frozenset(model["owned"]),
        version=model["version"],
    )


def _port(entry: Mapping[str, Any]) -> Port:
    return Port(entry["name"], tuple(entry["shape"]), entry["dtype"], entry["static"])
