"""Level prefill: logits of prompts, with gold image features injected and from golden pixels."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import BadAnswer, Judge
from vlmqual_conformance.subjects import demand
from vlmqual_conformance.suite.runs import FAMILY, cases
from vlmqual_contract.remote import RemoteSession, RemoteStep
from vlmqual_contract.target import Capability, Info

TEXT_MODEL = tuple(f"IDEFICS3-TEXT-00{number}" for number in range(1, 10))


def compare_taps(judge: Judge, info: Info, case: Golden, step: RemoteStep) -> None:
    stored = case.components("taps/prefill")
    if Capability.TAPS not in info.capabilities or not stored:
        return
    taps = step.taps()
    if not (shared := [name for name in stored if name in taps]):
        raise BadAnswer(f"taps are declared, but none is called {', '.join(stored)}")
    for name in shared:
        tensor = f"taps/prefill/{name}"
        judge.compare(name, taps[name], case.array(tensor), case.noise(tensor, info.dtype), case.mask)


# Images come in through the features, so IDEFICS3-TEXT-001 needs vision only where a case has images.
@requirement(*TEXT_MODEL[1:])
@pytest.mark.parametrize("case", cases())
def test_logits_at_the_end_of_a_prompt(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    demand(info, case.needs())
    step = session.prefill(case.text, case.features)
    compare_taps(judge, info, case, step)
    judge.compare(
        "prefill/logits", step.logits(), case.array("prefill/logits"), case.noise("prefill/logits", info.dtype)
    )
    judge.verdict()


@requirement("IDEFICS3-TEXT-007", "IDEFICS3-TEXT-008", needs=[Capability.ALL_LOGITS])
@pytest.mark.parametrize("case", cases(lambda case: case.has("prefill/all_logits")))
def test_logits_at_every_position(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    demand(info, case.needs())
    step = session.prefill(case.text, case.features)
    tensor = "prefill/all_logits"
    judge.compare(tensor, step.logits(True), case.array(tensor), case.noise(tensor, info.dtype), case.mask)
    judge.verdict()


@requirement("IDEFICS3-TEXT-001", "IDEFICS3-TEXT-007")
@pytest.mark.parametrize("case", cases(lambda case: case.has_images))
def test_logits_from_pixels(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    demand(info, case.needs(injected=False))
    step = session.prefill({**case.text, **case.pixels})
    judge.compare("prefill/logits", step.logits(), case.array("prefill/logits"), case.noise("chain/logits", info.dtype))
    judge.verdict()


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
    judge.same("prefill/logits (images exchanged)", here, there, (noise, noise))
    ratio = judge.findings.pop().ratio
    assert ratio > 1, (
        f"exchanging two images changes the logits by {ratio:.2g} of the budget only: they are not told apart"
    )


@requirement("IDEFICS3-TEXT-007", needs=[Capability.ALL_LOGITS])
def test_later_tokens_do_not_change_earlier_positions(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "text-only")
    ids = case.text["input_ids"].copy()
    ids[:, -5:] = (ids[:, -5:] + 7) % 256
    before = ids.shape[1] - 5
    tensor = "prefill/all_logits"
    seen = session.prefill({**case.text, "input_ids": ids}).logits(True)
    gold = case.array(tensor)
    if seen.shape != gold.shape:
        raise BadAnswer(f"{tensor} has shape {seen.shape}, not {gold.shape}")
    judge.compare(tensor, seen[:, :before], gold[:, :before], case.noise(tensor, info.dtype))
    judge.verdict()
