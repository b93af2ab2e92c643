"""optimum-rbln as a library subject: the classes for RBLN's NPUs in the package `optimum.rbln`."""

from __future__ import annotations

from typing import Any

from vlmqual_adapters.optimum_rbln import FAMILY, LIBRARY, SWITCH, import_optimum, one_of
from vlmqual_adapters.transformers_session import as_numpy
from vlmqual_adapters.transformers_target import software
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Array


class OptimumRblnLibrary:
    """The contract's Library over `optimum.rbln`, with `emulate=1` over an emulator of the vendor's SDK.

    Only what it calls RBLN... is judged here. It compiles models of transformers and brings no other classes of its
    own; those are judged in the library "transformers".

    Attributes:
        name: "optimum-rbln".
        version: its version.
        families: Idefics3; it has no class of the others.
        emulated: True over the emulator.
    """

    name = LIBRARY
    families = (FAMILY,)

    def __init__(self, emulate: str = "0") -> None:
        """Import the library.

        Raises:
            UsageError: it or rebel-compiler is missing, or the emulator refuses.
        """
        self.emulated = SWITCH[one_of("emulate", emulate, tuple(SWITCH))]
        modules = import_optimum({} if self.emulated else None)
        self._torch: Any = modules.torch
        self._package: Any = modules.optimum
        self.version: str = software(LIBRARY)[LIBRARY]

    def resolve(self, name: str) -> Any:
        """The object called `name` in the package root.

        Raises:
            AttributeError: there is no such object.
            Unsupported: it is no class for RBLN's NPUs.
        """
        if not name.startswith("RBLN"):
            raise Unsupported(f"{name} is no class for RBLN's NPUs; it is judged in the library transformers")
        return getattr(self._package, name)

    def to_array(self, value: Any) -> Array | None:
        """A torch tensor as numpy array, types that numpy cannot name widened to float32; None for anything else."""
        if not isinstance(value, self._torch.Tensor):
            return None
        if value.is_floating_point():
            return as_numpy(value)
        array: Array = value.detach().numpy().copy()
        return array

    def from_array(self, array: Array, dtype: str | None = None) -> Any:
        """A numpy array as torch tensor, in `dtype` where given, for example "bfloat16".

        Raises:
            UsageError: torch has no such dtype.
        """
        tensor = self._torch.from_numpy(array.copy())
        if dtype is None:
            return tensor
        wanted = getattr(self._torch, dtype, None)
        if not isinstance(wanted, self._torch.dtype):
            raise UsageError(f"dtype {dtype!r} is unknown to torch; valid are names such as float32 and bfloat16")
        return tensor.to(wanted)
