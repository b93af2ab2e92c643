"""Level masks: what is masked does not matter, and rows do not see each other."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import demand
from vlmqual_conformance.suite import runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Array, Capability, Info

STEPS = 4
BOTH_SIDES = ("batch-left", "batch-right")


def steps_of(info: Info) -> int:
    """Forced steps after the prompt: none where the target cannot be forced."""
    return STEPS if Capability.FORCED_TOKENS in info.capabilities else 0


@requirement("IDEFICS3-TEXT-010")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_a_padded_row_gives_what_it_gives_alone(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    case = golden(runs.FAMILY, name)
    demand(info, case.needs())
    row = int(np.argmin((case.mask != 0).sum(axis=1)))
    tokens = case.tokens[: steps_of(info)]
    batch = runs.forced(session, case.text, case.features, tokens).logits[:, row : row + 1]
    single = runs.forced(session, runs.alone(case, row), runs.features_of(case, row), tokens[:, row : row + 1]).logits
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, f"padded {case.meta['padding_side']}, alone", batch, single, (noise, noise))
    judge.verdict()


@requirement("IDEFICS3-TEXT-010")
def test_padding_left_and_padding_right_agree(session: RemoteSession, info: Info, judge: Judge) -> None:
    left, right = (golden(runs.FAMILY, name) for name in BOTH_SIDES)
    demand(info, left.needs())
    made = [
        runs.forced(session, case.text, case.features, case.tokens[: steps_of(info)]).logits for case in (left, right)
    ]
    noises = [runs.steps_noise(case, info) for case in (left, right)]
    runs.same_steps(judge, "padded left, right", made[0], made[1], noises)
    judge.verdict()


@requirement("IDEFICS3-TEXT-010")
@pytest.mark.parametrize("side", ["left", "right"])
def test_more_padding_changes_nothing(session: RemoteSession, info: Info, judge: Judge, side: str) -> None:
    case = golden(runs.FAMILY, "text-only")
    width = ((0, 0), (7, 0) if side == "left" else (0, 7))
    padded = {name: np.pad(array, width) for name, array in case.text.items()}
    run = runs.forced(session, padded, None, case.tokens[: steps_of(info)])
    runs.compare_steps(judge, run, case, info)
    judge.verdict()


@requirement("IDEFICS3-TEXT-011")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_ids_under_padding_do_not_matter(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    case = golden(runs.FAMILY, name)
    demand(info, case.needs())
    other = np.random.default_rng(11).integers(1, 256, case.mask.shape)
    ids = np.where(case.mask != 0, case.text["input_ids"], other)
    run = runs.forced(session, {**case.text, "input_ids": ids}, case.features, case.tokens[: steps_of(info)])
    runs.compare_steps(judge, run, case, info)
    judge.verdict()


@requirement("IDEFICS3-TEXT-012")
def test_padding_frames_do_not_change_the_logits(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(runs.FAMILY, "padding-frames")
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
    case = golden(runs.FAMILY, "text-beside-image")
    demand(info, case.needs())
    row = next(index for index in range(case.rows) if runs.features_of(case, index) is None)
    tokens = case.tokens[: steps_of(info)]
    batch = runs.forced(session, case.text, case.features, tokens).logits[:, row : row + 1]
    single = runs.forced(session, runs.alone(case, row), None, tokens[:, row : row + 1]).logits
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "beside an image row, alone", batch, single, (noise, noise))
    judge.verdict()


@requirement("IDEFICS3-TEXT-014")
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_a_row_does_not_depend_on_the_other_rows(session: RemoteSession, info: Info, judge: Judge, name: str) -> None:
    case = golden(runs.FAMILY, name)
    demand(info, case.needs())
    tokens = case.tokens[: steps_of(info)].copy()
    text, features = changed(case, row=0)
    tokens[:, 0] = (tokens[:, 0] + 3) % 256
    run = runs.forced(session, text, features, tokens)
    kept = [index for index in range(case.rows) if index != 0]
    gold = case.logits[: len(run.logits)]
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "other rows changed", run.logits[:, kept], gold[:, kept], (noise, 0.0))
    judge.verdict()


def changed(case: Golden, row: int) -> tuple[dict[str, Array], dict[str, Array] | None]:
    """The case with other text and other images in one row."""
    ids = case.text["input_ids"].copy()
    plain = (case.mask[row] != 0) & (ids[row] < 256)
    ids[row, plain] = (ids[row, plain] + 5) % 256
    features = dict(case.features or {})
    own = runs.features_of(case, row)
    if own is not None:
        hidden = features["image_hidden_states"].copy()
        frames = len(own["image_hidden_states"])  # row 0 comes first
        hidden[:frames] = -hidden[:frames]
        features["image_hidden_states"] = hidden
    return {**case.text, "input_ids": ids}, features or None
