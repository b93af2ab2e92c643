"""Device memory that the runtimes of one loaded model share: static buffers and weights."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import RBLNRuntimeError
from .graph import Port, torch_dtype
from .model import Compiled, pages

if TYPE_CHECKING:
    from .machine import Machine
    from .runtime import Runtime


class Pool:
    """One copy of a model on some devices: its static buffers, zero at first, and the programs that run over them."""

    def __init__(self, context: str, devices: tuple[int, ...]) -> None:
        self.context = context
        self.devices = devices
        self.buffers: dict[str, Tensor] = {}
        self._members: list[tuple[weakref.ref[Runtime], Compiled]] = []

    @property
    def members(self) -> list[Compiled]:
        """What the living runtimes of this pool run."""
        self._members = [(reference, one) for reference, one in self._members if reference() is not None]
        return [one for _, one in self._members]

    @property
    def device_bytes(self) -> int:
        """Memory in use on each device: the weights of the living runtimes and the buffers, in pages."""
        return self._bytes(self.members, {name: tensor.nbytes for name, tensor in self.buffers.items()})

    def bytes_with(self, compiled: Compiled) -> int:
        """`device_bytes` if one more program joined."""
        buffers = {name: port.size_bytes for name, port in compiled.static.items()}
        return self._bytes([*self.members, compiled], buffers | {n: t.nbytes for n, t in self.buffers.items()})

    def _bytes(self, members: list[Compiled], buffers: dict[str, int]) -> int:
        weights: dict[tuple[str, str], int] = {}
        for one in members:
            holder = "shared" if one.shares_weights else one.uuid
            weights |= {(holder, digest): one.share_bytes(weight.size_bytes) for digest, weight in one.weights.items()}
        divide = len(self.devices)
        return pages(sum(weights.values())) + sum(pages(-(-size // divide)) for size in buffers.values())

    def misfit(self, compiled: Compiled) -> str | None:
        """Why the program cannot run over these buffers: one of another size. None if it can."""
        for name, port in compiled.static.items():
            held = self.buffers.get(name)
            if held is not None and (tuple(held.shape), held.dtype) != (port.shape, torch_dtype(port.dtype)):
                return f"{port}: another program of the same context has it as {list(held.shape)}; resize it in both"
        return None

    def join(self, runtime: Runtime, compiled: Compiled) -> None:
        """Add a program and the buffers that it is the first to need."""
        self._members.append((weakref.ref(runtime), compiled))
        for name, port in compiled.static.items():
            if name not in self.buffers:
                self.buffers[name] = _zeros(port)


def _zeros(port: Port) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be changed outside of it
        return torch.zeros(port.shape, dtype=torch_dtype(port.dtype))


def join(machine: Machine, runtime: Runtime, compiled: Compiled, devices: tuple[int, ...]) -> Pool:
    """The pool of a new runtime: the newest of its context and devices in which its program does not run yet.

    So the prefill and decode programs of one model meet, also when they come from separate files, and a second copy
    of the model that is loaded after the first does not touch it. Load copies one after the other: of two copies
    whose programs are loaded alternately, nothing tells which belong together.

    Raises:
        RBLNRuntimeError: "Lack of device memory", or a buffer has another size than in a program of the same pool.
    """
    with machine.lock:
        pool = next(
            (
                one
                for one in reversed(machine.pools())
                if (one.context, one.devices) == (compiled.context, devices)
                and compiled.uuid not in {member.uuid for member in one.members}
            ),
            None,
        )
        new = pool is None
        pool = Pool(compiled.context, devices) if pool is None else pool
        misfit = pool.misfit(compiled)
        if misfit:
            raise RBLNRuntimeError(misfit + ".")
        extra = pool.bytes_with(compiled) - pool.device_bytes
        machine.reserve(devices, extra, f"the model {compiled.uuid[:8]}")
        pool.join(runtime, compiled)
        if new:
            machine.add(pool)
        return pool
