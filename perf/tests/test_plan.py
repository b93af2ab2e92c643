"""What a request's tensors say of its size, and in which order cells are run."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np

from vlmqual_contract.scenario import Scenario
from vlmqual_perf.plan import PHASES, cells, seed_of, shape_of


def scenario(family: str, images: int) -> Scenario:
    return Scenario("one", family, "none", "", images=("a.png",) * images, new_tokens=7)


def test_places_for_tiles_that_an_image_does_not_fill_are_counted_as_padding() -> None:
    ids = np.array([[9, 600, 1, 2, 600, 3], [0, 0, 9, 600, 1, 2]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).astype(np.int64),
        "pixel_values": np.zeros((2, 2, 4, 3, 56, 56), np.float32),  # a black image has tiles too
        "aspect_ratio_ids": np.array([[2, 6], [1, 0]]),
        "aspect_ratio_mask": np.array([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 0, 0, 0]]]),
    }
    config = {"image_token_index": 600, "vision_config": {"image_size": 56, "patch_size": 14}}
    assert shape_of(scenario("mllama", 2), inputs, config) == {
        "images": 2,
        "tiles": 6,
        "padded_tiles": 2,
        "image_tokens": 8 * 17,  # cross-attention reads every place, 16 patches and the class embedding each
        "prompt_tokens": 6,
        "padded_tokens": 2,
        "new_tokens": 7,
    }


def test_frames_of_padding_are_not_computed_and_image_tokens_stand_in_the_prompt() -> None:
    pixels = np.zeros((1, 3, 3, 4, 4), np.float32)
    pixels[:, :2] = 0.5
    ids = np.array([[1, 5, 5, 5, 5, 2]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}
    found = shape_of(scenario("idefics3", 1), inputs, {"image_token_id": 5})
    assert (found["tiles"], found["padded_tiles"], found["image_tokens"]) == (2, 0, 4)


def test_text_alone_has_no_image_tokens() -> None:
    ids = np.array([[1, 5, 2]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = shape_of(scenario("mllama", 0), inputs, {"vision_config": {"image_size": 56, "patch_size": 14}})
    assert (found["images"], found["tiles"], found["image_tokens"], found["prompt_tokens"]) == (0, 0, 0, 3)


def idefics(slots: int, seen: list[list[int]], size: int = 56) -> dict[str, np.ndarray]:
    """Inputs of rows whose last tokens see these numbers of images."""
    mask = np.zeros((len(seen), 5, slots), np.int64)
    for row, images in enumerate(seen):
        for image in images:
            mask[row, 2:, image] = 1
    ids = np.ones((len(seen), 5), np.int64)
    pixels = np.zeros((len(seen), slots, 3, size, size), np.float32)
    return {"input_ids": ids, "attention_mask": ids, "pixel_values": pixels, "image_attention_mask": mask}


IDEFICS = {"use_resampler": False, "vision_config": {"image_size": 56, "patch_size": 14}}


def test_every_slot_of_an_idefics_row_is_computed_and_read_and_slots_that_nothing_sees_are_padding() -> None:
    found = shape_of(scenario("idefics", 2), idefics(3, [[0, 1], [0, 1, 2]]), IDEFICS)
    assert (found["tiles"], found["padded_tiles"], found["image_tokens"]) == (3, 0, 3 * 17)
    text = shape_of(scenario("idefics", 0), idefics(1, [[]]), IDEFICS)
    assert (text["images"], text["tiles"], text["padded_tiles"], text["image_tokens"]) == (0, 0, 1, 17)


def test_features_of_an_idefics_image_are_those_of_its_size_or_the_latents_of_the_resampler() -> None:
    larger = shape_of(scenario("idefics", 1), idefics(1, [[0]], size=84), IDEFICS)
    assert larger["image_tokens"] == 36 + 1
    resampler = {**IDEFICS, "use_resampler": True, "perceiver_config": {"resampler_n_latents": 5}}
    assert shape_of(scenario("idefics", 1), idefics(1, [[0]]), resampler)["image_tokens"] == 5


# order ---------------------------------------------------------------------------------------------------------------

MANY = [
    Scenario(f"{checkpoint}-{number}", "idefics3", checkpoint, "", images=("a.png",))
    for checkpoint in "abc"
    for number in range(4)
]


def test_a_seed_decides_the_order_and_never_which_cells_there_are() -> None:
    listed = cells(MANY, PHASES, [1, 2])
    orders = [[cell.case for cell in cells(MANY, PHASES, [1, 2], seed=seed)] for seed in range(5)]
    assert all(sorted(order) == sorted(cell.case for cell in listed) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    again = [cell.case for cell in cells(MANY, PHASES, [1, 2], seed=3)]
    assert again == orders[3], "a run that goes on has to keep its order"


def test_sizes_stay_in_order_checkpoints_together_and_what_happens_once_in_front() -> None:
    for seed in range(5):
        found = cells(MANY, PHASES, [2, 1], seed=seed, fixed_shapes=True)
        assert [cell.tp for cell in found] == [2] * (len(found) // 2) + [1] * (len(found) // 2)
        blocks = [[*group] for _, group in groupby(found, lambda cell: (cell.tp, cell.scenario.checkpoint))]
        assert len(blocks) == 2 * 3, "a checkpoint is loaded once for each size"
        for block in blocks:
            assert [cell.phase for cell in block[:2]] == ["load", "first-call"]
            assert block[0].scenario.id.endswith("-0"), "loading belongs to the first scenario as listed"
            scenarios = [[*group] for _, group in groupby(block[2:], lambda cell: cell.scenario.id)]
            assert len(scenarios) == 4
            assert all(cell.phase == "compile" for cell in (group[0] for group in scenarios))


def test_phases_and_scenarios_and_checkpoints_are_all_shuffled() -> None:
    firsts = [cells(MANY, PHASES, [1], seed=seed) for seed in range(8)]
    assert len({found[0].scenario.checkpoint for found in firsts}) > 1
    assert len({found[2].scenario.id[-1] for found in firsts}) > 1
    assert len({found[2].phase for found in firsts}) > 1


def test_without_a_seed_the_order_is_the_lists_and_the_datas() -> None:
    found = cells(MANY[:2], PHASES, [1])
    assert [cell.case for cell in found if cell.scenario is MANY[1]] == [
        f"a-1/{phase}/tp1" for phase in ("preprocess", "vision", "prefill", "decode", "ttft")
    ]


def test_an_own_checkpoint_is_loaded_once_for_all_scenarios(tmp_path: Path) -> None:
    found = cells(MANY, ["load", "prefill"], [1], checkpoint=tmp_path, seed=1)
    assert [cell.phase for cell in found].count("load") == 1


def test_the_same_facts_have_the_same_seed_and_others_another() -> None:
    assert seed_of("eager", ["a"], [1, 2]) == seed_of("eager", ["a"], [1, 2])
    assert seed_of("eager", ["a"], [1, 2]) != seed_of("eager", ["a"], [1, 4])
