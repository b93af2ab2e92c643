"""The lock on derived budgets: a golden whose budgets are not those of `budgets.lock` stops every run.

A budget is `policy.FACTOR` times the noise that a golden file stores for a tensor and a dtype, so a golden that is made
again may loosen what is demanded, and nobody would see it. The lock holds a digest of all noise values of each golden,
and of the file that they were read from: a file whose digest in the manifest is still that one is not opened.

`python -m vlmqual_conformance.budgets --check` compares, `--write` brings the lock up to date. A golden that is new is
added; one whose budgets have changed, or that is gone, needs a waiver with the digests that `--check` prints (see
`waivers`), to be run with and to be written. To begin anew, which shows as such in a review, delete the lock first.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from vlmqual_conformance import patterns, policy, waivers
from vlmqual_conformance.waivers import Waiver
from vlmqual_contract import fixtures
from vlmqual_contract.errors import EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.target import FAMILIES

LOCK = Path(__file__).resolve().with_name("budgets.lock")
GONE = "gone"
_COMMAND = "python -m vlmqual_conformance.budgets"


@dataclass(frozen=True)
class Locked:
    """A golden in the lock.

    Attributes:
        file: SHA-256 of the golden file.
        budgets: digest of its noise values.
    """

    file: str
    budgets: str


@dataclass(frozen=True)
class Changed:
    """A golden whose budgets are not the locked ones; `new` is "gone" where the file is."""

    golden: str
    old: str
    new: str


def digest(path: Path) -> str:
    """SHA-256 of the names and values of all noise that a golden file stores."""
    with np.load(path) as file:
        lines = [f"{name} {float(file[name])!r}" for name in sorted(file.files) if name.startswith("noise/")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def together(digests: Mapping[str, str]) -> str:
    """One digest of the budgets of several goldens."""
    lines = [f"{golden} {digests[golden]}" for golden in sorted(digests)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def present(locked: Mapping[str, Locked], families: Iterable[str] = FAMILIES) -> dict[str, Locked]:
    """Every golden of these families as it is now; files that the lock knows are not opened."""
    found = {}
    for family in families:
        for name in fixtures.names(f"goldens/{family}/"):
            if name.endswith(".npz"):
                golden, file = name.removeprefix("goldens/").removesuffix(".npz"), fixtures.manifest()["files"][name]
                known = locked.get(golden)
                same = known is not None and known.file == file
                found[golden] = known if known and same else Locked(file, digest(fixtures.file(name)))
    return found


def read(path: Path = LOCK) -> dict[str, Locked]:
    """The goldens of a lock; none where there is no lock.

    Raises:
        UsageError: it is damaged, or made for another factor.
    """
    if not path.is_file():
        return {}
    try:
        lock = tomllib.loads(path.read_text("utf-8"))
        found = {golden: Locked(entry["file"], entry["budgets"]) for golden, entry in lock["goldens"].items()}
        factor = float(lock["factor"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: cannot be read as a lock of budgets: {error}") from error
    if factor != policy.FACTOR:
        raise UsageError(
            f"{path.name}: a budget is locked as {factor:g} times the noise, the suite has {policy.FACTOR:g}"
        )
    return found


def changes(locked: Mapping[str, Locked], now: Mapping[str, Locked], families: Iterable[str]) -> list[Changed]:
    """Goldens of these families whose budgets are not the locked ones; new ones are none of them."""
    wanted = tuple(f"{family}/" for family in families)
    return [
        Changed(golden, entry.budgets, now[golden].budgets if golden in now else GONE)
        for golden, entry in sorted(locked.items())
        if golden.startswith(wanted) and (golden not in now or now[golden].budgets != entry.budgets)
    ]


def covers(waiver: Waiver, golden: str, locked: Mapping[str, Locked], now: Mapping[str, Locked]) -> bool:
    """True when a waiver is about this golden, and its digests are what is locked and what is there."""
    if not waiver.golden or not patterns.matches(waiver.golden, golden):
        return False
    return (waiver.old, waiver.new) == _digests(waiver.golden, locked, now)


def check(
    families: Iterable[str],
    *,
    today: date,
    lock: Path = LOCK,
    given: Sequence[Waiver] = (),
) -> None:
    """Compare the budgets of these families with the lock.

    Args:
        families: `model_type`s that are judged.
        today: the day against which expiries are judged.
        lock: the lock.
        given: waivers.

    Raises:
        UsageError: names a golden whose budgets have changed without a waiver that still holds, or that is not locked.
    """
    families = tuple(families)
    locked = read(lock)
    now = present(locked, families)
    if new := sorted(set(now) - set(locked)):
        raise UsageError(f"the budgets of golden {new[0]}{_more(new)} are not locked; `{_COMMAND} --write` adds them")
    if found := _uncovered(changes(locked, now, families), locked, now, given, today):
        changed, expired = found[0]
        what = "is gone" if changed.new == GONE else "has other budgets"
        until = f"; a waiver of it expired on {expired.expires.isoformat()}" if expired else ""
        raise UsageError(
            f"golden {changed.golden} {what} than {lock.name} says{_more(found)}{until}; that takes a waiver with "
            f"reason and expiry in {waivers.OURS.name}, see `{_COMMAND} --check`"
        )


def _uncovered(
    changed: Iterable[Changed],
    locked: Mapping[str, Locked],
    now: Mapping[str, Locked],
    given: Sequence[Waiver],
    today: date,
) -> list[tuple[Changed, Waiver | None]]:
    """Changes that no waiver covers today, each with the expired one that did."""
    found = []
    for each in changed:
        about = [waiver for waiver in given if covers(waiver, each.golden, locked, now)]
        if not any(not waiver.has_expired(today) for waiver in about):
            found.append((each, about[0] if about else None))
    return found


def _digests(pattern: str, locked: Mapping[str, Locked], now: Mapping[str, Locked]) -> tuple[str, str]:
    old, new = (
        {golden: entry.budgets for golden, entry in side.items() if patterns.matches(pattern, golden)}
        for side in (locked, {**dict.fromkeys(locked, Locked(GONE, GONE)), **now})
    )
    return together(old), together({golden: new[golden] for golden in old})


def _more(found: Sequence[object]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def text(entries: Mapping[str, Locked]) -> str:
    """A lock."""
    lines = [
        "# Digests of the budgets that goldens hold. Written by: python -m vlmqual_conformance.budgets --write",
        "",
        f"factor = {policy.FACTOR}",
        "",
        "[goldens]",
        *(f'"{golden}" = {{ file = "{e.file}", budgets = "{e.budgets}" }}' for golden, e in sorted(entries.items())),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None, *, lock: Path = LOCK, waived: Path = waivers.OURS) -> int:
    """Check or write the lock; the exit code."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description="the lock on derived budgets")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare the goldens with the lock")
    what.add_argument("--write", action="store_true", help="bring the lock up to date; a change takes a waiver")
    args = parser.parse_args(arguments)
    try:
        locked, given, today = read(lock), waivers.load([waived]), date.today()
        now = present(locked)
        left = [each for each, _ in _uncovered(changes(locked, now, FAMILIES), locked, now, given, today)]
        if left:
            raise UsageError(_table(left, locked, now))
        if args.check:
            check(FAMILIES, today=today, lock=lock, given=given)
        else:
            lock.write_text(text(now), "utf-8")
    except UsageError as mistake:
        print(mistake, file=sys.stderr)
        return EXIT_USAGE
    print(f"{lock.name}: the budgets of {len(now)} goldens {'are as locked' if args.check else 'are locked'}")
    return EXIT_OK


def _table(left: Sequence[Changed], locked: Mapping[str, Locked], now: Mapping[str, Locked]) -> str:
    """What has changed, and the waiver that it takes."""
    families = {each.golden.partition("/")[0] for each in left}
    pattern = left[0].golden if len(left) == 1 else f"{families.pop()}/*" if len(families) == 1 else "*"
    old, new = _digests(pattern, locked, now)
    goldens = "\n".join(f"  {each.golden}{' is gone' if each.new == GONE else ''}" for each in left)
    return (
        f"budgets that are not the locked ones, and that no waiver covers:\n{goldens}\n"
        f"a waiver for {waivers.OURS.name}:\n"
        f'[[waiver]]\ngolden = "{pattern}"\nold = "{old}"\nnew = "{new}"\nreason = ""\nexpires = '
    )


if __name__ == "__main__":
    sys.exit(main())
