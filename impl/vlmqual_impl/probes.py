"""Ceiling probes of devices behind a compiler: functions of fixed shapes that do one thing, compiled and timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmqual_impl.entries import Entry, Spec
from vlmqual_impl.runtime.engines import Engine

_WIDTH = 4096  # of the vector that a stream's weights are multiplied with
_REPETITIONS = 5


class Draft:
    """Where the compiled forms of probes are while they are needed: see `vlmqual_impl.artifacts.Shelf`."""

    made_s: Mapping[str, float] = {}

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, entry: Entry, engine: str, make: Callable[[Path], None]) -> Path:
        """Make it; a probe runs once."""
        target = self._folder / entry.name
        target.mkdir()
        make(target)
        return target


@contextmanager
def draft() -> Iterator[Draft]:
    """A shelf that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vlmqual-probe-") as folder:
        yield Draft(Path(folder))


class _Product(nn.Module):
    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
        nn.init.ones_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(m, k) to (m, n)."""
        out: Tensor = self.linear(x)
        return out


def entry(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    """The function of a probe.

    Args:
        name: "stream" reads 2 n weights, as many elements as a copy of n moves, and multiplies them with one vector;
            "gemm" multiplies (m, k) by k x n weights.
        shape: (n,) or (m, n, k).
        dtype: of weights and activations.
    """
    if name == "gemm":
        rows, outputs, inputs = shape
    else:
        inputs = min(_WIDTH, 2 * shape[0])
        rows, outputs = 1, -(-2 * shape[0] // inputs)
    sizes = "x".join(map(str, (rows, outputs, inputs)))
    return Entry(
        name=f"probe-{name}-{sizes}",
        module=_Product(inputs, outputs, dtype).eval(),
        inputs=(Spec("x", (rows, inputs), dtype),),
        outputs=(Spec("y", (rows, outputs), dtype),),
    )


def best_s(engine: Engine, probe: Entry) -> float:
    """Seconds of one call, the best of several; what goes to the device and comes back is in them.

    Raises:
        ValueError: it cannot be compiled.
    """
    program = engine.program(probe)
    inputs = [torch.ones(spec.shape, dtype=spec.dtype) for spec in probe.inputs]
    best = float("inf")
    for _ in range(_REPETITIONS + 1):  # the first touches memory and is not better than the others
        start = time.perf_counter()
        program(inputs)
        best = min(best, time.perf_counter() - start)
    return best
