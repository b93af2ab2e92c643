"""Level vision: features of pictures from golden pixels, never from the target's own preprocessing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden, goldens
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import BadAnswer, Judge
from vlmqual_conformance.suite import checks, idefics_files
from vlmqual_conformance.suite.idefics_images import (
    FAMILY,
    INTERPOLATE,
    cases,
    image_of,
    noise_pictures,
    settings,
    several,
    slots,
    states,
    with_pixels,
)
from vlmqual_conformance.suite.idefics_rules import resized_positions
from vlmqual_contract.errors import TargetRaised, UsageError
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Array, Capability, FloatArray, Info

TOWER = tuple(f"IDEFICS-TOWER-{number:03}" for number in range(1, 7))
RESAMPLER = tuple(f"IDEFICS-RESAMPLER-{number:03}" for number in range(1, 7))
EMBEDDED = "vision.embeddings"


def with_rules() -> list[Any]:
    """Every golden with the rules that it is about beyond those of the tower."""
    found = []
    for case in goldens(FAMILY):
        ids = ["IDEFICS-TOWER-007"]
        if settings(case.checkpoint)["use_resampler"]:
            ids = list(RESAMPLER)
        if INTERPOLATE in case.pixels:
            ids.insert(0, "IDEFICS-TOWER-009")
        found.append(pytest.param(case, id=case.name, marks=requirement(*ids)))
    return sorted(found, key=lambda parameter: parameter.values[0].checkpoint)


def is_interpolated(case: Golden) -> bool:
    return INTERPOLATE in case.pixels


def has_an_empty_slot(case: Golden) -> bool:
    return bool((~case.pixels["pixel_values"].any(axis=(2, 3, 4))).any())


@requirement(*TOWER)
@pytest.mark.parametrize("case", with_rules())
def test_features_of_pictures_are_within_budget(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.features_within_budget(session, info, judge, case)


@requirement("IDEFICS-TOWER-007")
def test_features_are_what_leaves_the_last_layer(session: RemoteSession, info: Info, judge: Judge) -> None:
    case = golden(FAMILY, "photo")
    seen = session.vision(case.pixels)
    hidden = checks.hidden_like_gold(case, seen)
    judge.compare(case.hidden, hidden, states(case), case.noise(case.hidden, info.dtype))
    judge.verdict()
    table = idefics_files.weights()
    prefix = "model.vision_model.post_layernorm"
    scale, shift = (table[f"{prefix}.{name}"].wide() for name in ("weight", "bias"))
    gold = states(case)
    spread = np.sqrt(gold.var(axis=-1, keepdims=True) + settings()["vision_config"]["layer_norm_eps"])
    normed = (gold - gold.mean(axis=-1, keepdims=True)) / spread * scale + shift
    noise = case.noise(case.hidden, info.dtype)
    label = f"{case.hidden} (as it is, after post_layernorm)"
    checks.told_apart(judge, label, hidden, normed, noise, "post_layernorm changes nothing in this checkpoint")


# pictures and slots ---------------------------------------------------------------------------------------------------


@requirement("IDEFICS-TOWER-008")
@pytest.mark.parametrize("case", cases(several))
def test_pictures_in_another_order_give_features_in_that_order(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    order = list(reversed(range(slots(case))))
    pixels = {**case.pixels, "pixel_values": np.ascontiguousarray(case.pixels["pixel_values"][:, order])}
    seen = checks.hidden(case, session.vision(pixels))
    judge.compare(case.hidden, seen, states(case)[:, order], case.noise(case.hidden, info.dtype))
    judge.verdict()


@requirement("IDEFICS-TOWER-008")
@pytest.mark.parametrize("case", cases(several))
def test_a_picture_alone_gives_the_features_that_it_gives_among_others(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    among = checks.hidden_like_gold(case, session.vision(case.pixels))
    noise = case.noise(case.hidden, info.dtype)
    for slot in range(slots(case)):
        single = checks.hidden(case, session.vision(image_of(case.pixels, 0, slot)))
        label = f"{case.hidden} (picture {slot} alone, among others)"
        judge.same(label, single, among[:, slot : slot + 1], (noise, noise))
    judge.verdict()


@requirement("IDEFICS-TOWER-008")
@pytest.mark.parametrize("case", cases(has_an_empty_slot))
def test_a_slot_without_a_picture_goes_through_the_tower_as_any(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    row, slot = (int(index) for index in np.argwhere(~case.pixels["pixel_values"].any(axis=(2, 3, 4)))[0])
    gold = states(case)[row : row + 1, slot : slot + 1]
    seen = checks.hidden(case, session.vision(image_of(case.pixels, row, slot)))
    judge.compare(case.hidden, seen, gold, case.noise(case.hidden, info.dtype))
    judge.verdict()


# other sizes ----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-TOWER-011")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("photo", "resampler-photo")))
def test_interpolation_changes_nothing_at_the_configured_size(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    seen = session.vision(with_pixels(case, case.pixels["pixel_values"], interpolate=True))
    judge.compare(case.hidden, checks.hidden(case, seen), states(case), case.noise(case.hidden, info.dtype))
    judge.verdict()


@requirement("IDEFICS-TOWER-010")
@pytest.mark.parametrize(
    "size", [(84, 84), (42, 42), (56, 84), (84, 56), (57, 56)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_pictures_of_another_size_are_refused_without_interpolation(
    session: RemoteSession, size: tuple[int, int]
) -> None:
    case = golden(FAMILY, "photo")
    assert size != case.pixels["pixel_values"].shape[-2:], f"{case.name} has this size itself"
    for inputs in (
        with_pixels(case, noise_pictures(*size)),
        {**with_pixels(case, noise_pictures(*size)), INTERPOLATE: np.zeros(1, np.int64)},
    ):
        try:
            shape = checks.hidden(case, session.vision(inputs)).shape
        except (TargetRaised, UsageError):
            continue
        raise AssertionError(
            f"pictures of {size[0]} x {size[1]} pixels give features of shape {shape}, "
            f"although their positions are not to be interpolated"
        )


@requirement("IDEFICS-TOWER-009", needs=[Capability.TAPS])
@pytest.mark.parametrize(
    "size",
    [(84, 56), (56, 84), (42, 98), (28, 28), (61, 57), (14, 126)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_positions_are_interpolated_as_the_rule_says(
    session: RemoteSession, info: Info, judge: Judge, size: tuple[int, int]
) -> None:
    case = golden(FAMILY, "photo")
    pictures = noise_pictures(*size)
    taps = session.vision(with_pixels(case, pictures, interpolate=True)).taps()
    noise = case.noise(f"taps/vision/{EMBEDDED}", info.dtype)
    judge.compare(EMBEDDED, checks.tensor_of(taps, EMBEDDED), embedded(pictures[0]), noise)
    judge.verdict()


def embedded(pictures: Array) -> FloatArray:
    """What pre_layrnorm makes of pictures (N, 3, H, W) of a size other than the configured, (N, 1 + P, E) float64."""
    vision = settings()["vision_config"]
    table = {
        name.removeprefix("model.vision_model."): tensor.wide()
        for name, tensor in idefics_files.weights().items()
        if re.match(r"model\.vision_model\.(embeddings|pre_layrnorm)\.", name)
    }
    patch = int(vision["patch_size"])
    rows, columns = (side // patch for side in pictures.shape[2:])
    kernel = table["embeddings.patch_embedding.weight"]
    cut = pictures[..., : rows * patch, : columns * patch].astype(np.float64)
    cut = cut.reshape(len(pictures), -1, rows, patch, columns, patch)
    patches = np.einsum("ncrhkw,echw->nrke", cut, kernel).reshape(len(pictures), rows * columns, -1)
    first = np.broadcast_to(table["embeddings.class_embedding"], (len(pictures), 1, patches.shape[-1]))
    x = np.concatenate([first, patches], axis=1)
    x = x + resized_positions(table["embeddings.position_embedding.weight"], rows, columns)
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + vision["layer_norm_eps"])
    made: FloatArray = (x - x.mean(axis=-1, keepdims=True)) / spread
    return made * table["pre_layrnorm.weight"] + table["pre_layrnorm.bias"]


@requirement("IDEFICS-TOWER-009")
@pytest.mark.parametrize("case", cases(is_interpolated))
def test_a_larger_picture_is_seen_whole(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    side = int(settings(case.checkpoint)["vision_config"]["image_size"])
    pixels = case.pixels["pixel_values"].copy()
    assert pixels.shape[-1] > side, f"{case.name} is not larger than the configured size"
    pixels[..., side:, side:] = -pixels[..., side:, side:]
    there = checks.hidden_like_gold(case, session.vision(case.pixels))
    here = checks.hidden_like_gold(case, session.vision({**case.pixels, "pixel_values": pixels}))
    label = f"{case.hidden} (another corner beyond the configured size)"
    noise = case.noise(case.hidden, info.dtype)
    checks.told_apart(judge, label, here, there, noise, "what lies beyond the configured size is not looked at")


@requirement("IDEFICS-TOWER-001")
@pytest.mark.parametrize("case", cases(is_interpolated))
def test_a_rest_at_the_right_and_bottom_that_fills_no_patch_is_left_out(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    rest = int(settings(case.checkpoint)["vision_config"]["patch_size"]) - 1
    pixels = case.pixels["pixel_values"]
    longer = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (0, rest), (0, rest)), constant_values=pixels.max())
    seen = checks.hidden_like_gold(case, session.vision({**case.pixels, "pixel_values": longer}))
    judge.compare(f"{case.hidden} (pictures with a rest)", seen, states(case), case.noise(case.hidden, info.dtype))
    judge.verdict()


@requirement("IDEFICS-RESAMPLER-001")
@pytest.mark.parametrize("case", cases(lambda case: case.name == "resampler-photo"))
@pytest.mark.parametrize("side", [28, 84, 112])
def test_a_resampler_gives_as_many_vectors_whatever_the_size(session: RemoteSession, case: Golden, side: int) -> None:
    config = settings(case.checkpoint)
    wanted = (1, 2, config["perceiver_config"]["resampler_n_latents"], config["vision_config"]["embed_dim"])
    seen = session.vision(with_pixels(case, noise_pictures(side, side, 2), interpolate=True))
    found = checks.hidden(case, seen)
    if found.shape != wanted:
        sentence = f"{case.hidden} of pictures of {side} x {side} has shape {found.shape}, not {wanted}"
        raise BadAnswer(sentence, case.hidden)
    assert np.isfinite(found).all(), f"{case.hidden} of pictures of {side} x {side} is not finite"
