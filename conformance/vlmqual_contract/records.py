"""Results on disk: JSON lines with a header, rows written as they happen, and a footer.

A file without its footer is incomplete and never counts as passed. Killing a run loses at most the case in flight:
every row is on disk before the next case starts, a line cut in the middle is dropped when the file is opened again, and
a run with the same identity goes on where the last one stopped. Raw values are kept; statistics are the reader's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from vlmqual_contract.errors import UsageError

FORMAT = 1


class Outcome(StrEnum):
    """What became of a case."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"  # crashed, hung, answered NaN or a wrong shape
    EXPECTED_FAIL = "expected-fail"  # a known failure, with reason and expiry
    NOT_APPLICABLE = "not-applicable"  # a capability is missing, or the case cannot be tried here


@dataclass(frozen=True)
class Header:
    """First row: who ran what where.

    Attributes:
        kind: "conformance" or "perf".
        subject: target string, or "library NAME".
        suite: version of vlmqual.
        info: the target's `Info` (or the library's name and version) as a mapping.
        machine: the machine's description.
        command: the command line.
        plan: what decides which cases belong to the run: families, levels, suite, TP sizes, fixture digest.
        run: identity of this run.
        started: ISO time, UTC.
        format: number of this format.
    """

    kind: Literal["conformance", "perf"]
    subject: str
    suite: str
    info: Mapping[str, Any]
    machine: Mapping[str, Any]
    command: str
    plan: Mapping[str, Any]
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: str = field(default_factory=lambda: _now())
    format: int = FORMAT

    def identity(self) -> str:
        """Digest of everything that must be equal for a later run to continue this one."""
        keys = (self.kind, self.subject, self.suite, self.format, self.info, self.plan, self.machine)
        return hashlib.sha256(json.dumps(keys, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """One conformance case.

    Attributes:
        case: unique name of the case in this file.
        requirements: ids that it checks.
        family: `model_type`.
        level: level of the suite.
        outcome: see `Outcome`.
        reason: for anything but a pass: one sentence.
        worst: error divided by budget, 1.0 is on the limit; None where nothing is compared numerically.
        component: the tensor that `worst` belongs to; for a failure the component that first left its budget or
            is no answer, as NaN is none.
        dtype: declared compute dtype that set the budget.
        seconds: host time that the case took.
        details: further plain data: observed values, seeds, expiry of a known failure.
    """

    case: str
    requirements: tuple[str, ...]
    family: str
    level: str
    outcome: Outcome
    reason: str = ""
    worst: float | None = None
    component: str = ""
    dtype: str = ""
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


#: A measurement's verdict on itself. "too-few": its repetitions say nothing of the spread; "noisy": only a large change
#: would have been seen, or single values stand far off; "not-steady": it still changed; "throttled": it became slower
#: while it was measured; "wrong-bucket": equal calls ran in different fixed shapes; "failed": there is no measurement.
State = Literal["valid", "too-few", "noisy", "not-steady", "throttled", "wrong-bucket", "failed"]


@dataclass(frozen=True)
class Measurement:
    """One cell of a performance run: a phase of a scenario at a TP size.

    Attributes:
        case: unique name of the cell in this file.
        scenario: id of the scenario.
        family: `model_type`.
        phase: "load", "first-call", "compile", "preprocess", "vision", "prefill", "decode" or "ttft".
        tp: tensor-parallel size.
        batch: rows.
        dtype: declared compute dtype.
        shape: images, tiles, image_tokens, prompt_tokens, new_tokens, ... as numbers.
        values_s: seconds; a list for each repetition after warm-up, in it a value for each step, of the slowest rank.
        warmup_s: the same for the repetitions that were not counted.
        began_s: monotonic clock of rank 0's host when each counted repetition began.
        device_s: as `values_s`, by the devices' own clocks; empty where the target's sessions have none.
        state: the measurement's verdict on itself, see `State`.
        reason: one sentence for anything but valid.
        tokens_digest: SHA-256 of the generated token ids, "" where none are generated.
        checks: further plain data: threads per rank, comparison with TP=1, resolution of the clock.
    """

    case: str
    scenario: str
    family: str
    phase: str
    tp: int
    batch: int
    dtype: str
    shape: Mapping[str, int]
    values_s: tuple[tuple[float, ...], ...]
    warmup_s: tuple[tuple[float, ...], ...] = ()
    began_s: tuple[float, ...] = ()
    device_s: tuple[tuple[float, ...], ...] = ()
    state: State = "valid"
    reason: str = ""
    tokens_digest: str = ""
    checks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Footer:
    """Last row: the run came to its end."""

    rows: int
    counts: Mapping[str, int]
    finished: str = field(default_factory=lambda: _now())


@dataclass(frozen=True)
class Run:
    """A results file as read.

    Attributes:
        path: the file.
        header: its first row.
        verdicts: the last verdict of every case.
        measurements: the last measurement of every cell.
        footer: None when the run did not come to its end.
        damaged: number of lines that could not be read.
    """

    path: Path
    header: Header
    verdicts: tuple[Verdict, ...]
    measurements: tuple[Measurement, ...]
    footer: Footer | None
    damaged: int = 0

    @property
    def complete(self) -> bool:
        """True when the footer is there, counts every row, and nothing is damaged."""
        rows = len(self.verdicts) + len(self.measurements)
        return self.footer is not None and self.footer.rows == rows and not self.damaged


class Writer:
    """Appends rows to a results file; as a context manager it writes the footer when no exception passes through.

    Attributes:
        path: the file.
        done: rows of an earlier, unfinished run that this one continues, by case.
    """

    def __init__(self, path: Path, header: Header, done: Mapping[str, Verdict | Measurement] | None = None) -> None:
        self.path = path
        self.header = header
        self.done: dict[str, Verdict | Measurement] = dict(done or {})
        begun = path if path.exists() else path.with_suffix(".part")
        self._file = begun.open("ab")
        _lock(self._file, path)
        if begun.stat().st_size == 0:
            self._write("header", header)
        if begun != path:
            begun.replace(path)  # whenever the run is killed, a file of this name has its header

    @classmethod
    def start(cls, directory: Path, header: Header, *, fresh: bool = False) -> Self:
        """Continue the newest unfinished run of the same identity in `directory`, or start a new file.

        Raises:
            UsageError: the directory cannot be written, or another process is writing the run that would be continued.
        """
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"results directory {directory} is no directory")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not fresh:
                for run in sorted(runs(directory, quiet=True), key=lambda run: run.header.started, reverse=True):
                    if run.header.identity() == header.identity() and run.footer is None:
                        writer = cls(run.path, run.header)  # holds the lock: nobody else writes from here on
                        _drop_partial_line(run.path)
                        run = read(run.path)
                        rows: tuple[Verdict | Measurement, ...] = (*run.verdicts, *run.measurements)
                        writer.done.update({row.case: row for row in rows})
                        return writer
            stamp = re.sub(r"[^0-9T]", "", header.started)[:15]
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", header.subject).strip("-")[-60:]
            return cls(directory / f"{header.kind}-{slug}-{stamp}-{header.run[:4]}.jsonl", header)
        except OSError as error:
            raise UsageError(f"results directory {directory}: {error.strerror or error}") from error

    def add(self, row: Verdict | Measurement) -> None:
        """Write one row; it is on disk when this returns."""
        self._write("verdict" if isinstance(row, Verdict) else "measurement", row)
        self.done[row.case] = row

    def finish(self) -> None:
        """Write the footer and close."""
        counts: dict[str, int] = {}
        for row in self.done.values():
            key = str(row.outcome) if isinstance(row, Verdict) else row.state
            counts[key] = counts.get(key, 0) + 1
        self._write("footer", Footer(rows=len(self.done), counts=counts))
        self._file.close()

    def _write(self, record: str, row: Header | Verdict | Measurement | Footer) -> None:
        line = json.dumps({"record": record, **asdict(row)}, default=_plain, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._file.close()


def read(path: Path) -> Run:
    """Read a results file, complete or not.

    Raises:
        UsageError: it is no results file, or of a format that this version does not know.
    """
    header: Header | None = None
    footer: Footer | None = None
    rows: dict[str, Verdict | Measurement] = {}
    damaged = 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    for line in lines:
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            record = data.pop("record")
            if record == "header":
                if data.get("format") != FORMAT:
                    raise UsageError(f"{path}: format {data.get('format')!r} is unknown; this version reads {FORMAT}")
                header = Header(**_known(Header, data))
            elif record == "verdict":
                data["outcome"] = Outcome(data["outcome"])
                data["requirements"] = tuple(data["requirements"])
                rows[data["case"]] = Verdict(**_known(Verdict, data))
            elif record == "measurement":
                for key in ("values_s", "warmup_s", "device_s"):
                    data[key] = tuple(tuple(values) for values in data.get(key, ()))
                data["began_s"] = tuple(data.get("began_s", ()))
                rows[data["case"]] = Measurement(**_known(Measurement, data))
            elif record == "footer":
                footer = Footer(**_known(Footer, data))
            else:
                damaged += 1
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
    if header is None:
        raise UsageError(f"{path}: no results file of vlmqual (its first line is no header)")
    verdicts = tuple(row for row in rows.values() if isinstance(row, Verdict))
    measurements = tuple(row for row in rows.values() if isinstance(row, Measurement))
    return Run(path, header, verdicts, measurements, footer, damaged)


def runs(directory: Path, *, quiet: bool = False) -> Iterator[Run]:
    """Every results file directly in `directory`, by name.

    Args:
        directory: where to look.
        quiet: leave out files that are no results files instead of raising.

    Raises:
        UsageError: a file is damaged beyond its header.
    """
    for path in sorted(directory.glob("*.jsonl")):
        try:
            yield read(path)
        except UsageError:
            if not quiet:
                raise


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(
            f"{path} is being written by another run; wait for its end, or start anew with --fresh"
        ) from None


def _drop_partial_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))


def _known(kind: type[Header | Verdict | Measurement | Footer], data: dict[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {key: value for key, value in data.items() if key in names}


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(str(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no plain data: {value!r}")


def finite(value: float) -> float | None:
    """A number that JSON can hold: None for NaN and infinities."""
    return value if math.isfinite(value) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
