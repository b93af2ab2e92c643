"""What the emulated machine is: one frozen table, and its form in an environment variable."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

ENVIRONMENT = "VLMQUAL_REBEL"
NUMERICS = ("float32", "bfloat16")
GROUP_SIZES = (1, 2, 4, 8, 16, 32)
"""Devices that one program may be divided over. Source: torch-rbln, `DeviceMappingManager.h`."""


@dataclass(frozen=True)
class Npu:
    """One NPU as the host sees it. Bytes are what a program may use: the system's reserve is taken off.

    Sources: optimum-rbln 0.12.0 `utils/runtime_utils.py` (16 GiB less 288 MiB per RBLN-CA device; 144 GiB per RBLN-CR
    device, less 1 GiB per chiplet); the version matrix of docs.rbln.ai v0.12.0 (`divisible`: "RSD"). The number of
    chiplets of an RBLN-CR is inferred from its product name, REBEL-Quad.
    """

    name: str
    chiplets: int
    memory_bytes: int
    divisible: bool


def _ca(name: str, divisible: bool = True) -> Npu:
    return Npu(name, chiplets=1, memory_bytes=16 * 2**30 - 288 * 2**20, divisible=divisible)


def _cr(name: str) -> Npu:
    return Npu(name, chiplets=4, memory_bytes=144 * 2**30 - 4 * 2**30, divisible=False)


NPUS = {
    npu.name: npu
    for npu in (
        _ca("RBLN-CA02", divisible=False),
        _ca("RBLN-CA12"),
        _ca("RBLN-CA22"),
        _ca("RBLN-CA25"),
        _cr("RBLN-CR03"),
        _cr("RBLN-CR13"),
    )
}


def generation(npu: str) -> str:
    """The name without its form factor, which a compiled program does not depend on: RBLN-CA25 -> RBLN-CA2.

    Source: optimum-rbln 0.12.0 compares names in this way.
    """
    return re.sub(r"^(RBLN-(?:CA|CR)\d)\d$", r"\1", npu)


@dataclass(frozen=True)
class Settings:
    """The emulated machine.

    Attributes:
        npu: name of every device; one of `NPUS`.
        devices: how many there are; 0 is a host without an NPU, which can compile but not run.
        numeric: "float32" computes in the dtypes of the program. "bfloat16" rounds as third parties report of the
            NPU: the inputs and the result of every product (linear, matmul, convolution, attention) are rounded to
            bfloat16 and accumulated in float32; everything else stays in the dtypes of the program.
        memory_bytes: memory of one device in bytes; None is the NPU's own.
        sdk_version: the version of `rebel-compiler` that is stood in for; reported with "+emulated" behind it.

    Raises:
        ValueError: names the setting, its value and what is valid.
    """

    npu: str = "RBLN-CA25"
    devices: int = 8
    numeric: str = "float32"
    memory_bytes: int | None = None
    sdk_version: str = "0.12.0"

    def __post_init__(self) -> None:
        if self.npu not in NPUS:
            raise ValueError(f"npu: {self.npu!r} is not an NPU that is emulated; valid: {', '.join(NPUS)}")
        if not _count(self.devices) or self.devices < 0:
            raise ValueError(f"devices: {self.devices!r} is not a number of devices; valid: 0, 1, 2, ...")
        if self.numeric not in NUMERICS:
            raise ValueError(f"numeric: {self.numeric!r} is not a numeric mode; valid: {', '.join(NUMERICS)}")
        if self.memory_bytes is not None and (not _count(self.memory_bytes) or self.memory_bytes <= 0):
            raise ValueError(f"memory_bytes: {self.memory_bytes!r} is not a number of bytes; valid: 1, 2, ... or None")
        if not isinstance(self.sdk_version, str) or not re.fullmatch(r"\d+(\.\d+){1,2}", self.sdk_version):
            raise ValueError(f"sdk_version: {self.sdk_version!r} is not a version; valid: three numbers, as in 0.12.0")

    @property
    def version(self) -> str:
        """What `rebel.__version__` and the metadata of `rebel-compiler` say, as in 0.12.0+emulated."""
        return f"{self.sdk_version}+emulated"

    @property
    def capacity_bytes(self) -> int:
        """Memory of one device that programs may use, in bytes."""
        return NPUS[self.npu].memory_bytes if self.memory_bytes is None else self.memory_bytes

    def as_environment(self) -> dict[str, str]:
        """These settings as the environment variable with which a worker process is started."""
        return {ENVIRONMENT: json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings | None:
        """The settings in an environment; None where it has none.

        Raises:
            ValueError: the variable is not a JSON object of the attributes of this class.
        """
        text = environment.get(ENVIRONMENT)
        if not text:
            return None
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        if not isinstance(given, dict) or not set(given) <= set(names):
            raise ValueError(f"{ENVIRONMENT}: {text!r} is not a JSON object with some of the keys {', '.join(names)}")
        return cls(**given)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
