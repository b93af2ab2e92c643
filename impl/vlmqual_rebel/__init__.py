"""A CPU emulator of the public `rebel` API (RBLN's SDK), so that code for RBLN's NPUs runs without one.

Everything made with it is emulated. It shows whether the code over it is right: what is compiled, in which order,
with which shapes, caches and masks. It shows nothing about an NPU: no latency, no number formats but a rounding mode,
no limits of the compiler. Tensor parallelism is accounted for (memory, devices), not emulated.

It is never on by itself: call `install`, or start a program with `python -m vlmqual_rebel`. It was written from
RBLN's documentation, from the calls of Apache-2.0 wheels, and from reports of users; it reads no file of the real SDK,
and refuses to stand in front of one.
"""

from .errors import EmulatorError
from .installation import install, install_from, installed, uninstall
from .settings import ENVIRONMENT, NPUS, Settings

__all__ = ["ENVIRONMENT", "NPUS", "EmulatorError", "Settings", "install", "install_from", "installed", "uninstall"]
