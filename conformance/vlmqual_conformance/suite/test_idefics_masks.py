"""Level masks: what is masked does not matter, rows do not see each other, and tokens see the images that they may."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_conformance.suite.idefics_images import (
    FAMILY,
    MASK,
    as_features,
    cases,
    first_marker,
    prefix,
    reordered,
    seeing,
    several,
    slots,
    states,
    unseeing,
)
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, FloatArray, Info

BOTH_SIDES = ("batch-left", "batch-right")


def is_batch(case: Golden) -> bool:
    return case.rows > 1 and not (case.mask != 0).all()


# rows and padding -----------------------------------------------------------------------------------------------------


@requirement("IDEFICS-MASK-001")
@pytest.mark.parametrize("case", cases(is_batch))
def test_a_padded_row_gives_what_it_gives_on_its_own(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    row = checks.padded_row(case)
    checks.same_as_alone(session, info, judge, case, row, f"padded {case.meta['padding_side']}")


@requirement("IDEFICS-MASK-001")
def test_rows_padded_left_and_padded_right_agree(session: RemoteSession, info: Info, judge: Judge) -> None:
    left, right = (golden(FAMILY, name) for name in BOTH_SIDES)
    checks.both_sides_agree(session, info, judge, left, right)


@requirement("IDEFICS-MASK-001")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("photo", "text-only", "resampler-two-images")))
@pytest.mark.parametrize("side", ["left", "right"])
def test_still_more_padding_changes_nothing(
    session: RemoteSession, info: Info, judge: Judge, case: Golden, side: str
) -> None:
    checks.more_padding(session, info, judge, case, side)


@requirement("IDEFICS-MASK-002")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_the_ids_of_padding_do_not_matter(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    checks.other_ids_under_padding(session, info, judge, golden(FAMILY, name))


@requirement("IDEFICS-MASK-002")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_what_padding_sees_of_images_does_not_matter(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    case = golden(FAMILY, name)
    demand(info, case.needs())
    mask = case.text[MASK].copy()
    padding = case.mask == 0
    # On the right the last position is what new tokens go by (IDEFICS-DEC-002), so no step follows.
    mask[padding] = 1 - mask[padding]
    seen = session.prefill({**case.text, MASK: mask}, case.features).logits()
    judge.compare("prefill/logits", seen, case.array("prefill/logits"), case.noise("prefill/logits", info.dtype))
    judge.verdict()


@requirement("IDEFICS-MASK-003")
def test_a_text_row_depends_neither_on_its_empty_slot_nor_on_the_image_beside_it(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    case = golden(FAMILY, "text-beside-image")
    demand(info, case.needs())
    row = text_row(case)
    there = session.prefill(case.text, case.features).logits()
    here = session.prefill(case.text, as_features(case, -states(case))).logits()
    noise = case.noise("prefill/logits", info.dtype)
    own, others = slice(row, row + 1), slice(1 - row, 2 - row)
    judge.same("prefill/logits (text row, other images)", here[own], there[own], (noise, noise))
    judge.verdict()
    label = "prefill/logits (image row, another image)"
    checks.told_apart(judge, label, here[others], there[others], noise, "the row with an image is blind to it")


@requirement("IDEFICS-MASK-003")
def test_a_text_row_gives_what_it_gives_alone(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "text-beside-image")
    checks.same_as_alone(session, info, judge, case, text_row(case), "beside an image row")


def text_row(case: Golden) -> int:
    """The row, of two, that sees no image."""
    (row,) = np.flatnonzero(~case.text[MASK].any(axis=(1, 2)))
    return int(row)


@requirement("IDEFICS-MASK-004")
@pytest.mark.parametrize("case", cases(is_batch))
def test_rows_do_not_depend_on_the_other_rows(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    hidden = states(case).copy()
    hidden[0] = -hidden[0]
    checks.other_rows_do_not_matter(session, info, judge, case, 0, as_features(case, hidden))


# images and tokens ----------------------------------------------------------------------------------------------------


@requirement("IDEFICS-MASK-005")
@pytest.mark.parametrize("case", cases(several))
@pytest.mark.parametrize("slot", [0, 1])
def test_images_that_the_mask_hides_do_not_matter(
    session: RemoteSession, info: Info, judge: Judge, case: Golden, slot: int
) -> None:
    demand(info, case.needs())
    text, tokens = seeing(case, [slot]), case.tokens[: runs.steps_of(info)]
    hidden, shown = -states(case), states(case).copy()
    hidden[:, slot] = shown[:, slot]  # everything but what is seen is another
    shown[:, slot] = -shown[:, slot]
    there = runs.forced(session, text, case.features, tokens).logits
    here = runs.forced(session, text, as_features(case, hidden), tokens).logits
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "other hidden images", here, there, (noise, noise))
    judge.verdict()
    other = runs.forced(session, text, as_features(case, shown), tokens).logits
    otherwise = "the image that the mask shows is not seen"
    checks.told_apart(judge, "prefill/logits (another shown image)", other[0], there[0], noise, otherwise)


@requirement("IDEFICS-CROSS-007", "IDEFICS-MASK-005")
def test_a_token_may_see_several_images_at_once(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "two-images")
    demand(info, case.needs())
    text, noise = seeing(case, [0, 1]), case.noise("prefill/logits", info.dtype)
    there = session.prefill(text, case.features).logits()
    for slot in range(slots(case)):
        other = states(case).copy()
        other[:, slot] = -other[:, slot]
        here = session.prefill(text, as_features(case, other)).logits()
        label = f"prefill/logits (another image {slot} of two)"
        checks.told_apart(judge, label, here, there, noise, f"image {slot} is not seen beside the other one")
    # The same image twice gives every key twice, so the weights halve and nothing changes.
    twice = np.repeat(states(case)[:, :1], slots(case), axis=1)
    both = session.prefill(text, as_features(case, twice)).logits()
    one = session.prefill(seeing(case, [0]), as_features(case, twice)).logits()
    judge.same("prefill/logits (an image twice, once)", both, one, (noise, noise))
    judge.verdict()


@requirement("IDEFICS-MASK-006", "IDEFICS-CROSS-006")
def test_tokens_before_the_first_image_see_none(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "text-before-image")
    demand(info, case.needs())
    length = first_marker(case)
    assert unseeing(case)[0, :length].all(), f"tokens of {case.name} before the image see something by the mask"
    assert length > 1, f"{case.name} begins with its image"
    noise = case.noise("prefill/logits", info.dtype)
    before, after = prefix(case.text, length - 1), prefix(case.text, length + 1)
    there = session.prefill(before, case.features).logits()
    here = session.prefill(before, as_features(case, -states(case))).logits()
    judge.same("prefill/logits (another image behind the text)", here, there, (noise, noise))
    judge.verdict()
    there, here = (session.prefill(after, as_features(case, sign * states(case))).logits() for sign in (1, -1))
    label = "prefill/logits (image token, another image)"
    checks.told_apart(judge, label, here, there, noise, "the image token does not see its image")


@requirement("IDEFICS-CROSS-006", needs=[Capability.TAPS])
@pytest.mark.parametrize("case", cases(lambda case: bool(unseeing(case).any())))
def test_a_token_that_sees_no_image_still_goes_through_the_feed_forward(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    chosen = unseeing(case)
    first, second = (
        session.prefill(case.text, as_features(case, hidden)).taps() for hidden in (states(case), -states(case))
    )
    name = "text.cross_layers.0"
    noise = case.noise("prefill/logits", info.dtype)
    there, here = (checks.tensor_of(taps, name) for taps in (first, second))
    judge.same(f"{name} (tokens without image, other images)", here, there, (noise, noise), chosen)
    judge.verdict()
    entering = checks.tensor_of(first, "text.embeddings")
    picked = chosen != 0
    label = f"{name} (tokens without image, before and after the block)"
    otherwise = "the feed-forward of the block is left out where no image is seen"
    told_apart_alone(judge, label, there[picked], entering[picked], noise, otherwise)


def told_apart_alone(
    judge: Judge, label: str, one: FloatArray, other: FloatArray, noise: float, otherwise: str
) -> None:
    """Assert of every vector (n, D) by itself that it differs."""
    for place in range(len(one)):
        checks.told_apart(judge, label, one[place : place + 1], other[place : place + 1], noise, otherwise)


@requirement("IDEFICS-MASK-007")
@pytest.mark.parametrize("case", cases(several))
def test_images_exchanged_together_with_their_columns_change_nothing(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    order = list(reversed(range(slots(case))))
    text, tokens = reordered(case.text, order), case.tokens[: runs.steps_of(info)]
    run = runs.forced(session, text, as_features(case, states(case)[:, order]), tokens)
    runs.compare_steps(judge, run, case, info)
    judge.verdict()


@requirement("IDEFICS-MASK-008")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("photo", "text-only", "resampler-photo")))
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_slot_that_nothing_sees_changes_nothing(
    session: RemoteSession, info: Info, judge: Judge, case: Golden, place: str
) -> None:
    demand(info, case.needs())
    # Not the opposite of the picture, with which the mean over both slots would be 0.
    spare, unseen = -3 * states(case)[:, :1], np.zeros_like(case.text[MASK][:, :, :1])
    hidden, mask = [states(case), spare], [case.text[MASK], unseen]
    if place == "before":
        hidden.reverse()
        mask.reverse()
    text = {**case.text, MASK: np.concatenate(mask, axis=2)}
    tokens = case.tokens[: runs.steps_of(info)]
    run = runs.forced(session, text, as_features(case, np.concatenate(hidden, axis=1)), tokens)
    runs.compare_steps(judge, run, case, info)
    judge.verdict()


@requirement("IDEFICS-MASK-009")
@pytest.mark.parametrize("name", ["two-images", "text-only"])
def test_a_mask_of_truth_values_means_the_same(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    case = golden(FAMILY, name)
    demand(info, case.needs())
    text = {**case.text, MASK: case.text[MASK] != 0}
    runs.compare_steps(judge, runs.forced(session, text, case.features, case.tokens[: runs.steps_of(info)]), case, info)
    judge.verdict()
