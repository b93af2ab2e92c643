"""Temperature, power and memory of accelerators, as their own tools tell them: rbln-smi and nvidia-smi."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_WAIT_S = 5.0
_RBLN = ("rbln-smi", "-b", "-j")
_NVIDIA = (
    "nvidia-smi",
    "--query-gpu=index,name,temperature.gpu,power.draw,memory.used,memory.total,driver_version",
    "--format=csv,noheader,nounits",
)
_TO_WATTS = {"uW": 1e-6, "mW": 1e-3, "W": 1.0}


@dataclass(frozen=True)
class Reading:
    """One device at one moment; None for what its tool does not tell.

    Attributes:
        device: name and number, for example "RBLN-CA25 0".
        temperature_c: degrees Celsius.
        power_w: watts; of the whole card where the tool tells that.
        memory_used_bytes: in use, by whomever.
        memory_bytes: that there are.
        driver: its version.
    """

    device: str
    temperature_c: float | None = None
    power_w: float | None = None
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    driver: str = ""


def readings() -> list[dict[str, Any]]:
    """Every accelerator whose tool is installed here, as plain data; empty where there is none."""
    return [asdict(reading) for reading in (*_rbln(_output(_RBLN)), *_nvidia(_output(_NVIDIA)))]


def _output(command: tuple[str, ...]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _rbln(text: str) -> Iterator[Reading]:
    """Of `rbln-smi -b -j`: objects with a key `npu`, wherever they stand. Written from reports; seen on no device."""
    with contextlib.suppress(ValueError):
        for device in _devices(json.loads(text)):
            memory = device.get("memory")
            held: Mapping[str, Any] = memory if isinstance(memory, Mapping) else {}
            name = device.get("name") or "RBLN"
            yield Reading(
                f"{name} {device['npu']}",
                _number(device.get("temperature")),
                _watts(device.get("card_power")),
                _whole(held.get("used")),
                _whole(held.get("total")),
                str(device.get("KMD_version") or ""),
            )


def _devices(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if "npu" in value:
            yield value
            return
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _devices(each)


def _nvidia(text: str) -> Iterator[Reading]:
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 7:
            index, name, temperature, power, used, total, driver = fields
            sizes = [None if (mib := _number(size)) is None else int(mib * 2**20) for size in (used, total)]
            yield Reading(f"{name} {index}", _number(temperature), _number(power), sizes[0], sizes[1], driver)


def _number(value: Any) -> float | None:
    """The number that a text begins with: "38C" is 38."""
    found = re.match(r"\s*(-?\d+(?:\.\d+)?)", str(value))
    return float(found[1]) if found else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _watts(value: Any) -> float | None:
    """Watts: "18810987uW" is 18.8; a number without a unit is in watts."""
    number = _number(value)
    unit = re.search(r"[a-zA-Z]+$", str(value).strip())
    return None if number is None else number * _TO_WATTS.get(unit[0] if unit else "W", float("nan"))
