"""The emulated machine: its devices, and what of their memory is in use."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import EmulatorError, RBLNRuntimeError
from .settings import NPUS, Npu, Settings, generation

if TYPE_CHECKING:
    from .pools import Pool


class Machine:
    """The devices that `rebel` shows in this process; the memory in use is that of the pools still referred to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lock = threading.RLock()
        self._pools: list[weakref.ref[Pool]] = []

    @property
    def npu(self) -> Npu:
        """The kind of every device."""
        return NPUS[self.settings.npu]

    def pools(self) -> list[Pool]:
        """The pools in use, oldest first."""
        found = [(reference, reference()) for reference in self._pools]
        self._pools = [reference for reference, pool in found if pool is not None]
        return [pool for _, pool in found if pool is not None]

    def add(self, pool: Pool) -> None:
        """Count a pool for as long as anything refers to it."""
        self._pools.append(weakref.ref(pool))

    def reserve(self, devices: Sequence[int], each_bytes: int, what: str) -> None:
        """Check that every device has room for `each_bytes` more.

        Raises:
            RBLNRuntimeError: "Lack of device memory", the words that optimum-rbln looks for.
        """
        for device in devices:
            used = sum(pool.device_bytes for pool in self.pools() if device in pool.devices)
            free = self.settings.capacity_bytes - used
            if each_bytes > free:
                raise RBLNRuntimeError(
                    f"Lack of device memory: {what} needs {each_bytes} bytes more on device {device} "
                    f"({self.settings.npu}, emulated), which has {free} of {self.settings.capacity_bytes} bytes free."
                )

    def select(self, device: object, count: int, npu: str) -> tuple[int, ...]:
        """The devices of a runtime.

        Args:
            device: an id, a list of ids, or None for the first `count` devices.
            count: how many devices the program was compiled for.
            npu: the NPU that it was compiled for.

        Raises:
            RBLNRuntimeError: a device is missing or another NPU, is named twice, or their number is not `count`.
            TypeError: `device` is none of the three.
        """
        settings = self.settings
        if device is None:
            device = list(range(count))
        ids: Sequence[Any] = device if isinstance(device, list | tuple) else [device]
        if not ids or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise TypeError(f"device: {device!r} is neither a device id, a list of device ids nor None.")
        if len(ids) != count:
            raise RBLNRuntimeError(f"device: {device!r} names {len(ids)} device(s), but num_devices is {count}.")
        if len(set(ids)) != len(ids):
            raise RBLNRuntimeError(f"device: {device!r} names a device twice.")
        for one in ids:
            if not 0 <= one < settings.devices:
                valid = f"0 to {settings.devices - 1}" if settings.devices else "none, the host has no NPU"
                raise RBLNRuntimeError(f"device: there is no NPU {one}; valid: {valid} (emulated).")
        if generation(npu) != generation(settings.npu):
            raise RBLNRuntimeError(f"The model was compiled for {npu}, but device {ids[0]} is a {settings.npu}.")
        return tuple(ids)


class _Slot:
    """Holds the machine of this process: `rebel` is a module, and its functions have no other place to look."""

    machine: Machine | None = None


def plug(machine: Machine | None) -> None:
    """Make `machine` the one that `rebel` shows; None takes it away."""
    _Slot.machine = machine


def current() -> Machine:
    """The machine of this process.

    Raises:
        EmulatorError: the emulator is not switched on.
    """
    if _Slot.machine is None:
        raise EmulatorError("The rebel emulator is not switched on; call vlmqual_rebel.install() first.")
    return _Slot.machine


def plugged() -> Machine | None:
    """The machine of this process, or None."""
    return _Slot.machine


def get_npu_name(device_id: int = 0) -> str | None:
    """Name of a device, as RBLN-CA25; None where there is no such device."""
    settings = current().settings
    return settings.npu if 0 <= device_id < settings.devices else None


def npu_is_available(device_id: int = 0) -> bool:
    """Whether there is such a device."""
    return get_npu_name(device_id) is not None


def device_count() -> int:
    """How many devices there are."""
    return current().settings.devices
