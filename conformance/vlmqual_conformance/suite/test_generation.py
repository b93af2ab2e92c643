"""Level generation: loops over decode steps, and what has to hold of them without any gold."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper, demand
from vlmqual_conformance.suite import runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, Info

FREE = ("batch-left", "batch-right", "masked-pixels", "multi-turn", "photo-tiles", "text-beside-image", "text-only")
ONE_ROW = ("consecutive-images", "masked-pixels", "photo-small", "text-long", "text-only", "two-images")


@requirement("IDEFICS3-GEN-001")
@pytest.mark.parametrize("case", runs.cases(lambda case: case.name in FREE))
def test_greedy_tokens_fed_back_are_golds(session: RemoteSession, info: Info, case: Golden) -> None:
    demand(info, case.needs())
    runs.exact_only(info)
    own = runs.free(session, case.text, case.features, len(case.tokens))
    runs.same_tokens(own, case, info)


@requirement("IDEFICS3-GEN-002")
@pytest.mark.parametrize("case", runs.cases(lambda case: case.name in ONE_ROW))
def test_decoding_step_by_step_equals_a_prefill_of_the_longer_prompt(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    by_step = runs.forced_run(keeper, session, case).logits
    noises = (case.noise("decode/logits", info.dtype), case.noise("prefill/logits", info.dtype))
    for count in (1, len(case.tokens)):
        ids = np.concatenate([case.text["input_ids"], case.tokens[:count].T], axis=1)
        longer = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        at_once = session.prefill(longer, case.features).logits()
        judge.same(f"decode/logits.{count:02} (by step, at once)", by_step[count], at_once, noises)
    judge.verdict()


@requirement("IDEFICS3-GEN-003")
@pytest.mark.parametrize("name", ["batch-left", "text-beside-image"])
def test_a_batch_generates_what_its_rows_generate_alone(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    case = golden(runs.FAMILY, name)
    demand(info, case.needs() | {Capability.FORCED_TOKENS})
    batch = runs.forced_run(keeper, session, case)
    noise = runs.steps_noise(case, info)
    for row in range(case.rows):
        own = case.tokens[:, row : row + 1]
        single = runs.forced(session, runs.alone(case, row), runs.features_of(case, row), own)
        runs.same_steps(
            judge, f"row {row} in the batch, alone", batch.logits[:, row : row + 1], single.logits, (noise, noise)
        )
    judge.verdict()


@requirement("IDEFICS3-GEN-004")
def test_another_image_in_the_same_prompt_gives_other_logits(session: RemoteSession, info: Info, judge: Judge) -> None:
    prompt, pictures = golden(runs.FAMILY, "photo-whole"), golden(runs.FAMILY, "two-images")
    demand(info, prompt.needs(injected=False))
    seen = []
    for index in range(2):
        one = {name: np.ascontiguousarray(array[:, index : index + 1]) for name, array in pictures.pixels.items()}
        seen.append(session.prefill({**prompt.text, **one}).logits())
    noise = prompt.noise("chain/logits", info.dtype)
    judge.same("prefill/logits (another image)", seen[0], seen[1], (noise, noise))
    ratio = judge.findings.pop().ratio  # here the difference is what is wanted, so it is no headroom
    assert ratio > 1, (
        f"two images give logits that differ by {ratio:.2g} of the budget: the target is blind to its image"
    )


@requirement("IDEFICS3-GEN-005")
def test_a_run_repeats_whatever_ran_in_between(session: RemoteSession, info: Info, judge: Judge) -> None:
    case, between = golden(runs.FAMILY, "photo-whole"), golden(runs.FAMILY, "text-only")
    demand(info, case.needs())
    forced = Capability.FORCED_TOKENS in info.capabilities
    tokens = case.tokens[:4] if forced else [None] * 4
    first = runs.forced(session, case.text, case.features, tokens).logits
    runs.forced(session, between.text, between.features, [None] * 8)
    again = runs.forced(session, case.text, case.features, tokens).logits
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "first, again", again, first, (noise, noise))
    judge.verdict()
