"""Level masks: what is masked does not matter, rows do not see each other, and tokens see the images that they may."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_conformance.suite.mllama_images import (
    FAMILY,
    MASK,
    as_features,
    first_marker,
    like_the_first_marker,
    prefix,
    reordered,
    seeing_only,
    slots,
    states,
    unmasked,
)
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info

BOTH_SIDES = ("batch-left", "batch-right")


def several(case: Golden) -> bool:
    """One row of at least two images."""
    return case.has_images and case.rows == 1 and slots(case) > 1


# rows and padding -----------------------------------------------------------------------------------------------------


@requirement("MLLAMA-MASK-001")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_a_padded_row_gives_what_it_gives_on_its_own(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    case = golden(FAMILY, name)
    row = checks.padded_row(case)
    checks.same_as_alone(session, info, judge, case, row, f"padded {case.meta['padding_side']}")


@requirement("MLLAMA-MASK-001")
def test_rows_padded_left_and_padded_right_agree(session: RemoteSession, info: Info, judge: Judge) -> None:
    left, right = (golden(FAMILY, name) for name in BOTH_SIDES)
    checks.both_sides_agree(session, info, judge, left, right)


@requirement("MLLAMA-MASK-001")
@pytest.mark.parametrize("name", ["photo-one-tile", "text-only", "two-images"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_still_more_padding_changes_nothing(
    session: RemoteSession, info: Info, judge: Judge, name: str, side: str
) -> None:
    checks.more_padding(session, info, judge, golden(FAMILY, name), side)


@requirement("MLLAMA-MASK-002")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_the_ids_of_padding_do_not_matter(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    checks.other_ids_under_padding(session, info, judge, golden(FAMILY, name))


@requirement("MLLAMA-MASK-003")
def test_a_text_row_does_not_depend_on_the_image_beside_it(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "text-beside-image")
    row = text_row(case)
    by_tile = states(case).copy()
    by_tile[1 - row] = -by_tile[1 - row]
    checks.other_rows_do_not_matter(session, info, judge, case, 1 - row, as_features(by_tile))


@requirement("MLLAMA-MASK-003")
def test_a_text_row_gives_what_it_gives_alone_with_its_padding_image(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    case = golden(FAMILY, "text-beside-image")
    checks.same_as_alone(session, info, judge, case, text_row(case), "beside an image row")


@requirement("MLLAMA-MASK-003")
def test_a_text_row_beside_an_image_row_sees_its_padding_image(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    case = golden(FAMILY, "text-beside-image")
    demand(info, case.needs())
    row = text_row(case)
    by_tile = states(case).copy()
    by_tile[row] = -by_tile[row]
    there = session.prefill(case.text, case.features).logits()
    here = session.prefill(case.text, as_features(by_tile)).logits()
    noise = case.noise("prefill/logits", info.dtype)
    label = "prefill/logits (another padding image)"
    otherwise = "tokens whose mask is 0 throughout do not attend"
    checks.told_apart(judge, label, here[row : row + 1], there[row : row + 1], noise, otherwise)


def text_row(case: Golden) -> int:
    """The row, of two, that sees no image by its mask."""
    (row,) = np.flatnonzero(~case.text[MASK].any(axis=(1, 2, 3)))
    return int(row)


@requirement("MLLAMA-MASK-004")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_rows_do_not_depend_on_the_other_rows(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    case = golden(FAMILY, name)
    by_tile = states(case).copy()
    by_tile[0] = -by_tile[0]
    checks.other_rows_do_not_matter(session, info, judge, case, 0, as_features(by_tile))


# images and tokens ----------------------------------------------------------------------------------------------------


@requirement("MLLAMA-MASK-005")
@pytest.mark.parametrize("slot", [0, 1])
def test_image_positions_that_the_mask_hides_do_not_matter(
    session: RemoteSession, info: Info, judge: Judge, slot: int
) -> None:
    case = golden(FAMILY, "two-images")
    demand(info, case.needs())
    text, tokens = seeing_only(case, slot, 0), case.tokens[: runs.steps_of(info)]
    hidden, shown = -states(case), states(case).copy()
    hidden[:, slot, 0] = shown[:, slot, 0]  # everything but what is seen is another
    shown[:, slot, 0] = -shown[:, slot, 0]
    there = runs.forced(session, text, case.features, tokens).logits
    here = runs.forced(session, text, as_features(hidden), tokens).logits
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "other hidden images", here, there, (noise, noise))
    judge.verdict()
    other = runs.forced(session, text, as_features(shown), tokens).logits
    otherwise = "the tile that the mask shows is not seen"
    checks.told_apart(judge, "prefill/logits (another shown tile)", other[0], there[0], noise, otherwise)


@requirement("MLLAMA-MASK-006")
def test_tokens_before_the_first_image_see_all_image_positions_in_any_order(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    case = golden(FAMILY, "text-before-image")
    demand(info, case.needs())
    length = first_marker(case)
    assert length > 0, f"{case.name} begins with its image"
    assert unmasked(case)[0, :length].all(), f"tokens of {case.name} before the image see something by the mask"
    text = prefix(case.text, length)
    hidden = case.array(case.hidden)
    order = np.random.default_rng(3).permutation(hidden.shape[1])
    name = case.hidden.removeprefix("features/")
    there = session.prefill(text, case.features).logits()
    mixed = session.prefill(text, {name: np.ascontiguousarray(hidden[:, order])}).logits()
    noise = case.noise("prefill/logits", info.dtype)
    judge.same("prefill/logits (image positions in another order)", mixed, there, (noise, noise))
    judge.verdict()
    other = session.prefill(text, {name: -hidden}).logits()
    otherwise = "tokens before the first image do not attend to it"
    checks.told_apart(judge, "prefill/logits (another image behind the text)", other, there, noise, otherwise)


@requirement("MLLAMA-MASK-007")
@pytest.mark.parametrize("case", runs.cases(FAMILY, several))
def test_images_exchanged_together_with_their_columns_change_nothing(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    order = list(reversed(range(slots(case))))
    text = {**case.text, **reordered({MASK: case.text[MASK]}, order, axis=2)}
    tokens = case.tokens[: runs.steps_of(info)]
    runs.compare_steps(judge, runs.forced(session, text, as_features(states(case)[:, order]), tokens), case, info)
    judge.verdict()


@requirement("MLLAMA-MASK-008")
def test_the_first_of_consecutive_markers_sees_its_own_image_only(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    case = golden(FAMILY, "consecutive-images")
    demand(info, case.needs())
    place = first_marker(case)
    dense = case.text[MASK][0]
    assert dense[place].any(axis=1).tolist() == [True, False], f"{case.name}: the first marker sees {dense[place]}"
    assert dense[place + 1].any(axis=1).all(), f"{case.name}: the second marker sees {dense[place + 1]}"
    text = like_the_first_marker(case)
    noise = case.noise("prefill/logits", info.dtype)
    second, both = states(case).copy(), states(case)[:, ::-1]
    second[:, 1] = -second[:, 1]
    until_first, until_second = prefix(text, place + 1), prefix(text, place + 2)
    first = session.prefill(until_first, case.features).logits()
    same = session.prefill(until_first, as_features(second)).logits()
    judge.same("prefill/logits (first marker, another second image)", same, first, (noise, noise))
    judge.verdict()
    for label, wanted, until in (("first marker", both, until_first), ("second marker", second, until_second)):
        there = session.prefill(until, case.features).logits()
        here = session.prefill(until, as_features(wanted)).logits()
        name = f"prefill/logits ({label}, another image)"
        checks.told_apart(judge, name, here, there, noise, f"the {label} does not see its image")
