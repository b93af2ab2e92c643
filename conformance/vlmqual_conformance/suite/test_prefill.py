"""Level prefill: logits of prompts, with gold image features injected and from golden pixels."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.suite import checks
from vlmqual_conformance.suite.runs import cases
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, Info

FAMILY = "idefics3"
TEXT_MODEL = tuple(f"IDEFICS3-TEXT-00{number}" for number in range(1, 10))


# Images come in through the features, so IDEFICS3-TEXT-001 needs vision only where a case has images.
@requirement(*TEXT_MODEL[1:])
@pytest.mark.parametrize("case", cases(FAMILY))
def test_logits_at_the_end_of_a_prompt(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_at_the_end(session, info, judge, case)


@requirement("IDEFICS3-TEXT-007", "IDEFICS3-TEXT-008", needs=[Capability.ALL_LOGITS])
@pytest.mark.parametrize("case", cases(FAMILY, lambda case: case.has("prefill/all_logits")))
def test_logits_at_every_position(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_at_every_position(session, info, judge, case)


@requirement("IDEFICS3-TEXT-001", "IDEFICS3-TEXT-007")
@pytest.mark.parametrize("case", cases(FAMILY, lambda case: case.has_images))
def test_logits_from_pixels(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_from_pixels(session, info, judge, case)


@requirement("IDEFICS3-TEXT-001", needs=[Capability.VISION])
@pytest.mark.parametrize("name", ["consecutive-images", "two-images"])
def test_features_in_another_order_stand_at_other_places(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    case = golden(FAMILY, name)
    assert case.features is not None
    hidden = case.features["image_hidden_states"]
    swapped = {"image_hidden_states": np.ascontiguousarray(hidden[::-1])}
    there = session.prefill(case.text, case.features).logits()
    here = session.prefill(case.text, swapped).logits()
    noise = case.noise("prefill/logits", info.dtype)
    checks.told_apart(judge, "prefill/logits (images exchanged)", here, there, noise, "two images are not told apart")


@requirement("IDEFICS3-TEXT-007", needs=[Capability.ALL_LOGITS])
def test_later_tokens_do_not_change_earlier_positions(session: RemoteSession, info: Info, judge: Judge) -> None:
    checks.earlier_positions_keep(session, info, judge, golden(FAMILY, "text-only"))
