"""Levels images and prompts: the target's own preprocessing, from prompts and image files to tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmqual_conformance.goldens import entries
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.subjects import TINY, TargetKeeper, demand, options_for
from vlmqual_conformance.suite import checks
from vlmqual_conformance.suite.idefics_files import with_image_settings, with_processor
from vlmqual_conformance.suite.idefics_images import FAMILY, MASK, marker, settings
from vlmqual_conformance.suite.idefics_rules import square, visible
from vlmqual_contract import fixtures
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import MARKERS, Array, Capability, Info, Inputs, Prompt

CHECKPOINT, RELEASED = TINY[FAMILY], "idefics-9b-processor"
PIXELS: tuple[str, ...] = ("IDEFICS-FILE-003",)
OTHER_MODES = ("cmyk", "gray", "gray16", "la", "palette", "palette-transparent", "rgba")
SIGN = MARKERS[FAMILY]
QUESTION = f"User:{SIGN}What is it?"


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
            ids = ("IDEFICS-FILE-001", *PIXELS)
        elif stem in OTHER_MODES:
            ids = ("IDEFICS-FILE-002", *PIXELS)
        elif {"1", "3"} & set(stem.split("x")):
            ids = ("IDEFICS-FILE-004", *PIXELS)
        found.append(pytest.param(name, entry, id=name, marks=requirement(*ids)))
    return found


def pixels_of(made: Inputs, name: str, side: int) -> Array:
    """pixel_values of the only image of the only row, (1, 1, 3, side, side)."""
    pixels = checks.tensor_of(made, "pixel_values")
    wanted = (1, 1, 3, side, side)
    assert pixels.shape == wanted, f"pixel_values of {name} has shape {pixels.shape}, not {wanted}"
    return pixels


@pytest.mark.parametrize(("name", "entry"), images())
def test_pixels_of_an_image_file_are_the_references(session: RemoteSession, name: str, entry: dict[str, Any]) -> None:
    config = settings()
    made = session.preprocess([Prompt(QUESTION, (str(fixtures.image(name)),))])
    # The reference's image processor was asked for images without rows, the target for a row.
    pixels = pixels_of(made, name, config["vision_config"]["image_size"]).reshape(entry["pixel_values"]["shape"])
    checks.same_pixels({"pixel_values": pixels}, name, entry, {"pixel_values": np.float32})
    count = int((checks.tensor_of(made, "input_ids") == marker(config)).sum())
    assert count == 1, f"{name} takes {count} image tokens, not 1"


@requirement("IDEFICS-FILE-003")
@pytest.mark.parametrize("size", [(200, 40), (40, 200), (57, 55)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_an_image_becomes_a_square_whatever_its_shape(
    session: RemoteSession, tmp_path: Path, size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(23).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture, file = Image.fromarray(noise), tmp_path / "noise.png"
    picture.save(file)
    side = int(settings()["vision_config"]["image_size"])
    made = session.preprocess([Prompt(QUESTION, (str(file),))])
    pixels = pixels_of(made, file.name, side)
    away = np.abs(pixels[0, 0] - square(picture, side)).max()
    assert away < 1e-5, f"pixel values of a picture of {size[0]} x {size[1]} are off by up to {away:.3g}"


# prompts --------------------------------------------------------------------------------------------------------------


def prompts(*checkpoints: str) -> list[Any]:
    """Every golden batch of these checkpoints with its requirements."""
    found = []
    for key, entry in entries(FAMILY, "prompts").items():
        kind, _, name = key.partition("|")
        if kind != "tokens" or entry["checkpoint"] not in checkpoints:
            continue
        rows = entry["rows"]
        counts = {len(row["images"]) for row in rows}
        ids = ["IDEFICS-FILE-005"]
        if counts != {0}:
            ids.append("IDEFICS-FILE-007")
        if 0 in counts:
            ids.insert(0, "IDEFICS-FILE-008")
        if len(rows) > 1:
            ids.insert(0, "IDEFICS-FILE-006")
        if len(counts) > 1:
            ids.insert(0, "IDEFICS-FILE-009")
        found.append(pytest.param(entry, id=name, marks=requirement(*ids)))
    return found


def same_tensors(made: Inputs, entry: dict[str, Any]) -> None:
    """Ids and masks, and how many slots there are, of a golden batch."""
    mask = checks.tensor_of(made, MASK)
    assert mask.dtype in (np.int64, np.bool_), f"{MASK} is {mask.dtype}, neither int64 nor bool"
    wide = {**made, MASK: mask.astype(np.int64)}  # the reference's is bool where the batch has no image
    checks.same_ids(wide, entry, ["attention_mask", "input_ids", MASK])
    pixels = checks.tensor_of(made, "pixel_values")
    slots = mask.shape[2]
    assert pixels.ndim == 5, f"pixel_values has shape {pixels.shape}, not (rows, slots, 3, height, width)"
    assert pixels.shape[:2] == (len(entry["rows"]), slots), (
        f"pixel_values has shape {pixels.shape}, the mask {slots} image slots"
    )
    for index, row in enumerate(entry["rows"]):
        real = len(row["images"])
        assert not pixels[index, real:].any(), f"slots of row {index} behind its {real} images are not empty"
        assert pixels[index, :real].any(axis=(1, 2, 3)).all(), f"an image of row {index} is not in its slot"


@pytest.mark.parametrize("entry", prompts(CHECKPOINT))
def test_ids_and_masks_of_prompts_are_the_references(session: RemoteSession, info: Info, entry: dict[str, Any]) -> None:
    demand(info, checks.batch_needs(entry))
    same_tensors(session.preprocess(checks.prompts_of(entry)), entry)


@requirement("IDEFICS-FILE-009")
def test_images_of_rows_stand_in_their_order(session: RemoteSession, info: Info) -> None:
    demand(info, {Capability.BATCH, Capability.PADDING})
    rows = (("coffee.png", "text.png"), ("edge-224x112.png",))
    batch = [
        Prompt(f"User:{SIGN * len(names)}Well?", tuple(str(fixtures.image(name)) for name in names)) for names in rows
    ]
    pixels = checks.tensor_of(session.preprocess(batch), "pixel_values")
    for row, names in enumerate(rows):
        for slot, name in enumerate(names):
            alone = session.preprocess([Prompt(QUESTION, (str(fixtures.image(name)),))])
            wanted = checks.tensor_of(alone, "pixel_values")[0, 0]
            assert np.array_equal(pixels[row, slot], wanted), f"{name} is not in slot {slot} of row {row}"


@requirement("IDEFICS-FILE-005")
def test_blanks_at_the_ends_of_texts_are_lost_and_other_white_space_is_not(session: RemoteSession) -> None:
    texts = (f"one {SIGN} two", f"  one  {SIGN}  two   ", f"one{SIGN}two", f"one\n{SIGN}\ntwo\n")
    prompts = [Prompt(text, (str(fixtures.image("coffee.png")),)) for text in texts]
    first, *same, other = (checks.tensor_of(session.preprocess([prompt]), "input_ids").tolist() for prompt in prompts)
    for text, found in zip(texts[1:], same, strict=False):
        assert found == first, f"the ids of {text!r} are {found}, those of {texts[0]!r} {first}"
    assert other != first, f"line breaks are lost: the ids of {texts[-1]!r} are {other}"


@requirement("IDEFICS-FILE-007")
@pytest.mark.parametrize(
    "text",
    [f"a{SIGN}one</s>two{SIGN}three", f"one</s>{SIGN}{SIGN}two", f"a{SIGN}</s></s>{SIGN}", f"</s>one{SIGN}two"],
    ids=["between", "before-two", "twice", "first"],
)
def test_a_token_sees_the_last_image_before_it_unless_a_text_has_ended(session: RemoteSession, text: str) -> None:
    config = settings()
    names = ("coffee.png", "text.png")[: text.count(SIGN)]
    made = session.preprocess([Prompt(text, tuple(str(fixtures.image(name)) for name in names))])
    ids = checks.tensor_of(made, "input_ids")[0].tolist()
    assert ids.count(config["eos_token_id"]) == text.count("</s>"), f"the ids of {text!r} are {ids}"
    wanted = visible(ids, marker(config), config["eos_token_id"], len(names))
    found = checks.tensor_of(made, MASK)[0].astype(np.int64)
    assert np.array_equal(found, wanted), f"{MASK} of {text!r} is {found.tolist()}, not {wanted.tolist()}"


# other files of a processor -------------------------------------------------------------------------------------------


@pytest.fixture
def released(keeper: TargetKeeper, info: Info, tmp_path: Path) -> RemoteSession:
    """The tiny weights with the files of the released processor."""
    return keeper.session(with_processor(tmp_path / "released", RELEASED), options_for(info))


@requirement("IDEFICS-FILE-010")
@pytest.mark.parametrize("name", ["coffee.png", "edge-224x112.png"])
def test_the_size_of_the_square_is_the_one_that_the_files_name(released: RemoteSession, name: str) -> None:
    entry = entries(FAMILY, "pixels")[f"{name}|{RELEASED}|path"]
    made = released.preprocess([Prompt(QUESTION, (str(fixtures.image(name)),))])
    side = int(settings(RELEASED)["vision_config"]["image_size"])
    pixels = pixels_of(made, name, side).reshape(entry["pixel_values"]["shape"])
    checks.same_pixels({"pixel_values": pixels}, name, entry, {"pixel_values": np.float32})


@requirement("IDEFICS-FILE-010")
def test_mean_and_std_are_those_that_the_files_name(keeper: TargetKeeper, info: Info, tmp_path: Path) -> None:
    mean, std = [0.25, 0.5, 0.75], [0.5, 0.25, 1.0]
    model = with_image_settings(tmp_path / "other", {"image_mean": mean, "image_std": std})
    session, name = keeper.session(model, options_for(info)), "coffee.png"
    side = int(settings()["vision_config"]["image_size"])
    with Image.open(fixtures.image(name)) as picture:
        wanted = square(picture.convert("RGB"), side, mean, std)
    found = pixels_of(session.preprocess([Prompt(QUESTION, (str(fixtures.image(name)),))]), name, side)
    away = np.abs(found[0, 0] - wanted).max()
    assert away < 1e-5, f"pixel values of {name} are off by up to {away:.3g}"


@pytest.mark.parametrize("entry", prompts(RELEASED))
def test_ids_and_masks_with_the_released_tokenizer_are_the_references(
    released: RemoteSession, info: Info, entry: dict[str, Any]
) -> None:
    demand(info, checks.batch_needs(entry))
    same_tensors(released.preprocess(checks.prompts_of(entry)), entry)
