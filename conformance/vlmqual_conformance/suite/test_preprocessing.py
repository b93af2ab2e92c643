"""Levels images and prompts: the target's own preprocessing, from prompts and image files to tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.goldens import entries
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.subjects import TINY, TargetKeeper, demand, options_for, tiny
from vlmqual_conformance.suite import checks, runs
from vlmqual_contract import fixtures
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info, Prompt

FAMILY = "idefics3"
CHECKPOINT = TINY[FAMILY]
PIXELS = "IDEFICS3-FILE-003"
ROTATED = ("IDEFICS3-FILE-001", PIXELS)
OTHER_MODE = ("IDEFICS3-FILE-002", PIXELS)
THIN = ("IDEFICS3-FILE-004", PIXELS)
OTHER_MODES = ("cmyk", "gray", "gray16", "la", "palette", "palette-transparent", "rgba")


def images() -> list[Any]:
    """Every fixture image with the requirements that it is about."""
    found = []
    for key, entry in entries(FAMILY, "pixels").items():
        name, checkpoint, way = key.split("|")
        if (checkpoint, way) != (CHECKPOINT, "path"):
            continue
        stem = Path(name).stem.removeprefix("edge-")
        ids: tuple[str, ...] = (PIXELS,)
        if stem.startswith("exif"):
            ids = ROTATED
        elif stem in OTHER_MODES:
            ids = OTHER_MODE
        elif {"1", "3"} & set(stem.split("x")):
            ids = THIN
        found.append(pytest.param(name, entry, id=name, marks=requirement(*ids)))
    return found


@pytest.mark.parametrize(("name", "entry"), images())
def test_pixels_of_an_image_file_are_the_references(session: RemoteSession, name: str, entry: dict[str, Any]) -> None:
    made = session.preprocess([Prompt("<image>What is it?", (str(fixtures.image(name)),))])
    checks.same_pixels(made, name, entry, {"pixel_values": np.float32, "pixel_attention_mask": np.int64})
    image = int(runs.settings(FAMILY)["image_token_id"])
    count = int((checks.tensor_of(made, "input_ids") == image).sum())
    assert count == entry["image_tokens"], f"{name} takes {count} image tokens, not {entry['image_tokens']}"


@requirement(PIXELS)
def test_frames_of_several_images_stand_in_the_order_of_the_images(session: RemoteSession) -> None:
    names = ("coffee.png", "edge-112x112.png", "edge-224x112.png")
    paths = [str(fixtures.image(name)) for name in names]
    made = session.preprocess([Prompt("<image><image><image>What is it?", tuple(paths))])
    alone = [session.preprocess([Prompt("<image>What is it?", (path,))]) for path in paths]
    for tensor in ("pixel_values", "pixel_attention_mask"):
        wanted = np.concatenate([checks.tensor_of(each, tensor) for each in alone], axis=1)
        found = checks.tensor_of(made, tensor)
        assert found.shape == wanted.shape, f"{tensor} has shape {found.shape}, not {wanted.shape}"
        assert np.array_equal(found, wanted), f"{tensor} of {', '.join(names)} is in another order than the images"


def prompts() -> list[Any]:
    """Every golden batch of the tiny checkpoint, those without splitting last, with their requirements."""
    found = []
    for key, entry in entries(FAMILY, "prompts").items():
        kind, _, name = key.partition("|")
        if kind != "tokens" or entry["checkpoint"] != CHECKPOINT:
            continue
        options = entry["images_kwargs"]
        assert set(options) <= {"do_image_splitting"}, f"the prompt golden {name} has options that no target can take"
        rows = entry["rows"]
        ids = ["IDEFICS3-FILE-005"]
        if not all(row["images"] for row in rows):
            ids.insert(0, "IDEFICS3-FILE-007")
        if len(rows) > 1:
            ids.insert(0, "IDEFICS3-FILE-006")
        found.append((bool(options), pytest.param(entry, id=name, marks=requirement(*ids))))
    return [param for _, param in sorted(found, key=lambda item: item[0])]


@pytest.mark.parametrize("entry", prompts())
def test_ids_of_prompts_with_images_are_the_references(
    keeper: TargetKeeper, info: Info, checkpoint_copies: Path, entry: dict[str, Any]
) -> None:
    demand(info, checks.batch_needs(entry))
    model = tiny(FAMILY)
    if entry["images_kwargs"]:
        options = entry["images_kwargs"]
        model = checks.with_settings(model, checkpoint_copies / "whole", "preprocessor_config.json", options)
    session = keeper.session(model, options_for(info))
    made = session.preprocess(checks.prompts_of(entry))
    checks.same_ids(made, entry, ("attention_mask", "input_ids"))
