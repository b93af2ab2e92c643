"""Level parallel: two ranks give what one gives, in every row, under the same forced tokens."""

from __future__ import annotations

import pytest

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite import checks
from vlmqual_conformance.suite.idefics_images import cases
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info

CASES = (
    "batch-left",
    "hand-masks",
    "high-resolution",
    "resampler-batch",
    "resampler-two-images",
    "text-beside-image",
    "text-only",
    "two-images",
)


def chosen(case: Golden) -> bool:
    return case.name in CASES


@requirement("IDEFICS-TP-001")
@pytest.mark.parametrize("case", cases(chosen))
def test_features_of_two_ranks_are_those_of_one(
    session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.features_over_ranks(session, ranks, info, judge, case)


@requirement("IDEFICS-TP-002")
@pytest.mark.parametrize("case", cases(chosen))
def test_logits_of_a_prompt_on_two_ranks_are_the_same(
    session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.prompt_over_ranks(session, ranks, info, judge, case)


@requirement("IDEFICS-TP-003")
@pytest.mark.parametrize("case", cases(chosen))
def test_forced_steps_on_two_ranks_are_the_same(
    keeper: TargetKeeper, session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.steps_over_ranks(keeper, session, ranks, info, judge, case)
