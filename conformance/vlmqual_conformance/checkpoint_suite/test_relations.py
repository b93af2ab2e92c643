"""What has to hold between answers of the target itself, of whatever size the checkpoint is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from vlmqual_conformance.checkpoint_suite.asking import Asked, Asker
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import Judge, checked
from vlmqual_conformance.references import Over
from vlmqual_conformance.subjects import demand
from vlmqual_conformance.suite import runs
from vlmqual_contract.distance import error
from vlmqual_contract.questions import question
from vlmqual_contract.questions import questions as default_questions
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Array, Capability, FloatArray, Info

#: Photographs of one shape, so that only pixels tell their prompts apart, not the number of tiles.
PAIR = ("coffee.png", "chelsea.png")
NAMES = ("photo", "two-photos", "text")
STEPS = 6
#: Half a unit in the last place of a dtype, relative: answers that differ by less are the same.
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
#: What a long prompt is made of.
WORDS = "The river comes down from the hills, turns north at the old bridge, and runs along the road to the sea. "


def asked(asker: Asker, over: Over, name: str) -> Asked:
    """One of the default questions."""
    return asker.ask(next(each for each in default_questions(over.model.family) if each.name == name))


def greedy(session: RemoteSession, asker: Asker, prompt: Asked, steps: int = STEPS) -> tuple[FloatArray, Array]:
    """Logits (1 + steps, B, V) and greedy tokens (1 + steps, B) of a prompt and its own tokens."""
    features = asker.features(prompt)
    run = runs.forced(session, asker.given(prompt, features), features, [None] * steps)
    return checked("logits", run.logits, run.logits.shape), run.tokens


def same(judge: Judge, asker: Asker, label: str, one: FloatArray, other: FloatArray) -> None:
    """Two answers of the target that should be the same."""
    runs.same_steps(judge, label, one, other, (asker.noise, asker.noise))


# generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.own("007")
@pytest.mark.parametrize("name", NAMES)
def test_decoding_step_by_step_equals_a_prefill_of_the_longer_prompt(
    session: RemoteSession, asker: Asker, over: Over, judge: Judge, name: str
) -> None:
    prompt = asked(asker, over, name)
    by_step, tokens = greedy(session, asker, prompt)
    features = asker.features(prompt)
    for count in (1, STEPS):
        longer = runs.continued_text(prompt.golden, tokens[:count])
        at_once = session.prefill(asker.given(prompt, features, longer), features).logits()
        judge.same(f"decode/logits.{count:02} (by step, at once)", by_step[count], at_once, (asker.noise,) * 2)
    judge.verdict()


@pytest.mark.own("014")
@pytest.mark.parametrize("name", ["photo", "text"])
def test_a_run_repeats_whatever_ran_in_between(
    session: RemoteSession, asker: Asker, over: Over, judge: Judge, name: str
) -> None:
    prompt, between = asked(asker, over, name), asked(asker, over, "two-photos")
    first, _ = greedy(session, asker, prompt)
    greedy(session, asker, between)
    again, _ = greedy(session, asker, prompt)
    same(judge, asker, "first, again", again, first)
    judge.verdict()


# masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.own("008")
@pytest.mark.parametrize("ids", ["zeros", "words"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["photo", "text"])
def test_padding_changes_nothing(
    session: RemoteSession, asker: Asker, over: Over, info: Info, judge: Judge, name: str, side: str, ids: str
) -> None:
    prompt = asked(asker, over, name)
    plain, own = greedy(session, asker, prompt, runs.steps_of(info))
    text = runs.padded_text(prompt.golden, side, 7)
    if ids == "words":
        real = prompt.text["input_ids"][:, asker.tail(prompt) :]
        text["input_ids"] = np.where(text["attention_mask"] != 0, text["input_ids"], np.resize(real, (1, 7))[:, :1])
    features = asker.features(prompt)
    padded = runs.forced(session, asker.given(prompt, features, text), features, own[:-1]).logits
    same(judge, asker, f"padded {side}, unpadded", padded, plain)
    judge.verdict()


@pytest.mark.own("009")
@pytest.mark.parametrize("names", [("page", "photo"), ("text", "photo"), ("photo", "two-photos")], ids="+".join)
def test_a_row_of_a_batch_gives_what_it_gives_alone(
    session: RemoteSession, asker: Asker, over: Over, info: Info, judge: Judge, names: Sequence[str]
) -> None:
    demand(info, {Capability.BATCH, Capability.PADDING})
    chosen = [next(each for each in default_questions(over.model.family) if each.name == name) for name in names]
    steps = runs.steps_of(info)
    whole = asker.ask(*chosen)
    # A token of Mllama before the first image reads every slot of its row (MLLAMA-DECODER-009), so a row that is
    # taken out of a batch keeps the slots that it has there.
    kept = over.model.family == "mllama"
    singles = [whole.row(row) if kept else asker.ask(each) for row, each in enumerate(chosen)]
    alone = [greedy(session, asker, each, steps) for each in singles]
    tokens = np.concatenate([own for _, own in alone], axis=1)
    batch = runs.forced(session, whole.whole, None, tokens[:steps]).logits
    for row, name in enumerate(names):
        same(judge, asker, f"{name} in a batch, alone", batch[:, row : row + 1], alone[row][0])
    judge.verdict()


# decode ---------------------------------------------------------------------------------------------------------------


@pytest.mark.own("010")
@pytest.mark.parametrize("boundary", [128, 1024])
def test_a_prompt_given_in_two_parts_equals_the_whole_prompt(
    session: RemoteSession, asker: Asker, over: Over, judge: Judge, boundary: int
) -> None:
    words = WORDS * (boundary // 8)
    whole = asker.ask(question(over.model.family, f"long-{boundary}", words, "chelsea.png"))
    start, end = asker.tail(whole), whole.text["input_ids"].shape[1]
    place = -(-(start + 4) // boundary) * boundary  # the first multiple with only text around it
    if place + 2 > min(end, asker.length):
        raise NotApplicable(
            f"position {place} is beyond the {end} tokens of the prompt or the {asker.length} positions of the cache"
        )
    features = asker.features(whole)
    tokens = whole.text["input_ids"][:, place - 2 : place + 2].T
    made = runs.forced(session, asker.given(whole, features, whole.part(place - 2)), features, tokens).logits
    for index in range(1, len(made)):
        prompt = asker.given(whole, features, whole.part(place - 2 + index))
        at_once = session.prefill(prompt, features).logits()
        label = f"decode/logits.{index:02} ({place - 2 + index} positions in two parts, at once)"
        judge.same(label, made[index], at_once, (asker.noise,) * 2)
    judge.verdict()


# parallel -------------------------------------------------------------------------------------------------------------


@pytest.mark.own("011")
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_what_one_gives(
    session: RemoteSession, ranks: RemoteSession, asker: Asker, over: Over, info: Info, judge: Judge, name: str
) -> None:
    prompt = asked(asker, over, name)
    features = asker.features(prompt)
    one, tokens = greedy(session, asker, prompt, runs.steps_of(info))
    given = None if features is None else features.arrays()
    two = runs.forced(ranks, asker.given(prompt, features), given, tokens[:-1]).logits
    same(judge, asker, "two ranks, one", two, one)
    if features is not None:
        whole = ranks.prefill(prompt.whole).logits()
        judge.same("prefill/logits (two ranks from pixels, one)", whole, one[0], (asker.noise,) * 2)
    judge.verdict()


# images ---------------------------------------------------------------------------------------------------------------


def differ(session: RemoteSession, asker: Asker, one: Asked, other: Asked, otherwise: str) -> None:
    """Assert that two prompts have other logits, by more than a repeated run and than rounding.

    How large the difference has to be cannot be said of an unknown checkpoint; one that is blind shows none at all.
    """
    if not np.array_equal(one.text["input_ids"], other.text["input_ids"]):
        raise NotApplicable("the two prompts have other ids, so their logits say nothing of the images")
    logits = [session.prefill(prompt.whole).logits() for prompt in (one, one, other)]
    first, again, changed = (checked("prefill/logits", each, logits[0].shape) for each in logits)
    least = max(error(again, first), UNITS[asker.dtype])
    found = error(changed, first)
    assert found > least, f"logits differ by {found:.2g} only, {least:.2g} is noise: {otherwise}"


@pytest.mark.own("012")
def test_images_that_change_places_give_other_logits(session: RemoteSession, asker: Asker, over: Over) -> None:
    words = "Which of them is darker?"
    one, other = (asker.ask(question(over.model.family, "order", words, *names)) for names in (PAIR, PAIR[::-1]))
    differ(session, asker, one, other, "two images are not told apart")


@pytest.mark.own("013")
def test_another_image_in_the_same_prompt_gives_other_logits(session: RemoteSession, asker: Asker, over: Over) -> None:
    words = "What can we see in this image?"
    one, other = (asker.ask(question(over.model.family, "image", words, name)) for name in PAIR)
    differ(session, asker, one, other, "the target is blind to its image")
