"""Level generation: loops over decode steps, and what has to hold of them without any gold."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite import checks
from vlmqual_conformance.suite.idefics_images import FAMILY, cases
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info


def is_one_row(case: Golden) -> bool:
    return case.rows == 1 and bool((case.mask != 0).all())


@requirement("IDEFICS-GEN-001")
@pytest.mark.parametrize("case", cases())
def test_greedy_tokens_of_a_free_run_are_golds(session: RemoteSession, info: Info, case: Golden) -> None:
    checks.greedy_tokens(session, info, case)


@requirement("IDEFICS-GEN-002")
@pytest.mark.parametrize("case", cases(is_one_row))
def test_steps_equal_a_prefill_of_the_longer_prompt(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.by_step_and_at_once(keeper, session, info, judge, case)


@requirement("IDEFICS-GEN-003")
@pytest.mark.parametrize("case", cases(lambda case: case.rows > 1))
def test_rows_of_a_batch_generate_what_they_generate_alone(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.batch_and_rows(keeper, session, info, judge, case)


@requirement("IDEFICS-GEN-004")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("photo", "resampler-photo")))
def test_another_picture_in_the_same_prompt_gives_other_logits(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    turned = {**case.pixels, "pixel_values": np.ascontiguousarray(case.pixels["pixel_values"][..., ::-1, :])}
    checks.another_image(session, info, judge, case, [case.pixels, turned])


@requirement("IDEFICS-GEN-005")
def test_a_run_is_repeated_whatever_ran_in_between(session: RemoteSession, info: Info, judge: Judge) -> None:
    checks.repeats(session, info, judge, golden(FAMILY, "two-images"), golden(FAMILY, "text-only"))
