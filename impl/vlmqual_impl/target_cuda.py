"""A session on a CUDA device, which also tells how long the device itself took. Written from torch's documentation of
events; it has not been run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from vlmqual_contract.target import Array, Features, Inputs, IntArray, Step
from vlmqual_impl.target_session import EagerSession

if TYPE_CHECKING:
    import torch

_Result = TypeVar("_Result")


class CudaSession(EagerSession):
    """See `vlmqual_contract.target.Session`."""

    _events: tuple[torch.cuda.Event, ...] = ()

    def vision(self, inputs: Inputs) -> Features:
        """Between two events of the device's stream."""
        return self._timed(lambda: super(CudaSession, self).vision(inputs))

    def prefill(self, inputs: Inputs, features: Features | Mapping[str, Array] | None = None) -> Step:
        """Between two events of the device's stream."""
        return self._timed(lambda: super(CudaSession, self).prefill(inputs, features))

    def decode(self, step: Step, tokens: IntArray | None = None) -> Step:
        """Between two events of the device's stream."""
        return self._timed(lambda: super(CudaSession, self).decode(step, tokens))

    def device_s(self) -> float:
        """Seconds between the two events of the latest call; the device has to have come to the second."""
        first, last = self._events
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3

    def _timed(self, call: Callable[[], _Result]) -> _Result:
        import torch

        # torch leaves the constructor without types.
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        result = call()
        last.record()
        self._events = (first, last)
        return result
