"""Level vision: image features from golden pixels, never from the target's own preprocessing."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.suite import runs
from vlmqual_conformance.suite.checks import features_within_budget, hidden, hidden_like_gold
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info

FAMILY = "idefics3"
HIDDEN = "features/image_hidden_states"
PROBES = ("masked-pixels", "padding-frames")


@requirement("IDEFICS3-VIS-001", "IDEFICS3-VIS-003", "IDEFICS3-VIS-005", "IDEFICS3-VIS-006", "IDEFICS3-VIS-007")
@pytest.mark.parametrize("case", runs.cases(FAMILY, lambda case: case.has_images and case.name not in PROBES))
def test_image_features_are_within_budget(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    features_within_budget(session, info, judge, case)


@requirement("IDEFICS3-VIS-002", "IDEFICS3-VIS-004")
def test_patches_of_a_partly_visible_frame_take_positions_by_fraction(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    features_within_budget(session, info, judge, golden(FAMILY, "masked-pixels"))


@requirement("IDEFICS3-VIS-007")
def test_padding_frames_are_dropped_wherever_they_stand(session: RemoteSession, info: Info, judge: Judge) -> None:
    features_within_budget(session, info, judge, golden(FAMILY, "padding-frames"))


@requirement("IDEFICS3-VIS-007")
def test_a_frame_with_some_values_of_zero_is_no_padding(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "photo-small")
    patch, _ = geometry()
    pixels = case.pixels["pixel_values"].copy()
    pixels[:, 0, :, :patch, :patch] = 0
    assert pixels[:, 0].any(), f"the first frame of {case.name} is zero everywhere"
    seen, gold = hidden(case, session.vision({**case.pixels, "pixel_values": pixels})), case.array(HIDDEN)
    assert seen.shape == gold.shape, f"{HIDDEN} has shape {seen.shape}, not {gold.shape}: a frame is lost"
    judge.compare(f"{HIDDEN} (frames behind one with zeros)", seen[1:], gold[1:], case.noise(HIDDEN, info.dtype))
    judge.verdict()


@requirement("IDEFICS3-VIS-007")
def test_frames_in_another_order_give_features_in_that_order(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "photo-small")
    order = np.array([3, 0, 4, 2, 1])
    moved = {name: np.ascontiguousarray(array[:, order]) for name, array in case.pixels.items()}
    gold = case.array(HIDDEN)[order]
    judge.compare(HIDDEN, hidden(case, session.vision(moved)), gold, case.noise(HIDDEN, info.dtype))
    judge.verdict()


@requirement("IDEFICS3-VIS-008")
@pytest.mark.parametrize("frame", [0, 3])
def test_a_frame_alone_gives_the_features_that_it_gives_among_others(
    session: RemoteSession, info: Info, judge: Judge, frame: int
) -> None:
    case = golden(FAMILY, "photo-small")
    single = {name: np.ascontiguousarray(array[:, frame : frame + 1]) for name, array in case.pixels.items()}
    among = hidden_like_gold(case, session.vision(case.pixels))
    noise = case.noise(HIDDEN, info.dtype)
    judge.same(HIDDEN, hidden(case, session.vision(single)), among[frame : frame + 1], (noise, noise))
    judge.verdict()


@requirement("IDEFICS3-VIS-004")
def test_content_of_wholly_masked_patches_does_not_change_features_of_visible_ones(
    session: RemoteSession, info: Info, judge: Judge
) -> None:
    case = golden(FAMILY, "masked-pixels")
    patch, factor = geometry()
    mask = case.pixels["pixel_attention_mask"] != 0
    frames, height, width = mask.shape[1:]
    blocks = mask.reshape(frames, height // patch, patch, width // patch, patch)
    valid = blocks.any(axis=(2, 4))  # (frames, n, n)
    # A wholly masked patch is filled with noise; the masked pixels of a partly visible patch belong to its content.
    hide = np.repeat(np.repeat(~valid, patch, axis=1), patch, axis=2)[None, :, None]
    noise = np.random.default_rng(7).uniform(-1, 1, case.pixels["pixel_values"].shape).astype(np.float32)
    other = np.where(hide, noise, case.pixels["pixel_values"])
    n = valid.shape[1] // factor
    clean = valid.reshape(frames, n, factor, n, factor).all(axis=(2, 4)).reshape(frames, n * n)
    assert clean.any(axis=1).all(), "the fixture leaves no image token that is made of visible patches alone"
    seen = hidden_like_gold(case, session.vision({**case.pixels, "pixel_values": other}))
    gold = case.array(HIDDEN)
    judge.compare(HIDDEN, seen[clean], gold[clean], case.noise(HIDDEN, info.dtype))
    judge.verdict()


@requirement("IDEFICS3-VIS-009")
def test_without_a_pixel_mask_every_pixel_is_visible(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "photo-whole")
    seen = hidden(case, session.vision({"pixel_values": case.pixels["pixel_values"]}))
    judge.compare(HIDDEN, seen, case.array(HIDDEN), case.noise(HIDDEN, info.dtype))
    judge.verdict()


def geometry() -> tuple[int, int]:
    """Patch size and scale factor of the tiny checkpoint."""
    config = runs.settings(FAMILY)
    return int(config["vision_config"]["patch_size"]), int(config["scale_factor"])
