"""The requirements that are installed, and the check that tests and requirements cover each other."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

from vlmqual_contract.discovery import REQUIREMENTS, installed
from vlmqual_contract.errors import UsageError
from vlmqual_contract.requirement import Requirement, load_requirements
from vlmqual_contract.target import Capability

HERE = Path(__file__).resolve().parent
SUITE = HERE / "suite"
LIBRARY_FIXTURE = "library"


@dataclass(frozen=True)
class Scope:
    """Tests and requirements that cover each other.

    Attributes:
        suite: folder of the tests.
        requirements: folder of our own requirement files.
    """

    suite: Path
    requirements: Path


#: What is judged by the bundled fixtures, and what is judged over a user's own checkpoint.
FIXTURES = Scope(SUITE, HERE / "requirements")
CHECKPOINT = Scope(HERE / "checkpoint_suite", HERE / "checkpoint_suite")


@dataclass(frozen=True)
class Case:
    """A collected test.

    Attributes:
        name: unique name: file and test, without the path before them.
        ids: requirement ids; the first one decides level, family and subject.
        needs: capabilities that its marks ask for beyond those of the requirements.
        uses_library: it takes the fixture `library`.
    """

    name: str
    ids: tuple[str, ...]
    needs: frozenset[Capability] = frozenset()
    uses_library: bool = False


def requirement_files(scope: Scope = FIXTURES) -> list[Path]:
    """Every requirement file of every package registered under `vlmqual.requirements`; ours at least.

    Those over a user's checkpoint are ours alone.

    Raises:
        UsageError: a registered package is not there.
    """
    folders = {scope.requirements.resolve(): None}
    if scope is CHECKPOINT:
        return sorted(scope.requirements.glob("*.toml"))
    for point in installed(REQUIREMENTS).values():
        folders.update(dict.fromkeys(_folders(point)))
    return [file for folder in folders for file in sorted(folder.glob("*.toml"))]


def _folders(point: EntryPoint) -> list[Path]:
    try:
        spec = importlib.util.find_spec(point.value)
    except ImportError:
        spec = None
    if spec is None:
        raise UsageError(f"requirements {point.name}: the package {point.value!r} is not installed")
    return [Path(folder).resolve() for folder in spec.submodule_search_locations or ()]


def requirements(scope: Scope = FIXTURES) -> dict[str, Requirement]:
    """All requirements by id.

    Raises:
        UsageError: a file is damaged, or an id stands twice.
    """
    return dict(_loaded(tuple(requirement_files(scope))))


@cache
def _loaded(files: tuple[Path, ...]) -> dict[str, Requirement]:
    return load_requirements(files)


def problems(cases: Iterable[Case], known: Mapping[str, Requirement], *, whole: bool) -> list[str]:
    """What is wrong between tests and requirements, one sentence each.

    Args:
        cases: everything that was collected.
        known: all requirements.
        whole: True when the whole suite was collected, so that a requirement without a test can be told.
    """
    found: list[str] = []
    tested: set[str] = set()
    for case in cases:
        if not case.ids:
            found.append(f"{case.name} names no requirement; every test carries @requirement(...)")
            continue
        if unknown := [name for name in case.ids if name not in known]:
            found.append(f"{case.name} names {', '.join(unknown)}, which no requirement file has")
            continue
        tested.update(case.ids)
        first = known[case.ids[0]]
        if case.uses_library != (first.subject == "library"):
            uses = "takes" if case.uses_library else "does not take"
            found.append(
                f"{case.name} {uses} the fixture {LIBRARY_FIXTURE!r}, but {first.id} is checked on a {first.subject}"
            )
        families = {known[name].family for name in case.ids}
        if len(families) > 1:
            found.append(f"{case.name} names requirements of several families: {', '.join(sorted(families))}")
    for item in known.values():
        if item.untested and item.id in tested:
            found.append(f"{item.id} says why it has no test, but has one")
        if whole and not item.untested and item.id not in tested:
            found.append(f"{item.id} has no test and does not say why")
    return found


def needs(case: Case, known: Mapping[str, Requirement]) -> frozenset[Capability]:
    """Capabilities without which a case is not applicable."""
    return case.needs.union(*(known[name].needs for name in case.ids))


def digest(files: Iterable[Path]) -> str:
    """Digest of what decides the cases of a run and what is expected of them: tests, requirements, policy."""
    whole = hashlib.sha256()
    for file in sorted({*files, *HERE.rglob("*.py"), *HERE.rglob("*.toml")}):
        whole.update(file.name.encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()[:16]
