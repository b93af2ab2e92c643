"""The bundled implementation as a library subject: its classes, by their documented names."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Array
from vlmqual_impl.target import FAMILIES, one_of, package_version
from vlmqual_impl.target_session import widened


class BundledLibrary:
    """The package `vlmqual_impl` as a library subject; with `emulate=1` its RBLN classes run over the emulator.

    Attributes:
        name: "vlmqual_impl".
        version: its version.
        families: all of them.
        emulated: True over the emulator.
    """

    name = "vlmqual_impl"
    families = FAMILIES

    def __init__(self, emulate: str = "0") -> None:
        """Put the emulator in the SDK's place where that is asked for.

        Raises:
            UsageError: `emulate` is neither "0" nor "1", or the emulator refuses.
        """
        one_of("emulate", emulate, ("0", "1"))
        self.version = package_version("vlmqual")
        self.emulated = emulate == "1"
        if self.emulated:
            from vlmqual_rebel import EmulatorError, install

            try:
                install()
            except EmulatorError as error:
                raise UsageError(f"emulate=1: {error}") from error

    def resolve(self, name: str) -> Any:
        """The object called `name` in the package root.

        Raises:
            AttributeError: there is no such object.
            Unsupported: it is a class for RBLN's NPUs, and there is neither SDK nor emulator.
        """
        import vlmqual_impl

        if name.startswith("RBLN") and not package_version("rebel-compiler"):
            raise Unsupported(
                f"{name} needs rebel-compiler, which is not installed; the library vlmqual_impl:emulate=1 runs it over "
                "an emulator"
            )
        return getattr(vlmqual_impl, name)

    def to_array(self, value: Any) -> Array | None:
        """A tensor as numpy array (bfloat16 widened), None for anything else."""
        import torch

        return widened(value) if isinstance(value, torch.Tensor) else None

    def from_array(self, array: Array, dtype: str | None = None) -> Any:
        """A numpy array as tensor, in `dtype` where given.

        Raises:
            UsageError: torch has no dtype of that name.
        """
        import torch

        tensor = torch.as_tensor(np.ascontiguousarray(array))
        if dtype is None:
            return tensor
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise UsageError(f"dtype {dtype!r} is no dtype of torch")
        return tensor.to(kind)
