"""Weights that stay in their files until a block needs them, within a bound of memory.

A model is built on the meta device. What no block holds (norms, projections, position tables) is read once. A unit is
an entry of a list of blocks, the token embedding or the head: while it does not run, every parameter of it is a single
NaN that is shown in the parameter's shape, so that a use at the wrong time cannot go unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlmqual_contract.errors import UsageError
from vlmqual_impl.weights import stored, wanted_name

GIB = 2**30
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter of the model and where its numbers are.

    Attributes:
        name: in the model.
        owners: every module and attribute that holds it; several where tensors are tied.
        shape: its shape.
        file: safetensors file.
        key: name in that file.
    """

    name: str
    owners: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]
    file: Path
    key: str


@dataclass(eq=False)
class Unit:
    """What is read, run and dropped together.

    Attributes:
        name: of the module.
        module: it.
        places: its parameters.
        bytes: of them in the compute dtype.
        here: they are in memory.
    """

    name: str
    module: nn.Module
    places: tuple[Place, ...]
    bytes: int
    here: bool = field(default=False)


class Shelf:
    """A model on the meta device whose units are read when they are needed.

    Attributes:
        units: in the order of the model's attributes.
        outside_bytes: of what is always in memory.
        read_bytes: of everything that was read from files so far, as it is stored.
        reads: how often a unit was read.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: Path,
        *,
        rename: Sequence[tuple[str, str | None]],
        dtype: torch.dtype,
        memory: int,
        ends: Sequence[nn.Module] = (),
    ) -> None:
        """Read what is outside of the units.

        Args:
            model: on the meta device.
            directory: of the checkpoint.
            rename: see `vlmqual_impl.weights`.
            dtype: to compute in.
            memory: bytes that weights may take at most.
            ends: modules that are units beside the blocks.

        Raises:
            UsageError: a file or tensor is missing, of another shape, or no floating-point number; or the bound is less
                than what has to be in memory at one time.
        """
        self._dtype = dtype
        self.read_bytes = self.reads = 0
        places = _places(model, directory, rename)
        chosen = {*_blocks(model), *ends}
        self.units = [self._unit(name, module, places) for name, module in model.named_modules() if module in chosen]
        inside = {id(place) for unit in self.units for place in unit.places}
        outside = [place for place in places.values() if id(place) not in inside]
        self.outside_bytes = self._bytes(outside)
        largest = max(self.units, key=lambda unit: unit.bytes)
        least = self.outside_bytes + largest.bytes
        if memory < least:
            raise UsageError(
                f"--memory {memory / GIB:.3g} GiB is too little: in {str(dtype).removeprefix('torch.')} "
                f"{largest.name} and what no block holds take {least / GIB:.3g} GiB"
            )
        self._room = memory - least
        for unit in self.units:
            self._drop(unit)
        self._outside = tuple(outside)
        self._read(outside)

    def _unit(self, name: str, module: nn.Module, places: Mapping[int, Place]) -> Unit:
        own = tuple(places[id(parameter)] for parameter in module.parameters())
        return Unit(name, module, own, self._bytes(own))

    def _bytes(self, places: Sequence[Place]) -> int:
        return sum(torch.Size(place.shape).numel() for place in places) * self._dtype.itemsize

    @contextmanager
    def loaded(self, unit: Unit) -> Iterator[None]:
        """A unit's parameters in memory; afterwards they stay only where the bound leaves room."""
        if unit.here:
            yield
            return
        self.reads += 1
        self._read(unit.places)
        unit.here = True
        try:
            yield
        finally:
            if unit.bytes <= self._room:
                self._room -= unit.bytes
            else:
                self._drop(unit)

    def clear(self) -> None:
        """Drop everything; the model cannot be run any more."""
        for unit in self.units:
            self._drop(unit)
        for place in self._outside:
            _put(place, torch.empty((), dtype=self._dtype))

    def _drop(self, unit: Unit) -> None:
        nothing = torch.full((), float("nan"), dtype=self._dtype)
        for place in unit.places:
            _put(place, nothing.expand(place.shape))
        unit.here = False

    def _read(self, places: Sequence[Place]) -> None:
        for file in dict.fromkeys(place.file for place in places):
            with _opened(file) as handle:  # closed again, so that the file's pages do not count as ours
                for place in places:
                    if place.file == file:
                        view = handle.get_slice(place.key)
                        piece = view[(slice(None),) * len(place.shape)] if place.shape else view[...]
                        self.read_bytes += piece.nbytes
                        _put(place, torch.empty(place.shape, dtype=self._dtype).copy_(piece))


def _put(place: Place, value: Tensor) -> None:
    parameter = nn.Parameter(value, requires_grad=False)
    for module, attribute in place.owners:
        setattr(module, attribute, parameter)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Entries of every list of modules that is in no other; of an entry that is a list itself its entries."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            for entry in module:
                yield from entry if isinstance(entry, nn.ModuleList) else (entry,)
        else:
            yield from _blocks(module)


def _places(model: nn.Module, directory: Path, rename: Sequence[tuple[str, str | None]]) -> dict[int, Place]:
    """Every parameter, by its identity, with the file that holds it."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((f"{prefix}.{attribute}".lstrip("."), module, attribute))
    names = {name: key for key, held in owners.items() for name, _, _ in held}
    try:
        files = stored(directory)
    except ValueError as error:
        raise UsageError(str(error)) from error
    found: dict[int, Place] = {}
    for key, file in files.items():
        name = wanted_name(key, names, rename)
        if name is None:
            continue
        if name not in names:
            raise UsageError(f"{file}: {key} is left over; {type(model).__name__} does not have it")
        held = owners[names[name]]
        module, attribute = held[0][1:]
        shape = tuple(getattr(module, attribute).shape)
        if names[name] not in found or name == held[0][0]:  # of tied tensors a file may hold either name, or both
            found[names[name]] = Place(held[0][0], tuple((m, a) for _, m, a in held), shape, file, key)
    if missing := [held[0][0] for key, held in owners.items() if key not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"{directory}: {missing[0]}{more} missing, which {type(model).__name__} needs")
    for file in dict.fromkeys(place.file for place in found.values()):
        with _opened(file) as handle:
            for place in found.values():
                if place.file == file:
                    _check(place, handle.get_slice(place.key))
    return found


def _check(place: Place, view: Any) -> None:
    if view.get_dtype() not in _FLOATS:
        raise UsageError(f"{place.file}: {place.key} is stored as {view.get_dtype()}; {', '.join(_FLOATS)} can be read")
    if tuple(view.get_shape()) != place.shape:
        raise UsageError(
            f"{place.file}: {place.key} has shape {tuple(view.get_shape())}; the configuration wants {place.shape}"
        )


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{file}: truncated or no safetensors file ({error})") from error
