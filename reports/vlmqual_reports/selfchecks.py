"""What `vlmqual perf --self-check` found: how far the harness was from times that are known.

A self-check is one file, `selfcheck.json`. Its figures are those of the machine and the moment at which it was made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError

NAME = "selfcheck.json"
FORMAT = 1


@dataclass(frozen=True)
class Line:
    """One phase of one simulated target, in milliseconds, errors in microseconds and percent."""

    truth: str
    tp: int
    phase: str
    samples: int
    mean_ms: float
    error_us: float
    p99_ms: float | None
    p99_error: float | None


@dataclass(frozen=True)
class SelfCheck:
    """A self-check as the page shows it.

    Attributes:
        path: of its file.
        fine: everything was within what is allowed.
        lines: every phase of every simulated target.
        disturbed: runs with cold starts or bucket misses among what was counted.
        disturbed_valid: of these, called valid.
        clean: runs without.
        clean_valid: of these, called valid.
        overhead_us: what watching costs a decode step.
    """

    path: Path
    fine: bool
    lines: tuple[Line, ...]
    disturbed: int
    disturbed_valid: int
    clean: int
    clean_valid: int
    overhead_us: float


def read(path: Path) -> SelfCheck:
    """Read a self-check.

    Raises:
        UsageError: it cannot be read, or is of a format that this version does not know.
    """
    try:
        whole: Any = json.loads(path.read_text("utf-8"))
        if whole["format"] != FORMAT:
            raise UsageError(f"{path}: format {whole['format']!r} is unknown; this version reads {FORMAT}")
        lines = tuple(_line(one) for one in whole["compared"])
        return SelfCheck(path, bool(whole["right"]), lines, **whole["accepted"], overhead_us=1e6 * whole["overhead_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read as a self-check of the harness: {error}") from error


def _line(one: Any) -> Line:
    p99, true = one["p99_s"], one["true_p99_s"]
    return Line(
        truth=str(one["truth"]),
        tp=int(one["tp"]),
        phase=str(one["phase"]),
        samples=int(one["samples"]),
        mean_ms=1e3 * one["mean_s"],
        error_us=1e6 * (one["mean_s"] - one["true_mean_s"]),
        p99_ms=None if p99 is None else 1e3 * p99,
        p99_error=None if p99 is None or true is None else p99 / true - 1,
    )
