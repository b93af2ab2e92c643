"""Level vision: features of tiles from golden pixels, never from the target's own preprocessing."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_conformance.suite.mllama_images import FAMILY, as_features, image_of, reordered, slots, states, tiles
from vlmqual_contract.remote import RemoteFeatures, RemoteSession
from vlmqual_contract.target import Array, Capability, FloatArray, Info

HIDDEN = "features/cross_attention_states"
KEPT = "vision.intermediate_states"
RULES = tuple(f"MLLAMA-TOWER-{number:03}" for number in range(1, 14))


def several(case: Golden) -> bool:
    """One row of at least two images."""
    return case.has_images and case.rows == 1 and slots(case) > 1


def has_padding_image(case: Golden) -> bool:
    return case.has_images and bool((case.pixels["aspect_ratio_ids"] == 0).any())


def by_tile(case: Golden, seen: RemoteFeatures) -> FloatArray:
    """Features of the target as (B, N, T, L, D)."""
    return checks.hidden_like_gold(case, seen).reshape(states(case).shape)


@requirement(*RULES)
@pytest.mark.parametrize("case", runs.cases(FAMILY, lambda case: case.has_images))
def test_features_of_tiles_are_within_budget(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.features_within_budget(session, info, judge, case)


@requirement("MLLAMA-TOWER-011", "MLLAMA-TOWER-012", needs=[Capability.TAPS])
@pytest.mark.parametrize("case", runs.cases(FAMILY, lambda case: f"taps/vision/{KEPT}" in case.names))
def test_intermediate_states_are_those_that_enter_the_chosen_layers(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, {Capability.BATCH} if case.rows > 1 else set())
    chosen = runs.settings(FAMILY)["vision_config"]["intermediate_layers_indices"]
    taps = session.vision(case.pixels).taps()
    names = ["vision.embeddings" if index == 0 else f"vision.layers.{index - 1}" for index in chosen]
    for name in (KEPT, *names):
        checks.tensor_of(taps, name)
    noise = case.noise(f"taps/vision/{KEPT}", info.dtype)
    for place, name in enumerate(names):
        kept = taps[KEPT][..., place :: len(chosen)]
        judge.same(f"{KEPT} (number {place}, {name})", kept, taps[name], (noise, noise))
    judge.verdict()


@requirement("MLLAMA-TOWER-007")
@pytest.mark.parametrize("name", ["photo-one-tile", "three-tiles"])
def test_real_tiles_see_the_padding_tiles_of_their_image(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    case = golden(FAMILY, name)
    real = case.pixels["aspect_ratio_mask"][0, 0] != 0
    assert real.any(), f"{name} has no real tile"
    assert not real.all(), f"{name} has no padding tile"
    there = by_tile(case, session.vision(case.pixels))
    here = by_tile(case, session.vision({**case.pixels, "pixel_values": painted(case, ~real)}))
    label = f"{HIDDEN} (real tiles beside other padding tiles)"
    otherwise = "real tiles do not attend to padding tiles"
    checks.told_apart(judge, label, here[:, :, real], there[:, :, real], case.noise(HIDDEN, info.dtype), otherwise)


@requirement("MLLAMA-TOWER-007", needs=[Capability.TAPS])
def test_a_padding_tile_does_not_see_another_one_in_its_layer(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "photo-one-tile")
    real = case.pixels["aspect_ratio_mask"][0, 0] != 0
    changed, *others = (int(tile) for tile in np.flatnonzero(~real))
    assert others, "the case has a single padding tile"
    only = np.arange(len(real)) == changed
    name = "vision.layers.0"
    seen = [
        checks.tensor_of(session.vision({**case.pixels, "pixel_values": pixels}).taps(), name)
        for pixels in (case.pixels["pixel_values"], painted(case, only))
    ]
    noise = case.noise(HIDDEN, info.dtype)
    judge.same(f"{name} (padding tiles beside a changed one)", seen[1][:, others], seen[0][:, others], (noise, noise))
    judge.verdict()


def painted(case: Golden, chosen: Array) -> Array:
    """pixel_values with noise in the chosen tiles of the first image."""
    pixels = case.pixels["pixel_values"].copy()
    noise = np.random.default_rng(5).uniform(-1, 1, pixels[0, 0, chosen].shape)
    pixels[0, 0, chosen] = noise.astype(pixels.dtype)
    return pixels


@requirement("MLLAMA-TOWER-002", "MLLAMA-TOWER-004", "MLLAMA-TOWER-009")
@pytest.mark.parametrize("other", [1, 5])
def test_the_arrangement_of_the_tiles_changes_their_features(
    session: RemoteSession, info: Info, judge: Judge, other: int
) -> None:
    case = golden(FAMILY, "two-tiles-wide")
    own = case.pixels["aspect_ratio_ids"]
    assert (own != other).all(), f"{case.name} has the arrangement {other} itself"
    there = checks.hidden_like_gold(case, session.vision(case.pixels))
    moved = session.vision({**case.pixels, "aspect_ratio_ids": np.full_like(own, other)})
    here = checks.hidden_like_gold(case, moved)
    noise = case.noise(HIDDEN, info.dtype)
    label = f"{HIDDEN} (aspect_ratio_id {other} for {int(own[0, 0])})"
    checks.told_apart(judge, label, here, there, noise, "aspect_ratio_ids are not looked at")


@requirement("MLLAMA-TOWER-014")
@pytest.mark.parametrize("case", runs.cases(FAMILY, several))
def test_images_in_another_order_give_features_in_that_order(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    order = list(reversed(range(slots(case))))
    seen = checks.hidden(case, session.vision(reordered(case.pixels, order)))
    gold = as_features(states(case)[:, order])[HIDDEN.removeprefix("features/")]
    judge.compare(HIDDEN, seen, gold, case.noise(HIDDEN, info.dtype))
    judge.verdict()


@requirement("MLLAMA-TOWER-014")
@pytest.mark.parametrize("case", runs.cases(FAMILY, several))
def test_an_image_alone_gives_the_features_that_it_gives_among_others(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    among = by_tile(case, session.vision(case.pixels))
    noise = case.noise(HIDDEN, info.dtype)
    for slot in range(slots(case)):
        single = checks.hidden(case, session.vision(image_of(case.pixels, 0, slot)))
        judge.same(
            f"{HIDDEN} (image {slot} alone, among others)",
            single,
            among[:, slot].reshape(1, -1, among.shape[-1]),
            (noise, noise),
        )
    judge.verdict()


@requirement("MLLAMA-TOWER-015")
@pytest.mark.parametrize("case", runs.cases(FAMILY, has_padding_image))
def test_a_padding_image_goes_through_the_vision_model(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    row, slot = (int(index) for index in np.argwhere(case.pixels["aspect_ratio_ids"] == 0)[0])
    padding = image_of(case.pixels, row, slot)
    assert padding["aspect_ratio_mask"].tolist() == [[[1] + [0] * (tiles(case) - 1)]]
    assert not padding["pixel_values"].any(), f"the padding image of {case.name} has pixels"
    gold = states(case)[row, slot].reshape(1, -1, states(case).shape[-1])
    judge.compare(HIDDEN, checks.hidden(case, session.vision(padding)), gold, case.noise(HIDDEN, info.dtype))
    judge.verdict()
