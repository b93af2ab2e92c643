"""What is known of the machine that a run was made on, from the standard library alone."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np


def describe() -> dict[str, Any]:
    """Facts that a reader of results needs, and that must be equal for two runs to be compared.

    Returns:
        host, system, processor, cores (that this process may use), memory_bytes, governor (of the first core, "" where
        the system does not say), python, numpy.
    """
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def cores() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Bytes of memory of this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
