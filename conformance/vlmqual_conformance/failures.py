"""Known failures: what a library is known to do wrong, why, and until when that is tolerated.

A file in `known/` holds tables `[[failure]]` with `library`, `versions` (a specifier such as ">=5,<6"), `case` (a case
name in which `*` and `?` stand for anything, or a requirement id), `reason` and `expires` (a date); optionally
`outcome` ("fail" or "error", by default "fail"), and for what shows in some targets only `dtype` (a list of compute
dtypes) and `runtime` (a pattern of the runtime that the target names).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from vlmqual_conformance import patterns
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Outcome

#: Begins the reason of a known failure that passes, which is a failure.
PASSED = "expected to fail but passed"
FOLDER = Path(__file__).resolve().parent / "known"
_KEYS = {"library", "versions", "case", "reason", "expires", "outcome", "dtype", "runtime"}


@dataclass(frozen=True)
class Failure:
    """One known failure.

    Attributes:
        library: name of the library whose fault it is.
        versions: versions that have it.
        case: pattern of case names, or a requirement id.
        reason: one sentence.
        expires: last day on which it is tolerated.
        outcome: what is expected.
        dtypes: compute dtypes that it shows in, empty for all.
        runtime: pattern of runtimes that it shows in, "" for all.
        file: name of the file that it stands in.
    """

    library: str
    versions: SpecifierSet
    case: str
    reason: str
    expires: date
    outcome: Outcome = Outcome.FAIL
    dtypes: tuple[str, ...] = ()
    runtime: str = ""
    file: str = ""

    def concerns(self, library: str, version: str, dtype: str = "", runtime: str = "") -> bool:
        """True when this library in this version is known to fail; a library run has neither dtype nor runtime."""
        if library != self.library or (self.dtypes and dtype not in self.dtypes):
            return False
        if self.runtime and not patterns.matches(self.runtime, runtime):
            return False
        try:
            return self.versions.contains(Version(version), prereleases=True)
        except InvalidVersion:
            return False

    def names(self, case: str, ids: Iterable[str]) -> bool:
        """True when the entry is about this case."""
        return patterns.names(self.case, case, ids)


def load_known(paths: Iterable[Path] | None = None) -> list[Failure]:
    """Read files of known failures.

    Args:
        paths: the files; those of the suite where None.

    Raises:
        UsageError: a file or a table in it is damaged.
    """
    found: list[Failure] = []
    for path in sorted(FOLDER.glob("*.toml")) if paths is None else paths:
        found += [_failure(table, path.name) for table in patterns.tables(path, "failure", "known failures")]
    return found


def _failure(table: Mapping[str, Any], file: str) -> Failure:
    name = f"{file}: the known failure {table.get('case', 'without case')!r}"
    if unknown := sorted(set(table) - _KEYS):
        raise UsageError(f"{name} has the unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    for key in ("library", "versions", "case", "reason"):
        if not isinstance(table.get(key), str) or (key != "versions" and not table[key].strip()):
            raise UsageError(f"{name} lacks {key}, a string")
    if type(table.get("expires")) is not date:
        raise UsageError(f"{name} lacks expires, a date such as 2026-06-30")
    if table.get("outcome", "fail") not in ("fail", "error"):
        raise UsageError(f"{name} has outcome {table['outcome']!r}; valid are fail, error")
    try:
        versions = SpecifierSet(table["versions"])
    except InvalidSpecifier as error:
        raise UsageError(f"{name} has versions {table['versions']!r}; a specifier is, for example, '>=5,<6'") from error
    return Failure(
        library=table["library"],
        versions=versions,
        case=table["case"],
        reason=table["reason"],
        expires=table["expires"],
        outcome=Outcome(table.get("outcome", "fail")),
        dtypes=tuple(table.get("dtype", ())),
        runtime=str(table.get("runtime", "")),
        file=file,
    )


@dataclass(frozen=True)
class Judged:
    """An outcome after known failures were taken into account."""

    outcome: Outcome
    reason: str
    details: Mapping[str, Any]


def judge(outcome: Outcome, reason: str, entries: Sequence[Failure], today: date) -> Judged:
    """Turn what was observed into what is reported.

    Args:
        outcome: what was observed.
        reason: why, for anything but a pass.
        entries: the known failures that are about this case.
        today: the day against which expiries are judged.
    """
    if not entries or outcome is Outcome.NOT_APPLICABLE:
        return Judged(outcome, reason, {})
    if outcome is Outcome.PASS:
        first = entries[0]
        text = f"{PASSED}: {first.reason}; remove it from {first.file}"
        return Judged(Outcome.FAIL, text, {"known": first.reason, "expires": first.expires.isoformat()})
    fitting = [entry for entry in entries if entry.outcome is outcome]
    if not fitting:
        return Judged(outcome, f"{reason} (a {entries[0].outcome} was expected: {entries[0].reason})", {})
    entry = max(fitting, key=lambda entry: entry.expires)
    details = {"expires": entry.expires.isoformat(), "observed": f"{outcome}: {reason}"}
    if entry.expires < today:
        text = f"the known failure expired on {entry.expires.isoformat()}: {entry.reason}; observed: {reason}"
        return Judged(outcome, text, details)
    return Judged(Outcome.EXPECTED_FAIL, entry.reason, details)
