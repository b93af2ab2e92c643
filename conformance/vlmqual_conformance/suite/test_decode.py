"""Level decode: sixteen steps with gold's tokens forced."""

from __future__ import annotations

import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite import checks, runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, Info

FAMILY = "idefics3"


@requirement("IDEFICS3-DEC-001", "IDEFICS3-TEXT-009")
@pytest.mark.parametrize("case", runs.cases(FAMILY))
def test_logits_of_every_forced_step(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.every_forced_step(keeper, session, info, judge, case)


@requirement("IDEFICS3-DEC-001", needs=[Capability.TAPS])
def test_hidden_states_of_forty_steps_across_a_block_of_the_cache(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    checks.hidden_states_of_forced_steps(session, info, judge, golden(FAMILY, "across-blocks"))


@requirement("IDEFICS3-DEC-003")
@pytest.mark.parametrize("case", runs.cases(FAMILY))
def test_greedy_tokens_of_forced_steps_are_golds(
    keeper: TargetKeeper, session: RemoteSession, info: Info, case: Golden
) -> None:
    checks.tokens_of_forced_steps(keeper, session, info, case)


@requirement("IDEFICS3-DEC-002")
@pytest.mark.parametrize(
    "case", runs.cases(FAMILY, lambda case: case.name in ("batch-left", "photo-whole", "text-only"))
)
def test_the_greedy_token_has_the_largest_logit(session: RemoteSession, info: Info, case: Golden) -> None:
    checks.greedy_is_largest(session, info, case)


@requirement("IDEFICS3-DEC-004")
@pytest.mark.parametrize("name", ["photo-whole", "text-only"])
def test_sequences_that_live_side_by_side_keep_to_themselves(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    case = golden(FAMILY, name)
    pictures = [
        {name: sign * hidden for name, hidden in case.features.items()} if case.features else None for sign in (1, -1)
    ]
    checks.side_by_side(session, info, judge, case, pictures)
