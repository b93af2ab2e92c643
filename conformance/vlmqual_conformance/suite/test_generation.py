"""Level generation: loops over decode steps, and what has to hold of them without any gold."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite import checks, runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info

FAMILY = "idefics3"
FREE = ("batch-left", "batch-right", "masked-pixels", "multi-turn", "photo-tiles", "text-beside-image", "text-only")
ONE_ROW = ("consecutive-images", "masked-pixels", "photo-small", "text-long", "text-only", "two-images")


@requirement("IDEFICS3-GEN-001")
@pytest.mark.parametrize("case", runs.cases(FAMILY, lambda case: case.name in FREE))
def test_greedy_tokens_fed_back_are_golds(session: RemoteSession, info: Info, case: Golden) -> None:
    checks.greedy_tokens(session, info, case)


@requirement("IDEFICS3-GEN-002")
@pytest.mark.parametrize("case", runs.cases(FAMILY, lambda case: case.name in ONE_ROW))
def test_decoding_step_by_step_equals_a_prefill_of_the_longer_prompt(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.by_step_and_at_once(keeper, session, info, judge, case)


@requirement("IDEFICS3-GEN-003")
@pytest.mark.parametrize("name", ["batch-left", "text-beside-image"])
def test_a_batch_generates_what_its_rows_generate_alone(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    checks.batch_and_rows(keeper, session, info, judge, golden(FAMILY, name))


@requirement("IDEFICS3-GEN-004")
def test_another_image_in_the_same_prompt_gives_other_logits(session: RemoteSession, info: Info, judge: Judge) -> None:
    prompt, both = golden(FAMILY, "photo-whole"), golden(FAMILY, "two-images")
    pictures = [
        {name: np.ascontiguousarray(array[:, index : index + 1]) for name, array in both.pixels.items()}
        for index in range(2)
    ]
    checks.another_image(session, info, judge, prompt, pictures)


@requirement("IDEFICS3-GEN-005")
def test_a_run_repeats_whatever_ran_in_between(session: RemoteSession, info: Info, judge: Judge) -> None:
    checks.repeats(session, info, judge, golden(FAMILY, "photo-whole"), golden(FAMILY, "text-only"))
