"""pytest-benchmark as a front: its table, JSON, storage, comparison and histogram, over the values of a run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest

from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Measurement


@dataclass(frozen=True)
class Front:
    """What is asked of pytest-benchmark.

    Attributes:
        json: file for `--benchmark-json`.
        save: name for `--benchmark-save`.
        compare: run for `--benchmark-compare`, "" for the latest one.
        histogram: prefix for `--benchmark-histogram`.
        storage: folder for `--benchmark-storage`.
    """

    json: Path | None = None
    save: str | None = None
    compare: str | None = None
    histogram: str | None = None
    storage: str | None = None

    @property
    def wanted(self) -> bool:
        """True when anything is asked for."""
        return any(value is not None for value in vars(self).values())

    def check(self) -> None:
        """Fail before anything is measured rather than after.

        Raises:
            UsageError: the JSON file cannot be written, or the histogram's library is not installed.
        """
        if self.histogram is not None and importlib.util.find_spec("pygal") is None:
            raise UsageError("--benchmark-histogram needs pygal; install pytest-benchmark[histogram]")
        if self.json is None:
            return
        try:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            new = not self.json.exists()
            with self.json.open("a"):
                pass
            if new:
                self.json.unlink()
        except OSError as error:
            raise UsageError(f"--benchmark-json {self.json}: {error.strerror or error}") from error

    def arguments(self) -> list[str]:
        """As pytest's command line."""
        found: list[str] = []
        if self.json is not None:
            found.append(f"--benchmark-json={self.json}")
        if self.save is not None:
            found.append(f"--benchmark-save={self.save}")
        if self.compare is not None:
            found.append(f"--benchmark-compare={self.compare}" if self.compare else "--benchmark-compare")
        if self.histogram is not None:
            found.append(f"--benchmark-histogram={self.histogram}")
        if self.storage is not None:
            found.append(f"--benchmark-storage={self.storage}")
        return found


class _Rows:
    """Hands the rows to the collected test."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        self._rows = rows

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "row" in metafunc.fixturenames:
            metafunc.parametrize("row", self._rows, ids=[row.case for row in self._rows])


def show(rows: Sequence[Measurement], front: Front) -> None:
    """Replay measured rows through pytest-benchmark.

    Args:
        rows: rows of a run; failed ones are left out.
        front: what to do.

    Raises:
        UsageError: pytest-benchmark refused the arguments.
    """
    rows = [row for row in rows if row.values_s and row.state != "failed"]
    if not rows:
        raise UsageError("there is no measured cell that pytest-benchmark could show")
    suite = Path(str(resources.files("vlmqual_perf.suite")))
    arguments = ["--pyargs", "vlmqual_perf.suite", "-c", os.devnull, f"--rootdir={suite.parent}", "-q", "--no-header"]
    arguments += ["-p", "no:cacheprovider", "--import-mode=importlib", "--benchmark-timer=vlmqual_perf.replay.clock"]
    arguments += ["--benchmark-group-by=group", "--benchmark-columns=min,median,max,iqr,outliers,rounds"]
    code = pytest.main([*arguments, *front.arguments()], plugins=[_Rows(rows)])
    if code != pytest.ExitCode.OK:
        raise UsageError("pytest-benchmark did not accept these --benchmark options; its own message is above")
