"""Level masks: what is masked does not matter, and rows do not see each other."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info

FAMILY = "idefics3"
BOTH_SIDES = ("batch-left", "batch-right")


@requirement("IDEFICS3-TEXT-010")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_a_padded_row_gives_what_it_gives_alone(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    case = golden(FAMILY, name)
    row = checks.padded_row(case)
    checks.same_as_alone(session, info, judge, case, row, f"padded {case.meta['padding_side']}")


@requirement("IDEFICS3-TEXT-010")
def test_padding_left_and_padding_right_agree(session: RemoteSession, info: Info, judge: Judge) -> None:
    left, right = (golden(FAMILY, name) for name in BOTH_SIDES)
    checks.both_sides_agree(session, info, judge, left, right)


@requirement("IDEFICS3-TEXT-010")
@pytest.mark.parametrize("side", ["left", "right"])
def test_more_padding_changes_nothing(session: RemoteSession, info: Info, judge: Judge, side: str) -> None:
    checks.more_padding(session, info, judge, golden(FAMILY, "text-only"), side)


@requirement("IDEFICS3-TEXT-011")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_ids_under_padding_do_not_matter(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    checks.other_ids_under_padding(session, info, judge, golden(FAMILY, name))


@requirement("IDEFICS3-TEXT-012")
def test_padding_frames_do_not_change_the_logits(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "padding-frames")
    demand(info, case.needs(injected=False))
    real = case.pixels["pixel_values"].any(axis=(0, 2, 3, 4))
    fewer = {name: np.ascontiguousarray(array[:, real]) for name, array in case.pixels.items()}
    there = session.prefill({**case.text, **case.pixels}).logits()
    here = session.prefill({**case.text, **fewer}).logits()
    noise = case.noise("chain/logits", info.dtype)
    judge.same("prefill/logits (padding frames, none)", here, there, (noise, noise))
    judge.verdict()


@requirement("IDEFICS3-TEXT-013")
def test_a_text_row_beside_an_image_row_gives_what_it_gives_alone(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    case = golden(FAMILY, "text-beside-image")
    row = next(index for index in range(case.rows) if runs.features_of(case, index) is None)
    checks.same_as_alone(session, info, judge, case, row, "beside an image row")


@requirement("IDEFICS3-TEXT-014")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_a_row_does_not_depend_on_the_other_rows(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    case = golden(FAMILY, name)
    features = dict(case.features or {})
    own = runs.features_of(case, 0)
    if own is not None:
        hidden = features["image_hidden_states"].copy()
        frames = len(own["image_hidden_states"])  # row 0 comes first
        hidden[:frames] = -hidden[:frames]
        features["image_hidden_states"] = hidden
    checks.other_rows_do_not_matter(session, info, judge, case, 0, features or None)
