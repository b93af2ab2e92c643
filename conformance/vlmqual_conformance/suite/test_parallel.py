"""Level parallel: two ranks give what one gives, in every row, under the same forced tokens."""

from __future__ import annotations

import pytest

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import EXACT, Judge
from vlmqual_conformance.subjects import TargetKeeper, demand, options_for, tiny
from vlmqual_conformance.suite import runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, Info

RANKS = 2
CASES = ("batch-left", "masked-pixels", "photo-small", "text-beside-image", "text-long")


@pytest.fixture
def ranks(keeper: TargetKeeper, info: Info) -> RemoteSession:
    """The tiny checkpoint, opened over two ranks with one thread each."""
    return keeper.ranks(RANKS, tiny(runs.FAMILY), options_for(info, tp=RANKS))


def chosen(case: Golden) -> bool:
    return case.name in CASES


@requirement("IDEFICS3-TP-001")
@pytest.mark.parametrize("case", runs.cases(lambda case: chosen(case) and case.has_images))
def test_image_features_of_two_ranks_are_those_of_one(
    session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs() | case.pixel_needs())
    name = "image_hidden_states"
    one, two = (each.vision(case.pixels).arrays()[name] for each in (session, ranks))
    noise = case.noise(f"features/{name}", info.dtype)
    judge.same(f"features/{name} (two ranks, one)", two, one, (noise, noise))
    judge.verdict()


@requirement("IDEFICS3-TP-002")
@pytest.mark.parametrize("case", runs.cases(chosen))
def test_logits_of_a_prompt_on_two_ranks_are_those_on_one(
    session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    one, two = (each.prefill(case.text, case.features).logits() for each in (session, ranks))
    noise = case.noise("prefill/logits", info.dtype)
    judge.same("prefill/logits (two ranks, one)", two, one, (noise, noise))
    judge.verdict()


@requirement("IDEFICS3-TP-003")
@pytest.mark.parametrize("case", runs.cases(chosen))
def test_forced_steps_on_two_ranks_are_those_on_one(
    keeper: TargetKeeper, session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs() | {Capability.FORCED_TOKENS})
    one = runs.forced_run(keeper, session, case)
    two = runs.forced(ranks, case.text, case.features, case.tokens)
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "two ranks, one", two.logits, one.logits, (noise, noise))
    judge.verdict()
    if info.dtype in EXACT:
        runs.same_tokens(two.tokens[:-1], case, info)
