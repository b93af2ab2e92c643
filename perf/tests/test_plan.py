"""What a request's tensors say of its size."""

from __future__ import annotations

import numpy as np

from vlmqual_contract.scenario import Scenario
from vlmqual_perf.plan import shape_of


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
