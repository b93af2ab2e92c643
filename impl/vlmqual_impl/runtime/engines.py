"""What a compiler and its executor have to offer: programs made from entries, run on tensors.

States are passed along by the caller and never looked at: only an engine knows where they live.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmqual_impl.entries import Entry

States = Any


class Program(Protocol):
    """A compiled entry."""

    def __call__(self, inputs: Sequence[Tensor], states: States = None) -> tuple[list[Tensor], States]:
        """Run it: tensors in the order of `Entry.inputs`, to those of `Entry.outputs` and the changed states."""
        ...


class Forms(Protocol):
    """Where compiled forms are kept; see `vlmqual_impl.artifacts.Shelf`."""

    @property
    def made_s(self) -> Mapping[str, float]:
        """Seconds that it took to make a form, by the entry's name."""
        ...

    def place(self, entry: Entry, engine: str, make: Callable[[Path], None]) -> Path:
        """See `Shelf.place`."""
        ...


class Engine(Protocol):
    """Makes programs.

    Attributes:
        name: with version, for example "onnxruntime 1.31.1".
    """

    name: str

    @property
    def made_s(self) -> Mapping[str, float]:
        """Seconds that it took to make compiled forms, by the entry's name; those that were found are not in it."""
        ...

    def program(self, entry: Entry, mates: Sequence[Entry] = ()) -> Program:
        """Compile an entry, or find what was compiled before.

        Args:
            entry: what is compiled.
            mates: entries of the same states that will follow; compiled with it where that matters.

        Raises:
            ValueError: it cannot be compiled, or what was found is damaged.
        """
        ...

    def new_states(self, entry: Entry) -> States:
        """Empty states for an entry and all others with the same ones."""
        ...


def exported(entry: Entry) -> torch.export.ExportedProgram:
    """An entry as a graph, its states after its inputs."""
    example = tuple(spec.zeros() for spec in (*entry.inputs, *entry.states))
    with torch.no_grad():
        return torch.export.export(entry.module, example, strict=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters and converters print, and warn of in each other's code, from the user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
