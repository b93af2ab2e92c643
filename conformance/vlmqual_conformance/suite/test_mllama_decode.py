"""Level decode: sixteen steps with gold's tokens forced, and what they see of the images."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import BadAnswer, Judge
from vlmqual_conformance.subjects import TargetKeeper, demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_conformance.suite.mllama_images import FAMILY, MASK, as_features, states
from vlmqual_contract.remote import RemoteSession, RemoteStep
from vlmqual_contract.target import Capability, Info

COUNTER = "counters.cross_attention_kv"


@requirement("MLLAMA-DEC-001", "MLLAMA-DECODER-013")
@pytest.mark.parametrize("case", runs.cases(FAMILY))
def test_logits_of_every_step_under_golds_tokens(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.every_forced_step(keeper, session, info, judge, case)


@requirement("MLLAMA-DEC-001", needs=[Capability.TAPS])
def test_hidden_states_of_forty_steps_across_a_block_of_the_cache(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    checks.hidden_states_of_forced_steps(session, info, judge, golden(FAMILY, "across-blocks"))


@requirement("MLLAMA-DEC-003")
@pytest.mark.parametrize("case", runs.cases(FAMILY))
def test_greedy_tokens_under_golds_tokens_are_golds(
    keeper: TargetKeeper, session: RemoteSession, info: Info, case: Golden
) -> None:
    checks.tokens_of_forced_steps(keeper, session, info, case)


@requirement("MLLAMA-DEC-002")
@pytest.mark.parametrize(
    "case", runs.cases(FAMILY, lambda case: case.name in ("batch-left", "photo-one-tile", "text-only"))
)
def test_a_greedy_token_has_the_largest_logit(session: RemoteSession, info: Info, case: Golden) -> None:
    checks.greedy_is_largest(session, info, case)


@requirement("MLLAMA-DEC-004")
@pytest.mark.parametrize("seen", [(0,), ()], ids=["another image", "nothing"])
def test_later_tokens_see_what_the_last_row_of_the_mask_lets_them(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, seen: tuple[int, ...]
) -> None:
    case = golden(FAMILY, "two-images")
    demand(info, case.needs())
    dense = case.text[MASK].copy()
    assert not dense[0, -1, 0].any(), f"the last token of {case.name} sees the first image"
    first = dense[0, :, 0].max(axis=0)
    dense[0, -1] = 0
    dense[0, -1, list(seen)] = first
    text = {**case.text, MASK: dense}
    made = runs.forced(session, text, case.features, case.tokens).logits
    noises = (case.noise("decode/logits", info.dtype), case.noise("prefill/logits", info.dtype))
    for count in (1, len(case.tokens)):
        longer = runs.longer_text(case, count)
        longer[MASK] = np.concatenate([dense, np.repeat(dense[:, -1:], count, axis=1)], axis=1)
        at_once = session.prefill(longer, case.features).logits()
        judge.same(f"decode/logits.{count:02} (by step, at once)", made[count], at_once, noises)
    judge.verdict()
    as_it_was = runs.forced_run(keeper, session, case).logits
    label = "decode/logits (another last row of the mask)"
    checks.told_apart(judge, label, made[-1], as_it_was[-1], noises[0], "steps do not look at the mask's last row")


@requirement("MLLAMA-DEC-006")
@pytest.mark.parametrize("name", ["photo-one-tile", "text-only"])
def test_sequences_that_live_side_by_side_have_their_own_caches(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    case = golden(FAMILY, name)
    pictures = [as_features(sign * states(case)) if case.has_images else None for sign in (1, -1)]
    checks.side_by_side(session, info, judge, case, pictures)


@requirement("MLLAMA-DEC-005")
@pytest.mark.parametrize("name", ["batch-left", "photo-four-tiles"])
def test_keys_and_values_of_images_are_computed_once(session: RemoteSession, info: Info, name: str) -> None:
    case = golden(FAMILY, name)
    demand(info, case.needs() | {Capability.TAPS})
    layers = len(runs.settings(FAMILY)["text_config"]["cross_attention_layers"])
    step = session.prefill(case.text, case.features)
    computed_once(step, layers, "the prompt")
    for _ in range(8):
        step = session.decode(step)
    computed_once(step, layers, "eight decode steps")


def computed_once(step: RemoteStep, layers: int, when: str) -> None:
    taps = step.taps()
    if COUNTER not in taps:
        raise NotApplicable(f"the target's taps have no {COUNTER}, so how often it computes keys is not seen")
    counts = taps[COUNTER]
    if counts.shape != (layers,):
        raise BadAnswer(f"{COUNTER} has shape {counts.shape}, not ({layers},), one for each cross-attention layer")
    assert (counts == 1).all(), (
        f"after {when} keys and values of images were computed {counts.tolist()} times, not once"
    )
