"""The installed transformers as a library subject."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array

#: A class by which a version shows that it has the family.
SIGNS = {"idefics": "IdeficsConfig", "idefics3": "Idefics3Config", "mllama": "MllamaConfig"}


class TransformersLibrary:
    """The contract's Library over the transformers package of this environment.

    Attributes:
        name: "transformers".
        version: its version.
        families: those that this version has.
    """

    name = "transformers"

    def __init__(self) -> None:
        """Import torch and transformers.

        Raises:
            UsageError: one of them is missing.
        """
        try:
            self._torch: Any = import_module("torch")
            self._package: Any = import_module("transformers")
        except ImportError as error:
            raise UsageError(f"transformers cannot be imported ({error}); install vlmqual[impl]") from error
        self.version: str = self._package.__version__
        self.families = tuple(family for family, sign in SIGNS.items() if hasattr(self._package, sign))

    def resolve(self, name: str) -> Any:
        """The object called `name` in the package root.

        Raises:
            AttributeError: there is no such object.
        """
        return getattr(self._package, name)

    def to_array(self, value: Any) -> Array | None:
        """A torch tensor as numpy array, types that numpy cannot name widened to float32; None for anything else."""
        if not isinstance(value, self._torch.Tensor):
            return None
        tensor = value.detach().cpu()
        try:
            return np.array(tensor.numpy())
        except TypeError:  # bfloat16, float8: all their values are float32 values
            return np.array(tensor.float().numpy())

    def from_array(self, array: Array, dtype: str | None = None) -> Any:
        """A numpy array as torch tensor, in `dtype` where given, for example "bfloat16".

        Raises:
            UsageError: torch has no such dtype.
        """
        tensor = self._torch.from_numpy(np.array(array))
        if dtype is None:
            return tensor
        wanted = getattr(self._torch, dtype, None)
        if not isinstance(wanted, self._torch.dtype):
            raise UsageError(f"dtype {dtype!r} is unknown to torch; valid are names such as float32 and bfloat16")
        return tensor.to(wanted)
