"""Levels images and prompts: the target's own preprocessing, from prompts and image files to tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmqual_conformance.goldens import entries
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.subjects import TINY, demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_conformance.suite.mllama_images import FAMILY, MASK
from vlmqual_contract import fixtures
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import MARKERS, Capability, Info, Prompt

CHECKPOINT = TINY[FAMILY]
TENSORS = {"pixel_values": np.float32, "aspect_ratio_ids": np.int64, "aspect_ratio_mask": np.int64}
PIXELS: tuple[str, ...] = ("MLLAMA-FILE-003", "MLLAMA-FILE-005")
OTHER_MODES = ("cmyk", "gray", "gray16", "la", "palette", "palette-transparent", "rgba")


def images() -> list[Any]:
    """Every fixture image with the requirements that it is about."""
    found = []
    for key, entry in entries(FAMILY, "pixels").items():
        name, checkpoint, way = key.split("|")
        if (checkpoint, way) != (CHECKPOINT, "path"):
            continue
        stem = Path(name).stem.removeprefix("edge-")
        ids = PIXELS
        if stem.startswith("exif"):
            ids = ("MLLAMA-FILE-001", *PIXELS)
        elif stem in OTHER_MODES:
            ids = ("MLLAMA-FILE-002", *PIXELS)
        elif {"1", "3"} & set(stem.split("x")):
            ids = ("MLLAMA-FILE-004", *PIXELS)
        found.append(pytest.param(name, entry, id=name, marks=requirement(*ids)))
    return found


@pytest.mark.parametrize(("name", "entry"), images())
def test_tiles_of_an_image_file_are_the_references(session: RemoteSession, name: str, entry: dict[str, Any]) -> None:
    prompt = f"{MARKERS[FAMILY]}What is it?"
    made = session.preprocess([Prompt(prompt, (str(fixtures.image(name)),))])
    checks.same_pixels(made, name, entry, TENSORS)
    marker = int(runs.settings(FAMILY)["image_token_index"])
    count = int((checks.tensor_of(made, "input_ids") == marker).sum())
    assert count == 1, f"{name} takes {count} image tokens, not 1"


@requirement("MLLAMA-FILE-011")
@pytest.mark.parametrize(("size", "arrangement"), [((2000, 2), 4), ((2, 2000), 8)], ids=["2000x2", "2x2000"])
def test_a_long_thin_image_keeps_one_pixel_of_its_short_side(
    session: RemoteSession, tmp_path: Path, size: tuple[int, int], arrangement: int
) -> None:
    file = tmp_path / "white.png"
    Image.new("RGB", size, "white").save(file)
    made = session.preprocess([Prompt(f"{MARKERS[FAMILY]}What is it?", (str(file),))])
    ids = checks.tensor_of(made, "aspect_ratio_ids")
    assert ids.tolist() == [[arrangement]], f"{size[0]} x {size[1]} pixels have the arrangement {ids.tolist()}"
    pixels = checks.tensor_of(made, "pixel_values")
    side = int(runs.settings(FAMILY)["vision_config"]["image_size"])
    wanted = np.full((1, 1, 4, 3, side, side), -1, np.float32)  # black, as padding is
    if size[0] > size[1]:
        wanted[..., 0, :] = 1
    else:
        wanted[..., 0] = 1
    assert pixels.shape == wanted.shape, f"pixel_values has shape {pixels.shape}, not {wanted.shape}"
    wrong = int((pixels != wanted).sum())
    assert wrong == 0, f"{wrong} of {wanted.size} pixel values are not those of one white line on black"


@requirement("MLLAMA-FILE-010")
def test_images_of_rows_stand_in_their_order_and_padding_images_behind_them(session: RemoteSession, info: Info) -> None:
    demand(info, {Capability.BATCH, Capability.PADDING})
    rows = (("coffee.png", "edge-224x112.png"), ("edge-113x111.png",))
    made = session.preprocess([prompt_about(*names) for names in rows])
    for row, names in enumerate(rows):
        for slot, name in enumerate(names):
            alone = session.preprocess([prompt_about(name)])
            for tensor in TENSORS:
                found, wanted = checks.tensor_of(made, tensor)[row, slot], checks.tensor_of(alone, tensor)[0, 0]
                assert np.array_equal(found, wanted), f"{tensor} of {name} is not in slot {slot} of row {row}"
    pixels, ids, mask = (checks.tensor_of(made, tensor)[1, 1] for tensor in TENSORS)
    assert not pixels.any(), "the pixels of a padding image are not 0"
    assert int(ids) == 0, f"a padding image has the aspect_ratio_id {int(ids)}"
    assert mask.tolist() == [1, 0, 0, 0], f"aspect_ratio_mask of a padding image is {mask.tolist()}"


def prompt_about(*names: str) -> Prompt:
    """A prompt with images."""
    return Prompt(MARKERS[FAMILY] * len(names) + "What is it?", tuple(str(fixtures.image(name)) for name in names))


def prompts() -> list[Any]:
    """Every golden batch of the tiny checkpoint with its requirements."""
    found = []
    for key, entry in entries(FAMILY, "prompts").items():
        kind, _, name = key.partition("|")
        if kind != "tokens" or entry["checkpoint"] != CHECKPOINT:
            continue
        rows = entry["rows"]
        counts = {len(row["images"]) for row in rows}
        ids = ["MLLAMA-FILE-006"]
        if counts != {0}:
            ids.append("MLLAMA-FILE-008")
        if 0 in counts:
            ids.insert(0, "MLLAMA-FILE-009")
        if len(rows) > 1:
            ids.insert(0, "MLLAMA-FILE-007")
        if len(counts) > 1:
            ids.insert(0, "MLLAMA-FILE-010")
        found.append(pytest.param(entry, id=name, marks=requirement(*ids)))
    return found


@pytest.mark.parametrize("entry", prompts())
def test_ids_and_masks_of_prompts_are_the_references(session: RemoteSession, info: Info, entry: dict[str, Any]) -> None:
    demand(info, checks.batch_needs(entry))
    made = session.preprocess(checks.prompts_of(entry))
    with_images = any(row["images"] for row in entry["rows"])
    tensors = ["attention_mask", "input_ids"]
    if with_images:
        tensors.append(MASK)
    checks.same_ids(made, entry, tensors)
    if not with_images:
        spare = sorted({"pixel_values", MASK} & set(made))
        assert not spare, f"a batch of text alone has {', '.join(spare)}"
