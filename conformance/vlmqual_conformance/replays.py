"""Replay files: what it takes to run one case alone, again, and what came of it the first time.

A run writes one for each verdict that is fail, error or expected-fail, as `RESULTS/replay/SUBJECT/CASE.json`. A row
that no test stands behind (a known failure that names nothing) has none: there is nothing to run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vlmqual_contract import records
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Outcome, Run, Verdict

FORMAT = 1
FOLDER = "replay"
FAILED = (Outcome.FAIL, Outcome.ERROR, Outcome.EXPECTED_FAIL)
_RECORD = "replay"
#: Fields that files of earlier versions do not have.
_LATER = ("checkpoint", "reference")
_LONGEST = 100


@dataclass(frozen=True)
class Replay:
    """One case, its subject, and what came of it.

    Attributes:
        case: name of the case, as in the results file.
        requirements: ids that it checks; the first one decides level, family and subject.
        family: `model_type`.
        level: level of the suite.
        kind: "target" or "library".
        subject: target string, or name of the library, with the options that were given.
        python: interpreter that was given for the subject's environment, "" where none was.
        timeout_s: seconds for one answer, None where they are not recorded.
        known: further files of known failures that were given.
        emulated: True when the subject ran over an emulator.
        dtype: declared compute dtype, "" for a library.
        outcome: what became of the case.
        reason: why.
        observed: for a known failure: what was observed, "" otherwise.
        component: the component that left its budget first, "" where nothing is compared numerically.
        worst: error divided by budget, None where nothing is compared numerically.
        version: version of vlmqual.
        suite: digest of tests, requirements and policy.
        fixtures: digest of the fixtures.
        run: identity of the run.
        checkpoint: directory of the user's checkpoint that the run was over, "" for the fixtures.
        reference: folder of its reference, "" where none was given.
        format: number of this format.
    """

    case: str
    requirements: tuple[str, ...]
    family: str
    level: str
    kind: str
    subject: str
    python: str
    timeout_s: float | None
    known: tuple[str, ...]
    emulated: bool
    dtype: str
    outcome: Outcome
    reason: str
    observed: str
    component: str
    worst: float | None
    version: str
    suite: str
    fixtures: str
    run: str
    checkpoint: str = ""
    reference: str = ""
    format: int = FORMAT


def slug(text: str) -> str:
    """A name for a file or folder; texts that differ have names that differ."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if clean == text and len(clean) <= _LONGEST:
        return clean
    return f"{clean[-_LONGEST:].strip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def folder(subject: str) -> Path:
    """Where the replay files of a subject stand, relative to the folder of results.

    Args:
        subject: as in the header of the results file.
    """
    return Path(FOLDER, slug(subject))


def place(subject: str, case: str) -> Path:
    """Where the replay file of a case stands, relative to the folder of results."""
    return folder(subject) / _file(case)


def _file(case: str) -> str:
    return slug(case) + ".json"


def write(path: Path, replay: Replay) -> None:
    """Write a replay file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"record": _RECORD, **asdict(replay)}, indent=2, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def tidy(place: Path, judged: Iterable[str], others: Iterable[str] | None = None) -> None:
    """Remove what earlier runs of a subject left of the cases that a new run judges, and of cases that are no more.

    Args:
        place: folder of the subject.
        judged: cases of the new run.
        others: every other case of the suite; None where only a part of the suite is known.
    """
    gone = set(map(_file, judged))
    kept = None if others is None else set(map(_file, others))
    for path in place.glob("*.json"):
        if path.name in gone or (kept is not None and path.name not in kept):
            path.unlink(missing_ok=True)
    for path in place.glob(".*.part"):  # of a run that was killed while it wrote
        path.unlink(missing_ok=True)


def read(path: Path, case: str = "") -> Replay:
    """Read a replay file, or one row of a results file.

    Args:
        path: a replay file, or a results file (*.jsonl).
        case: name of the case; for results files only.

    Raises:
        UsageError: it is neither, it is damaged, or the results file has no such case.
    """
    if path.suffix == ".jsonl":
        return _row(records.read(path), case)
    if case:
        raise UsageError(f"--case is for a results file (*.jsonl); {path} would be a replay file of one case")
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"replay file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"replay file {path} is damaged or none at all: {error}") from error
    if not isinstance(data, dict) or data.get("record") != _RECORD:
        raise UsageError(
            f"{path} is no replay file of vlmqual; a run writes them into the folder {FOLDER} of its results"
        )
    if data.get("format") != FORMAT:
        raise UsageError(f"replay file {path}: format {data.get('format')!r} is unknown; this version reads {FORMAT}")
    return _replay(path, data)


def _replay(path: Path, data: Mapping[str, Any]) -> Replay:
    """A record, every field of it looked at."""
    values: dict[str, Any] = {}
    for name in (item.name for item in fields(Replay)):
        if name not in data and name in _LATER:
            continue
        if name not in data:
            raise UsageError(f"{path} is damaged: it lacks {name}")
        value = data[name]
        if not _VALID.get(name, _is_text)(value):
            raise UsageError(f"{path} is damaged: {name} is {json.dumps(value, default=str)[:60]}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return Replay(**{**values, "outcome": Outcome(values["outcome"])})


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


_VALID: Mapping[str, Callable[[object], bool]] = {
    "requirements": _is_texts,
    "known": _is_texts,
    "timeout_s": _is_number,
    "worst": _is_number,
    "emulated": lambda value: isinstance(value, bool),
    "kind": lambda value: value in ("target", "library"),
    "outcome": lambda value: value in tuple(Outcome),
    "format": lambda value: value == FORMAT,
}


def _row(run: Run, case: str) -> Replay:
    """A verdict of a results file; the seconds for an answer and files of known failures are not recorded there."""
    if run.header.kind != "conformance":
        raise UsageError(f"{run.path} is a results file of {run.header.kind}; only those of conformance have cases")
    rows = {row.case: row for row in run.verdicts}
    if not case:
        failed = [row.case for row in run.verdicts if row.outcome in FAILED]
        some = f"; not as required are {', '.join(failed[:3])}{' ...' if len(failed) > 3 else ''}" if failed else ""
        raise UsageError(f"{run.path} is a results file; --case NAME says which case of it{some}")
    if case not in rows:
        raise UsageError(f"{run.path} has no case {case!r}{near(case, rows)}")
    header, row = run.header, rows[case]
    if not isinstance(header.subject, str) or not isinstance(header.plan, Mapping):
        raise UsageError(f"{run.path} is damaged: its header has no subject or no plan")
    replay = record(
        row,
        kind="library" if header.subject.startswith("library ") else "target",
        subject=header.subject.removeprefix("library "),
        python=header.plan.get("python") or "",
        timeout_s=None,
        known=(),
        emulated=isinstance(header.info, Mapping) and header.info.get("emulated") is True,
        version=header.suite,
        suite=header.plan.get("suite") or "",
        fixtures=header.plan.get("fixtures") or "",
        run=header.run,
        **_over(header.plan),
    )
    return _replay(run.path, {**asdict(replay), "requirements": list(row.requirements), "known": []})


def _over(plan: Mapping[str, Any]) -> dict[str, str]:
    """The user's checkpoint and its reference that a run was over."""
    paths = plan.get("over")
    return {name: str(paths.get(name) or "") for name in _LATER} if isinstance(paths, Mapping) else {}


def record(verdict: Verdict, **about: Any) -> Replay:
    """A verdict, with what its run knows about subject and suite."""
    return Replay(
        case=verdict.case,
        requirements=tuple(verdict.requirements),
        family=verdict.family,
        level=verdict.level,
        dtype=verdict.dtype,
        outcome=verdict.outcome,
        reason=verdict.reason,
        observed=str(verdict.details.get("observed") or ""),
        component=verdict.component,
        worst=verdict.worst,
        **about,
    )


def near(name: str, known: Iterable[str]) -> str:
    """A half sentence that names what may have been meant, "" where nothing is like it."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"; near it are {', '.join(found)}" if found else ""
