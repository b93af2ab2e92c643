"""Launches on disk, one line each as they are made: killing a gate loses at most the launch in flight."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from vlmqual_contract.errors import UsageError
from vlmqual_perf.gate_launches import Launch

FORMAT = 1
SUFFIX = ".launches"
_PATIENCE_S = 1.0


class Journal:
    """The launches of one gate.

    The newest unfinished file of the same plan is continued; else a new one is begun. While it is open no other process
    writes it.

    Args:
        directory: where journals are.
        plan: plain data that has to be equal for a later run to continue this one.
        fresh: begin a new one in any case.

    Attributes:
        path: of the file.
        launches: that are there, in the order in which they were made.

    Raises:
        UsageError: the directory cannot be written, or another process writes the journal that would be continued.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.launches: list[Launch] = []
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.glob(f"gate-{digest}-*{SUFFIX}"), reverse=True):
                if not fresh and self._continue(path):
                    return
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            self.path = directory / f"gate-{digest}-{stamp}{SUFFIX}"
            self._file: IO[bytes] = self.path.open("ab")
            self._lock()
            self._write({"format": FORMAT, "plan": dict(plan)})
        except OSError as error:
            raise UsageError(f"results directory {directory}: {error.strerror or error}") from error

    def add(self, launch: Launch) -> None:
        """Keep one launch; it is on disk when this returns."""
        self._write(launch.plain())
        self.launches.append(launch)

    def finish(self) -> None:
        """Nothing will be added: the same command starts anew."""
        self._write({"finished": True})
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _continue(self, path: Path) -> bool:
        """Take over a file that is not finished; what was cut off in the middle of a line is dropped."""
        self.path = path
        self._file = path.open("ab")
        self._lock()
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            head, *rows = [json.loads(line) for line in whole.splitlines()]
            if head["format"] != FORMAT:
                raise ValueError
            self.launches = [Launch.from_plain(row) for row in rows]  # the last row of a finished one is no launch
        except (ValueError, KeyError, TypeError, AttributeError):
            self.close()
            return False
        self._file.truncate(len(whole))
        return True

    def _lock(self) -> None:
        """Take the lock; a gate that was just killed may hold it for a moment, by a worker that it was starting."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_PATIENCE_S / 20)
                    continue
            self.close()
            raise UsageError(
                f"{self.path} is being written by another gate; wait for its end, or start anew with --fresh"
            )

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
