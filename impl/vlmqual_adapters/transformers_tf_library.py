"""The TensorFlow classes of the installed transformers as a library subject."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmqual_adapters.transformers_tf import FAMILY, import_tensorflow
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Array


class TransformersTfLibrary:
    """The contract's Library over transformers with TensorFlow: its tensors are TensorFlow's.

    It has the TensorFlow classes and the configurations that they take. All else is judged in the library
    "transformers", with PyTorch, and what concerns it does not apply here: without PyTorch the package root has
    placeholders for models and processor, and the image processor fails unless asked for other tensors.

    Attributes:
        name: "transformers-tf".
        version: its version.
        families: Idefics; the others have no TensorFlow classes.
    """

    name = "transformers-tf"
    families = (FAMILY,)

    def __init__(self) -> None:
        """Import TensorFlow and transformers.

        Raises:
            UsageError: one of them is missing.
        """
        self._tensorflow, self._package = import_tensorflow()
        self.version: str = self._package.__version__

    def resolve(self, name: str) -> Any:
        """The object called `name` in the package root.

        Raises:
            AttributeError: there is no such object.
            Unsupported: it is neither a TensorFlow class nor a configuration.
        """
        found = getattr(self._package, name)
        if not name.startswith("TF") and not name.endswith("Config"):
            raise Unsupported(f"{name} is no TensorFlow class; it is judged in the library transformers")
        return found

    def to_array(self, value: Any) -> Array | None:
        """A tensor or variable as numpy array, bfloat16 widened to float32; None for anything else."""
        tf = self._tensorflow
        if not isinstance(value, (tf.Tensor, tf.Variable)):
            return None
        return np.array(tf.cast(value, tf.float32) if value.dtype == tf.bfloat16 else value)

    def from_array(self, array: Array, dtype: str | None = None) -> Any:
        """A numpy array as TensorFlow tensor, in `dtype` where given, for example "bfloat16".

        Raises:
            UsageError: TensorFlow has no such dtype.
        """
        tensor = self._tensorflow.constant(np.array(array))
        if dtype is None:
            return tensor
        try:
            return self._tensorflow.cast(tensor, dtype)
        except TypeError as error:
            raise UsageError(f"dtype {dtype!r} is unknown to TensorFlow; valid are names such as float32") from error
