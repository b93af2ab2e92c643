"""Level prefill: logits of prompts, with gold image features injected and from golden pixels."""

from __future__ import annotations

from typing import Any

import pytest

from vlmqual_conformance.goldens import Golden, golden, goldens
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.suite import checks
from vlmqual_conformance.suite.mllama_images import FAMILY, as_features, slots, states
from vlmqual_conformance.suite.runs import cases
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, Info

TEXT_RULES = tuple(f"MLLAMA-DECODER-{number:03}" for number in (1, 2, 3, 4, 5, 11, 12, 13))
IMAGE_RULES = tuple(f"MLLAMA-DECODER-{number:03}" for number in (6, 7, 8, 9))


def with_rules() -> list[Any]:
    """Every golden; those with images carry the rules of cross-attention, those without the rule that leaves it out."""
    return [
        pytest.param(case, id=case.name, marks=requirement(*IMAGE_RULES if case.has_images else ["MLLAMA-DECODER-010"]))
        for case in goldens(FAMILY)
    ]


@requirement(*TEXT_RULES)
@pytest.mark.parametrize("case", with_rules())
def test_logits_of_a_prompt_with_gold_features(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_at_the_end(session, info, judge, case)


@requirement("MLLAMA-DECODER-011", "MLLAMA-DECODER-012", needs=[Capability.ALL_LOGITS])
@pytest.mark.parametrize("case", cases(FAMILY, lambda case: case.has("prefill/all_logits")))
def test_logits_of_every_position(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_at_every_position(session, info, judge, case)


@requirement("MLLAMA-DECODER-014")
@pytest.mark.parametrize("case", cases(FAMILY, lambda case: case.has_images))
def test_logits_of_a_prompt_from_pixels(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_from_pixels(session, info, judge, case)


@requirement("MLLAMA-DECODER-008")
@pytest.mark.parametrize("case", cases(FAMILY, lambda case: case.has_images and case.rows == 1 and slots(case) == 2))
def test_features_in_another_order_belong_to_other_columns_of_the_mask(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    there = session.prefill(case.text, case.features).logits()
    here = session.prefill(case.text, as_features(states(case)[:, ::-1])).logits()
    noise = case.noise("prefill/logits", info.dtype)
    checks.told_apart(judge, "prefill/logits (images exchanged)", here, there, noise, "two images are not told apart")


@requirement("MLLAMA-DECODER-011", needs=[Capability.ALL_LOGITS])
@pytest.mark.parametrize("name", ["photo-four-tiles", "text-only"])
def test_tokens_that_come_later_do_not_change_earlier_positions(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    checks.earlier_positions_keep(session, info, judge, golden(FAMILY, name))
