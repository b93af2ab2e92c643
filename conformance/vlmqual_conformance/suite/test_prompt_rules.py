"""From prompt text and images to token ids: expansion of markers, batches, padding, chats, refusals."""

from __future__ import annotations

import json
import secrets
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite import idefics3_rules as rules
from vlmqual_conformance.suite.library_objects import (
    Idefics3Objects,
    array,
    idefics3_objects,
    image,
    plain,
)
from vlmqual_contract import fixtures
from vlmqual_contract.subject import Handle, Image, RemoteLibrary

TILE = 28
EDGE = 4 * TILE
TOKENS = 2
MARK = rules.MARK


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


@pytest.fixture
def processor(idefics3: Idefics3Objects) -> Handle:
    """A processor with tiles of 28 pixels and two tokens a frame."""
    return idefics3.new_processor(TILE, 4, TOKENS)


def ids_of(made: Handle) -> list[list[int]]:
    """Token ids of a call, as lists."""
    ids: list[list[int]] = plain(made.get("input_ids"))
    return ids


def goldens(kind: str) -> dict[str, Any]:
    """Prompt goldens whose key begins with `kind|`."""
    entries = json.loads(fixtures.file("goldens/idefics3/prompts.json").read_text("utf-8"))["entries"]
    return {key.partition("|")[2]: entry for key, entry in entries.items() if key.startswith(f"{kind}|")}


def all_images(entry: dict[str, Any]) -> bool:
    """Every row of a golden has images."""
    return all(row["images"] for row in entry["rows"])


def compare_tokens(idefics3: Idefics3Objects, entry: dict[str, Any]) -> None:
    """A batch gives the golden's ids and masks; its images are handed over in memory, as RGB."""
    folder = str(fixtures.checkpoint(entry["checkpoint"]))
    loaded = idefics3.call("Idefics3Processor.from_pretrained", folder)
    images = [[Image(fixtures.image(name), "RGB") for name in row["images"]] for row in entry["rows"]]
    made = loaded.call(
        "",
        text=[row["text"] for row in entry["rows"]],
        images=images if any(images) else None,
        padding=True,
        return_tensors="np",
        images_kwargs=entry["images_kwargs"],
    )
    assert ids_of(made) == entry["input_ids"]
    assert plain(made.get("attention_mask")) == entry["attention_mask"]


# expansion --------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-PROC-007", "IDEFICS3-PROC-008", "IDEFICS3-PROC-009")
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_marker_is_expanded_for_every_grid(
    idefics3: Idefics3Objects, processor: Handle, rows: int, columns: int
) -> None:
    made = processor.call(
        "", images=image(rows * TILE, columns * TILE), text=f"see {MARK}here", images_kwargs={"do_resize": False}
    )
    found = (0, 0) if (rows, columns) == (1, 1) else (rows, columns)
    wanted = rules.expanded(f"see {MARK}here", [found], TOKENS)
    assert idefics3.decoded(ids_of(made)[0]) == idefics3.bos() + wanted
    assert ids_of(made)[0] == idefics3.tokenize(wanted)


@requirement("IDEFICS3-PROC-007", "IDEFICS3-PROC-024")
def test_without_splitting_a_marker_is_the_global_block(idefics3: Idefics3Objects) -> None:
    processor = idefics3.new_processor(TILE, 4, TOKENS)
    processor.set("image_processor.do_image_splitting", False)
    made = processor.call("", images=image(60, 80), text=f"{MARK}What?", return_tensors="np")
    block = "<fake_token_around_image><global-img><image><image><fake_token_around_image>What?"
    assert idefics3.decoded(ids_of(made)[0]) == idefics3.bos() + block
    assert array(made, "pixel_values").shape == (1, 1, 3, TILE, TILE)


@requirement("IDEFICS3-PROC-008")
def test_tags_count_rows_and_columns_from_one_row_by_row(idefics3: Idefics3Objects, processor: Handle) -> None:
    text = idefics3.decoded(ids_of(processor.call("", images=image(60, 80), text=MARK))[0])
    tags = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3, 4)]
    places = [text.find(f"<fake_token_around_image>{tag}<image><image>") for tag in tags]
    assert -1 not in places
    assert places == sorted(places)
    assert text.count("<row_") == 12
    assert text.count("<image>") == 13 * TOKENS


@requirement("IDEFICS3-PROC-004", "IDEFICS3-CARD-005")
def test_a_frame_has_169_tokens_by_default(idefics3: Idefics3Objects) -> None:
    processor = idefics3.call("Idefics3Processor", idefics3.new_image_processor(), idefics3.processor.get("tokenizer"))
    assert processor.get("image_seq_len") == 169
    made = processor.call("", images=image(28, 28), text=f"{MARK}a", images_kwargs={"do_image_splitting": False})
    wanted = f"<fake_token_around_image><global-img>{'<image>' * 169}<fake_token_around_image>a"
    assert idefics3.decoded(ids_of(made)[0]) == idefics3.bos() + wanted


@requirement("IDEFICS3-PROC-006")
def test_the_number_of_tokens_can_be_given_for_one_call(idefics3: Idefics3Objects, processor: Handle) -> None:
    made = processor.call("", images=image(60, 80), text=MARK, image_seq_len=5)
    assert idefics3.decoded(ids_of(made)[0]).count("<image>") == 13 * 5


@requirement("IDEFICS3-CARD-011")
@pytest.mark.parametrize("tiles", [2, 3, 4])
def test_a_square_image_of_n_by_n_tiles_takes_n_squared_plus_one_times_169_tokens(
    idefics3: Idefics3Objects, tiles: int
) -> None:
    processor = idefics3.new_processor(TILE, tiles, 169)
    ids = ids_of(processor.call("", images=image(50, 50), text=f"{MARK}a"))[0]
    assert ids.count(plain(idefics3.processor.call("tokenizer.convert_tokens_to_ids", MARK))) == (tiles**2 + 1) * 169


@requirement("IDEFICS3-PROC-029", "IDEFICS3-CARD-014")
def test_several_images_are_expanded_in_order_at_their_places(idefics3: Idefics3Objects, processor: Handle) -> None:
    text = f"a{MARK}b{MARK}{MARK}c"
    images = [image(60, 80), image(28, 112), image(90, 20)]
    made = processor.call("", images=images, text=text)
    wanted = rules.expanded(text, [(3, 4), (1, 4), (4, 1)], TOKENS)
    assert idefics3.decoded(ids_of(made)[0]) == idefics3.bos() + wanted


@requirement("IDEFICS3-PROC-029", "IDEFICS3-PROC-012")
def test_batches_with_different_numbers_of_images_are_expanded(idefics3: Idefics3Objects, processor: Handle) -> None:
    texts = [f"{MARK}one", f"{MARK}and {MARK}, {MARK}", f"so {MARK} and {MARK}"]
    images = [[image(60, 80)], [image(28, 28), image(112, 50), image(40, 112)], [image(28, 112), image(30, 20)]]
    made = processor.call("", images=images, text=texts, padding=True, return_tensors="np")
    ids, mask = array(made, "input_ids"), array(made, "attention_mask")
    for row, text in enumerate(texts):
        grids = [rules.grid(item.source.shape[:2], TILE, EDGE) for item in images[row]]  # type: ignore[union-attr]  # image() gives arrays
        wanted = idefics3.tokenize(rules.expanded(text, grids, TOKENS))
        assert ids[row][mask[row] == 1].tolist() == wanted, f"row {row}"
    real = array(made, "pixel_attention_mask").any(axis=(2, 3)).sum(axis=1).tolist()
    counts = [(ids[row] == idefics3.model.get("config.image_token_id")).sum() // TOKENS for row in range(3)]
    assert real == counts, "frames and image tokens do not agree"


@requirement("IDEFICS3-PROC-008", "IDEFICS3-PROC-012", "IDEFICS3-PROC-029")
def test_ids_and_masks_of_300_random_images_follow_the_rules(idefics3: Idefics3Objects, processor: Handle) -> None:
    seed = secrets.randbits(32)
    generator = np.random.Generator(np.random.PCG64(seed))
    left = 300
    while left:
        counts = [min(left, int(generator.integers(1, 9)))]
        if left > counts[0]:
            counts.append(min(left - counts[0], int(generator.integers(1, 9))))
        left -= sum(counts)
        sizes = [generator.integers(5, 220, (count, 2)).tolist() for count in counts]
        texts = [" and ".join([MARK] * count) for count in counts]
        images = [[image(*size) for size in sample] for sample in sizes]
        made = processor.call("", images=images, text=texts, padding=True, return_tensors="np")
        ids, mask = array(made, "input_ids"), array(made, "attention_mask")
        real = np.asarray(array(made, "pixel_attention_mask").all(axis=(2, 3)))
        for row, sample in enumerate(sizes):
            where = f"images {sample} (height, width) of seed {seed}"
            grids = [rules.grid((height, width), TILE, EDGE) for height, width in sample]
            wanted = idefics3.tokenize(rules.expanded(texts[row], grids, TOKENS))
            assert ids[row][mask[row] == 1].tolist() == wanted, where
            frames = sum(rows * columns + 1 for rows, columns in grids)
            assert real[row].tolist() == [True] * frames + [False] * (real.shape[1] - frames), where


@requirement("IDEFICS3-PROC-007", "IDEFICS3-PROC-008", "IDEFICS3-PROC-011", "IDEFICS3-PROC-023", "IDEFICS3-PROC-029")
@pytest.mark.parametrize("name", [name for name, entry in goldens("tokens").items() if all_images(entry)])
def test_token_ids_are_those_of_the_golden(idefics3: Idefics3Objects, name: str) -> None:
    compare_tokens(idefics3, goldens("tokens")[name])


@requirement("IDEFICS3-PROC-013", "IDEFICS3-CARD-014")
@pytest.mark.parametrize("name", [name for name, entry in goldens("tokens").items() if not all_images(entry)])
def test_token_ids_of_prompts_without_images_are_those_of_the_golden(idefics3: Idefics3Objects, name: str) -> None:
    compare_tokens(idefics3, goldens("tokens")[name])
