"""From what a test raised to what is reported of it."""

from __future__ import annotations

import re

import pytest

from vlmqual_conformance.policy import BadAnswer
from vlmqual_contract.errors import TargetCrashed, TargetHung, TargetRaised, Unsupported, UsageError, VlmqualError
from vlmqual_contract.records import Outcome

LONGEST = 400


class NotApplicable(Exception):
    """A case that cannot be tried on this target, with the reason."""


def outcome_of(error: BaseException | None) -> tuple[Outcome, str]:
    """Outcome and reason of a case that ended with this exception, or with none."""
    if error is None:
        return Outcome.PASS, ""
    if isinstance(error, (NotApplicable, Unsupported, pytest.skip.Exception)):
        return Outcome.NOT_APPLICABLE, sentence(str(error))
    if isinstance(error, (AssertionError, pytest.fail.Exception)):
        return Outcome.FAIL, sentence(str(error)) or "an assertion without a message failed"
    if isinstance(error, TargetRaised):
        return Outcome.FAIL, sentence(f"raised {error}")
    if isinstance(error, UsageError):
        return Outcome.FAIL, sentence(f"refused: {error}")
    if isinstance(error, (TargetCrashed, TargetHung, BadAnswer, VlmqualError)):
        return Outcome.ERROR, sentence(str(error))
    return Outcome.ERROR, sentence(f"the test itself failed: {type(error).__name__}: {error}")


def is_ours(error: BaseException | None) -> bool:
    """True when the test failed, not what it tests."""
    return outcome_of(error)[1].startswith("the test itself failed")


def sentence(text: str) -> str:
    """The first lines of a message, up to the comparison that pytest adds, as one line."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        if lines and (not line.strip() or re.match(r"assert |\s+\+", line)):
            break
        lines.append(line.strip())
    whole = " ".join(lines)
    return whole if len(whole) <= LONGEST else whole[: LONGEST - 4] + " ..."
