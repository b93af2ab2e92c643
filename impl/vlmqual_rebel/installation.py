"""Putting the emulator where programs look for the SDK, and taking it away."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import EmulatorError, RBLNCompileError, RBLNRuntimeError
from .settings import Settings

DISTRIBUTION = "rebel-compiler"
MODULES = ("rebel", "rebel.compile_context", "rebel.core", "rebel.core.exception")


def install(
    npu: str = "RBLN-CA25",
    devices: int = 8,
    numeric: str = "float32",
    memory_bytes: int | None = None,
    sdk_version: str = "0.12.0",
) -> ModuleType:
    """Make `import rebel` give the emulator in this process. The arguments are those of `Settings`.

    Returns:
        the module `rebel`; its `EMULATED` is True.

    Raises:
        ValueError: a setting is not valid.
        EmulatorError: a real SDK is there, or the emulator is already on with other settings.
    """
    return install_from(Settings(npu, devices, numeric, memory_bytes, sdk_version))


def install_from(settings: Settings) -> ModuleType:
    """As `install`, with settings from elsewhere, as from `Settings.from_environment(os.environ)`."""
    from . import machine

    plugged = machine.plugged()
    if plugged is not None:
        if plugged.settings != settings:
            raise EmulatorError(f"The rebel emulator is already on with {plugged.settings}; uninstall() it first.")
        return sys.modules["rebel"]
    _refuse_real_sdk()
    modules = _modules(settings)
    machine.plug(machine.Machine(settings))
    sys.modules.update(modules)
    sys.meta_path.append(_Metadata(settings.version))
    return modules["rebel"]


def installed() -> Settings | None:
    """The settings of the emulator that is on in this process, or None."""
    from . import machine

    plugged = machine.plugged()
    return None if plugged is None else plugged.settings


def uninstall() -> None:
    """Take the emulator away. Programs that imported it keep what they hold; the operators stay registered."""
    from . import machine

    machine.plug(None)
    for name in MODULES:
        if getattr(sys.modules.get(name), "EMULATED", False):
            del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Metadata)]


def _refuse_real_sdk() -> None:
    place = None
    if "rebel" in sys.modules:
        place = getattr(sys.modules["rebel"], "__file__", None) or "sys.modules"
    else:
        spec = importlib.util.find_spec("rebel")
        if spec is not None:
            place = spec.origin or ", ".join(spec.submodule_search_locations or [])
    if place is None:
        try:
            place = f"the distribution {DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"
        except importlib.metadata.PackageNotFoundError:
            return
    raise EmulatorError(f"A real rebel is installed ({place}); the emulator does not stand in front of it.")


def _modules(settings: Settings) -> dict[str, ModuleType]:
    from . import operators
    from .compilation import compile, compile_from_torch
    from .context import CompileContext
    from .machine import device_count, get_npu_name, npu_is_available
    from .model import RBLNCompiledModel
    from .runtime import AsyncRuntime, Runtime

    assert operators.LIBRARY is not None  # imported because that registers them
    contents: dict[str, dict[str, Any]] = {
        "rebel": {
            "__version__": settings.version,
            "AsyncRuntime": AsyncRuntime,
            "CompileContext": CompileContext,
            "RBLNCompiledModel": RBLNCompiledModel,
            "Runtime": Runtime,
            "compile": compile,
            "compile_from_torch": compile_from_torch,
            "device_count": device_count,
            "get_npu_name": get_npu_name,
            "npu_is_available": npu_is_available,
        },
        "rebel.compile_context": {"CompileContext": CompileContext},
        "rebel.core": {},
        "rebel.core.exception": {"RBLNCompileError": RBLNCompileError, "RBLNRuntimeError": RBLNRuntimeError},
    }
    modules: dict[str, ModuleType] = {}
    for name in MODULES:
        module = ModuleType(name, "Emulated by vlmqual_rebel on this CPU.")
        module.__spec__ = ModuleSpec(name, None, origin="vlmqual_rebel", is_package=name in ("rebel", "rebel.core"))
        module.__path__ = []
        vars(module).update(contents[name], EMULATED=True)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
        modules[name] = module
    return modules


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, version: str) -> None:
        self._version = version

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        summary = "Emulated by vlmqual_rebel"
        return f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {self._version}\nSummary: {summary}\n"

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / str(path)


class _Metadata(importlib.metadata.DistributionFinder):
    """Answers `importlib.metadata.version("rebel-compiler")`, which optimum-rbln asks for when it is imported."""

    def __init__(self, version: str) -> None:
        self._version = version

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        name = None if context is None else context.name
        if name is None or name.lower().replace("_", "-") == DISTRIBUTION:
            yield _Distribution(self._version)
