"""Level parallel: two ranks give what one gives, in every row, under the same forced tokens."""

from __future__ import annotations

import pytest

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite import checks, runs
from vlmqual_conformance.suite.mllama_images import FAMILY
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info

CASES = ("batch-left", "hand-masks", "photo-four-tiles", "text-beside-image", "text-long", "text-only", "two-images")


def chosen(case: Golden) -> bool:
    return case.name in CASES


@requirement("MLLAMA-TP-001")
@pytest.mark.parametrize("case", runs.cases(FAMILY, lambda case: chosen(case) and case.has_images))
def test_features_of_two_ranks_are_those_of_one(
    session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.features_over_ranks(session, ranks, info, judge, case)


@requirement("MLLAMA-TP-002")
@pytest.mark.parametrize("case", runs.cases(FAMILY, chosen))
def test_logits_of_a_prompt_on_two_ranks_are_the_same(
    session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.prompt_over_ranks(session, ranks, info, judge, case)


@requirement("MLLAMA-TP-003")
@pytest.mark.parametrize("case", runs.cases(FAMILY, chosen))
def test_forced_steps_on_two_ranks_are_the_same(
    keeper: TargetKeeper, session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.steps_over_ranks(keeper, session, ranks, info, judge, case)
