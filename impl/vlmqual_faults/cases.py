"""The cases of the suite and the requirements that they carry, from one collection that runs none of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import pytest

from vlmqual_conformance import catalogue
from vlmqual_conformance.catalogue import Case
from vlmqual_conformance.conductor import case_of
from vlmqual_contract.errors import UsageError
from vlmqual_contract.requirement import Requirement


class _Listener:
    def __init__(self) -> None:
        self.cases: list[Case] = []

    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        """Keep what was collected."""
        self.cases = [case_of(item) for item in items]


def collected() -> list[Case]:
    """Every case of the suite.

    Raises:
        UsageError: the suite cannot be collected.
    """
    listener = _Listener()
    code = pytest.main(
        [
            *(str(catalogue.SUITE), "--collect-only", "-c", os.devnull, "--rootdir", str(catalogue.SUITE)),
            *("--import-mode=importlib", "-p", "vlmqual_conformance.plugin", "-p", "no:cacheprovider"),
            *("-p", "no:terminal"),
        ],
        plugins=[listener],
    )
    if code or not listener.cases:
        raise UsageError("the suite cannot be collected; `vlmqual conformance` says why")
    return listener.cases


def names(
    cases: Sequence[Case], known: Mapping[str, Requirement], family: str, ids: Collection[str] = ()
) -> tuple[str, ...]:
    """Cases about targets of a family that carry one of these ids, all of the family where none are given.

    Args:
        cases: of the suite.
        known: all requirements.
        family: `model_type`.
        ids: of requirements.
    """
    return tuple(
        case.name
        for case in cases
        if (first := known[case.ids[0]]).subject == "target"
        and first.family == family
        and (not ids or not set(ids).isdisjoint(case.ids))
    )
