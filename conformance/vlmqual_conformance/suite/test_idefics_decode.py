"""Level decode: steps with gold's tokens forced, and what they see of the images."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import BadAnswer, Judge
from vlmqual_conformance.subjects import TargetKeeper, demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_conformance.suite.idefics_images import (
    FAMILY,
    MASK,
    as_features,
    cases,
    continued,
    settings,
    states,
)
from vlmqual_contract.remote import RemoteSession, RemoteStep
from vlmqual_contract.target import Capability, Info

COUNTER = "counters.cross_attention_kv"


@requirement("IDEFICS-DEC-001", "IDEFICS-DECODER-005")
@pytest.mark.parametrize("case", cases())
def test_logits_of_every_step_under_golds_tokens(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.every_forced_step(keeper, session, info, judge, case)


@requirement("IDEFICS-DEC-005")
@pytest.mark.parametrize("case", cases())
def test_greedy_tokens_under_golds_tokens_are_golds(
    keeper: TargetKeeper, session: RemoteSession, info: Info, case: Golden
) -> None:
    checks.tokens_of_forced_steps(keeper, session, info, case)


@requirement("IDEFICS-DEC-004")
@pytest.mark.parametrize(
    "case", cases(lambda case: case.name in ("batch-left", "photo", "text-only", "resampler-photo"))
)
def test_a_greedy_token_has_the_largest_logit(session: RemoteSession, info: Info, case: Golden) -> None:
    checks.greedy_is_largest(session, info, case)


# what new tokens see --------------------------------------------------------------------------------------------------


@requirement("IDEFICS-DEC-002")
@pytest.mark.parametrize("seen", [(0,), (0, 1), ()], ids=["another image", "both images", "nothing"])
def test_later_tokens_see_what_the_last_row_of_the_mask_lets_them(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, seen: tuple[int, ...]
) -> None:
    case = golden(FAMILY, "two-images")
    demand(info, case.needs())
    mask = case.text[MASK].copy()
    assert mask[0, -1].tolist() == [0, 1], f"the last token of {case.name} does not see the second image alone"
    mask[0, -1] = 0
    mask[0, -1, list(seen)] = 1
    text = {**case.text, MASK: mask}
    made = runs.forced(session, text, case.features, case.tokens).logits
    noises = (case.noise("decode/logits", info.dtype), case.noise("prefill/logits", info.dtype))
    for count in (1, len(case.tokens)):
        longer = runs.longer_text(case, count)
        longer[MASK] = np.concatenate([mask, np.repeat(mask[:, -1:], count, axis=1)], axis=1)
        at_once = session.prefill(longer, case.features).logits()
        judge.same(f"decode/logits.{count:02} (by step, at once)", made[count], at_once, noises)
    judge.verdict()
    as_it_was = runs.forced_run(keeper, session, case).logits
    label = "decode/logits (another last row of the mask)"
    checks.told_apart(judge, label, made[-1], as_it_was[-1], noises[0], "steps do not look at the mask's last row")


@requirement("IDEFICS-DEC-002")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("no-image-seen", "text-only")))
def test_later_tokens_of_a_prompt_that_sees_no_image_see_none(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    assert not case.text[MASK][:, -1].any(), f"the last token of {case.name} sees an image"
    mask = np.zeros_like(case.text[MASK])
    text = {**case.text, MASK: mask}
    there, here = (
        runs.forced(session, text, as_features(case, sign * states(case)), case.tokens).logits for sign in (1, -1)
    )
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "other unseen images", here, there, (noise, noise))
    judge.verdict()


# keys and values of images --------------------------------------------------------------------------------------------


@requirement("IDEFICS-DEC-001", needs=[Capability.TAPS])
def test_hidden_states_of_forty_steps_across_a_block_of_the_cache(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    checks.hidden_states_of_forced_steps(session, info, judge, golden(FAMILY, "across-blocks"))


@requirement("IDEFICS-DEC-003")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("batch-left", "photo", "resampler-photo")))
def test_keys_and_values_of_images_are_computed_once(session: RemoteSession, info: Info, case: Golden) -> None:
    demand(info, case.needs() | {Capability.TAPS})
    config = settings(case.checkpoint)
    blocks = config["num_hidden_layers"] // config["cross_layer_interval"]
    step = session.prefill(case.text, case.features)
    computed_once(step, blocks, "the prompt")
    for _ in range(8):
        step = session.decode(step)
    computed_once(step, blocks, "eight decode steps")


def computed_once(step: RemoteStep, blocks: int, when: str) -> None:
    taps = step.taps()
    if COUNTER not in taps:
        raise NotApplicable(f"the target's taps have no {COUNTER}, so how often it computes keys is not seen")
    counts = taps[COUNTER]
    if counts.shape != (blocks,):
        raise BadAnswer(f"{COUNTER} has shape {counts.shape}, not ({blocks},), one for each cross-attention block")
    assert (counts == 1).all(), (
        f"after {when} keys and values of images were computed {counts.tolist()} times, not once"
    )


@requirement("IDEFICS-DEC-007")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("photo", "resampler-photo")))
def test_sequences_that_live_side_by_side_see_their_own_images(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    tokens, noise = case.tokens[:4], runs.steps_noise(case, info)
    pictures = [as_features(case, sign * states(case)) for sign in (-1, 1)]
    alone = [runs.forced(session, case.text, features, tokens).logits for features in pictures]
    steps = [session.prefill(case.text, features) for features in pictures]
    beside = [[step.logits() for step in steps]]
    for given in tokens:
        steps = [session.decode(step, np.ascontiguousarray(given)) for step in steps]
        beside.append([step.logits() for step in steps])
    for index in range(len(steps)):
        made = np.stack([logits[index] for logits in beside])
        runs.same_steps(judge, f"sequence {index} beside another, alone", made, alone[index], (noise, noise))
    judge.verdict()
    label = "decode/logits (another image)"
    checks.told_apart(judge, label, beside[-1][0], beside[-1][1], noise, "both sequences see the same image")


# additional vocabulary ------------------------------------------------------------------------------------------------


@requirement("IDEFICS-DEC-006")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("photo", "resampler-photo")))
def test_additional_ids_are_fed_in_as_themselves(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs() | {Capability.FORCED_TOKENS})
    config = settings(case.checkpoint)
    words, more = int(config["vocab_size"]), int(config["additional_vocab_size"])
    noises = (case.noise("decode/logits", info.dtype), case.noise("prefill/logits", info.dtype))
    seen = {}
    for token in (0, words - 1, *range(words, words + more)):
        given = np.full(1, token, np.int64)
        seen[token] = session.decode(session.prefill(case.text, case.features), given).logits()
        if token < words:
            continue
        at_once = session.prefill(continued(case, token), case.features).logits()
        judge.same(f"decode/logits.01 (id {token} by step, at once)", seen[token], at_once, noises)
    judge.verdict()
    for token in range(words, words + more):
        for other in (known for known in seen if known < token):
            label = f"decode/logits.01 (id {token}, id {other})"
            checks.told_apart(judge, label, seen[token], seen[other], noises[0], "two ids are embedded alike")
