"""The exceptions of the emulator, named after those that RBLN's documents and users name."""

from __future__ import annotations


class RBLNRuntimeError(RuntimeError):
    """No runtime can be made, or one was called wrongly.

    Documented for a missing NPU and for an NPU that does not match the compiled model
    (docs.rbln.ai, `RBLNCompiledModel.create_runtime`). optimum-rbln wraps any `RuntimeError` and looks for the words
    "Lack of device memory" in it. Which class the SDK raises for wrong inputs is not documented; here it is this one.
    """


class RBLNCompileError(RuntimeError):
    """A model cannot be compiled; the message begins with the name of the stage.

    The stages are documented (docs.rbln.ai, API overview): Model Conversion, Graph Generation, Graph Optimization.
    """


class EmulatorError(RuntimeError):
    """The emulator itself was switched on wrongly, or would stand in front of a real SDK."""
