"""The mark that ties a test to the requirements it checks."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from vlmqual_contract.target import Capability

NAME = "requirement"


def requirement(*ids: str, needs: Iterable[Capability] = ()) -> pytest.MarkDecorator:
    """Say which requirements a test checks.

    The first id decides the test's level, family and subject. Where a parameter of a test carries the mark as well,
    its ids come before those of the function.

    Args:
        ids: requirement ids, for example "IDEFICS3-IMG-016".
        needs: capabilities that the test needs beyond those that its requirements need.

    Raises:
        ValueError: no id is given.
    """
    if not ids:
        raise ValueError("requirement() needs at least one id")
    mark: pytest.MarkDecorator = getattr(pytest.mark, NAME)(*ids, needs=tuple(Capability(need) for need in needs))
    return mark
