"""What a request would make of a device: functions, their shapes, and bytes. Told before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Graph:
    """A function of fixed shapes that would be compiled.

    Attributes:
        name: kind and sizes.
        tensors: inputs, then states, for example "bias float32[1, 1, 128, 2048]".
        calls: how often the request would run it.
        weights_bytes: of the weights that it reads, on all devices together.
    """

    name: str
    tensors: tuple[str, ...]
    calls: int
    weights_bytes: int


@dataclass(frozen=True)
class Footprint:
    """What would be compiled and run for one request, and what it would keep on a device.

    Attributes:
        graphs: functions in the order of their first call; empty where operations run one by one.
        devices: that the model is divided over.
        weights_bytes: of weights on the fullest device.
        cache_bytes: of keys and values, those of images included, on the fullest device.
        memory_bytes: that a device has, None where it is not known.
        tokens: of the prompts with their padding, all rows together; 0 where they were not counted.
        notes: sentences on how this was found.
    """

    graphs: tuple[Graph, ...]
    devices: int
    weights_bytes: int
    cache_bytes: int
    memory_bytes: int | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()

    @property
    def needed_bytes(self) -> int:
        """Weights and cache on the fullest device."""
        return self.weights_bytes + self.cache_bytes

    def plain(self) -> dict[str, Any]:
        """As JSON would have it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Footprint:
        """What `plain` made.

        Raises:
            TypeError, KeyError: it is something else.
        """
        graphs = tuple(Graph(**{**graph, "tensors": tuple(graph["tensors"])}) for graph in values["graphs"])
        return cls(**{**values, "graphs": graphs, "notes": tuple(values["notes"])})
