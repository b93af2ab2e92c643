"""A model run in outline: the real code around the functions of fixed shapes, over functions that compute nothing.

What is called, how often and with which shapes is then known before a weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmqual_impl.entries import Entry
from vlmqual_impl.runtime.engines import States


def hollow(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a network on the meta device weights of zero that take no memory."""
    tied: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or not weight.is_meta:
                continue
            if id(weight) not in tied:
                zero = torch.zeros((), dtype=dtype).expand(weight.shape)
                tied[id(weight)] = nn.Parameter(zero, requires_grad=False)
            module._parameters[name] = tied[id(weight)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.zeros((), dtype=kind).expand(buffer.shape)
    return network


@dataclass
class Recorded:
    """An entry and how often it was called."""

    entry: Entry
    calls: int = 0


class Recorder:
    """An engine that notes what it is asked for, and answers zeros.

    Attributes:
        name: see `Engine.name`.
        made_s: see `Engine.made_s`; nothing is made.
        programs: by name, in the order of their making.
    """

    name = "none"

    def __init__(self) -> None:
        self.made_s: dict[str, float] = {}
        self.programs: dict[str, Recorded] = {}

    def program(self, entry: Entry, mates: Sequence[Entry] = ()) -> RecordedProgram:
        """See `Engine.program`."""
        return RecordedProgram(self.programs.setdefault(entry.name, Recorded(entry)))

    def new_states(self, entry: Entry) -> States:
        """See `Engine.new_states`."""
        return None

    def weights_bytes(self, *, shared: bool, states: bool | None = None) -> int:
        """Bytes of the weights of functions.

        Args:
            shared: count a weight that several read once.
            states: only functions with states, or only those without; None for all.
        """
        entries = [each.entry for each in self.programs.values()]
        chosen = [entry for entry in entries if states is None or bool(entry.states) == states]
        if not shared:
            return sum(entry.weights_bytes for entry in chosen)
        weights = {id(weight): weight for entry in chosen for weight in entry.weights()}
        return sum(weight.numel() * weight.element_size() for weight in weights.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the states, which functions share, and of the keys and values of images."""
        states = max((each.entry.states_bytes for each in self.programs.values()), default=0)
        images = (
            sum(spec.size_bytes for spec in each.entry.inputs if spec.name.startswith("cross_"))
            for each in self.programs.values()
        )
        return states + max(images, default=0)


class RecordedProgram:
    """See `Recorder`."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded

    def __call__(self, inputs: Sequence[Tensor], states: States = None) -> tuple[list[Tensor], States]:
        """Zeros of the shapes of the outputs.

        Raises:
            ValueError: an input has another shape or dtype than the entry says.
        """
        entry = self._recorded.entry
        for spec, tensor in zip(entry.inputs, inputs, strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
                raise ValueError(f"{entry.name}: {spec} was given {tensor.dtype}{list(tensor.shape)}")
        self._recorded.calls += 1
        return [torch.zeros((), dtype=spec.dtype).expand(spec.shape) for spec in entry.outputs], None
