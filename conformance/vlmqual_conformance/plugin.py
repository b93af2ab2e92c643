"""The pytest plugin: one session is one subject, every case ends in one verdict row on disk.

Started by `vlmqual conformance`; by hand: `python -m pytest --pyargs vlmqual_conformance.suite
-p vlmqual_conformance.plugin --vlmqual-target eager`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlmqual_conformance import marks, subjects
from vlmqual_conformance.conductor import Conductor
from vlmqual_conformance.plan import Plan
from vlmqual_conformance.references import over
from vlmqual_contract.errors import UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.requirement import LEVELS
from vlmqual_contract.target import FAMILIES


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of a session."""
    group = parser.getgroup("vlmqual")
    group.addoption("--vlmqual-target", default="", help="target string of the subject")
    group.addoption("--vlmqual-library", default="", help="library subject, instead of a target")
    group.addoption("--vlmqual-family", action="append", default=[], help="only this family")
    group.addoption("--vlmqual-level", action="append", default=[], help="only this level")
    group.addoption("--vlmqual-requirement", action="append", default=[], help="only cases that carry this id")
    group.addoption("--vlmqual-case", action="append", default=[], help="only the case of exactly this name")
    group.addoption("--vlmqual-results", default="results", help="folder of results files")
    group.addoption("--vlmqual-python", default=None, help="interpreter of the subject's environment")
    group.addoption("--vlmqual-timeout", type=float, default=Limits().call_s, help="seconds for one answer")
    group.addoption("--vlmqual-fresh", action="store_true", help="do not continue an unfinished run")
    group.addoption("--vlmqual-rules", action="store_true", help="write down what other rules of comparison would say")
    group.addoption("--vlmqual-known", action="append", default=[], help="further file of known failures")
    group.addoption("--vlmqual-waivers", action="append", default=[], help="file of waivers")
    group.addoption("--vlmqual-checkpoint", default=None, help="a user's checkpoint, instead of the fixtures")
    group.addoption("--vlmqual-reference", default=None, help="folder of its reference")
    group.addoption("--vlmqual-command", default="", help="command line, for the record")
    group.addoption("--vlmqual-status", default=None, help="file to write path, library and exit code to")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; a wrong one ends the session with one sentence."""
    config.addinivalue_line("markers", f"{marks.NAME}(*ids, needs=()): requirements that the test checks")
    config.pluginmanager.register(subjects, "vlmqual-subjects")
    config.option.tbstyle = "native"  # a failing case is told by its sentence: do not parse its source again
    option = config.getoption
    target, library = str(option("vlmqual_target")), str(option("vlmqual_library"))
    if not target and not library:
        return  # collected by hand, for example with --collect-only
    if target and library:
        raise pytest.UsageError("--vlmqual-target and --vlmqual-library exclude each other")
    for name, given, valid in (
        ("--vlmqual-family", option("vlmqual_family"), FAMILIES),
        ("--vlmqual-level", option("vlmqual_level"), LEVELS),
    ):
        if unknown := sorted(set(given) - set(valid)):
            raise pytest.UsageError(f"{name} {unknown[0]} is unknown; valid are {', '.join(valid)}")
    levels = set(option("vlmqual_level") or LEVELS)
    try:
        about = over(_path(option("vlmqual_checkpoint")), _path(option("vlmqual_reference")))
    except UsageError as mistake:
        raise pytest.UsageError(str(mistake)) from mistake
    plan = Plan(
        target=target,
        library=library,
        families=tuple(option("vlmqual_family")),
        levels=tuple(level for level in LEVELS if level in levels),
        results=Path(option("vlmqual_results")),
        python=option("vlmqual_python"),
        timeout_s=float(option("vlmqual_timeout")),
        fresh=bool(option("vlmqual_fresh")),
        known=tuple(Path(path) for path in option("vlmqual_known")),
        command=str(option("vlmqual_command")) or " ".join(sys.argv),
        status=Path(option("vlmqual_status")) if option("vlmqual_status") else None,
        keyword=str(config.getoption("keyword", "") or ""),
        requirements=tuple(sorted(set(option("vlmqual_requirement")))),
        cases=tuple(sorted(set(option("vlmqual_case")))),
        over=about,
        waivers=tuple(Path(path) for path in option("vlmqual_waivers")),
    )
    config.stash[subjects.OVER] = about
    config.pluginmanager.register(Conductor(config, plan), "vlmqual-conductor")


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None
