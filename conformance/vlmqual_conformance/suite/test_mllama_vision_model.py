"""Inputs and outputs of MllamaVisionModel."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import arguments, array, error_of
from vlmqual_conformance.suite.mllama_objects import (
    GLOBAL,
    LOCAL,
    PADDED,
    POSITIONS,
    RATIOS,
    TILES,
    VISION_HEADS,
    VISION_OUTPUT,
    VISION_WIDTH,
    MllamaObjects,
    apart,
    close,
    mllama_objects,
    pixels,
    shapes,
)
from vlmqual_contract.subject import RemoteLibrary
from vlmqual_contract.target import Array


@pytest.fixture
def mllama(library: RemoteLibrary) -> MllamaObjects:
    """Objects of the library under test."""
    return mllama_objects(library)


def features(mllama: MllamaObjects, **inputs: Array) -> Array:
    """last_hidden_state."""
    return array(mllama.vision.call("", **arguments(**inputs)), "last_hidden_state")


@requirement("MLLAMA-VIS-003", "MLLAMA-VIS-004", "MLLAMA-VIS-005")
@pytest.mark.parametrize("ratios", [(1,), (2, 6), (8, 0, 3)])
def test_the_output_has_a_place_for_every_tile_and_patch(mllama: MllamaObjects, ratios: tuple[int, ...]) -> None:
    found = features(mllama, **pixels(*ratios))
    assert found.shape == (1, len(ratios), TILES, POSITIONS, VISION_OUTPUT)
    assert VISION_OUTPUT == VISION_WIDTH * (1 + 3), "the final state and three intermediate ones"


@requirement("MLLAMA-VIS-005")
@pytest.mark.parametrize("marked", [0, 1, 2])
@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 3]], ids=["the layers", "the last layer and the end"])
def test_an_intermediate_index_selects_the_state_that_enters_the_layer(
    mllama: MllamaObjects, marked: int, indices: list[int]
) -> None:
    width = 16 * (1 + len(indices))
    config = mllama.new_config(vision_config={"intermediate_layers_indices": indices, "vision_output_dim": width})
    model = mllama.call("MllamaVisionModel", config.get("vision_config"))
    model.call("eval")
    for silent in ("*.o_proj.weight", "*.fc2.weight", "*.fc2.bias"):
        mllama.refill(model, silent, 0.0)  # every layer passes its state on as it is
    inputs = arguments(**pixels(6, side=28))
    before = array(model.call("", **inputs), "last_hidden_state")
    mllama.refill(model, f"transformer.layers.{marked}.mlp.fc2.bias", 1.0)
    after = array(model.call("", **inputs), "last_hidden_state")
    assert after.shape == (1, 1, TILES, 5, width)
    added = (after - before)[..., 16:].reshape(1, 1, TILES, 5, 16, len(indices))
    wanted = [float(index > marked) for index in indices]
    np.testing.assert_allclose(
        added,
        np.broadcast_to(wanted, added.shape),
        atol=1e-5,
        err_msg=f"layer {marked} adds 1 to every channel; states kept for {indices}, channel by channel",
    )


@requirement("MLLAMA-VIS-006")
def test_another_arrangement_of_the_same_tiles_gives_another_output(mllama: MllamaObjects) -> None:
    wide = pixels(2)
    tall = {**wide, "aspect_ratio_ids": np.array([[5]], np.int64)}
    assert apart(features(mllama, **tall), features(mllama, **wide))


@requirement("MLLAMA-VIS-007")
def test_a_padding_image_has_a_row_in_the_tables(mllama: MllamaObjects) -> None:
    assert np.isfinite(features(mllama, **pixels(0))).all()
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        assert mllama.vision.get(f"{name}.embedding.weight").shape[0] == RATIOS + 1
    assert mllama.vision.get("gated_positional_embedding.tile_embedding.weight").shape[0] == RATIOS + 1


@requirement("MLLAMA-VIS-008")
def test_real_tiles_attend_to_masked_tiles(mllama: MllamaObjects) -> None:
    plain, noisy = pixels(2), pixels(2)
    noisy["pixel_values"][0, 0, 3] = np.random.Generator(np.random.PCG64(8)).uniform(-1, 1, (3, 56, 56))
    one, other = features(mllama, **plain), features(mllama, **noisy)
    assert apart(other[0, 0, :2], one[0, 0, :2]), "content of a masked tile changes nothing in the real ones"


@requirement("MLLAMA-VIS-009")
def test_states_of_both_transformers_are_returned(mllama: MllamaObjects) -> None:
    made = mllama.vision.call("", output_hidden_states=True, **arguments(**pixels(2, 6)))
    states = made.get("hidden_states")
    assert states is not None, "output_hidden_states=True gives none"
    assert set(shapes(states)) == {(2, TILES * PADDED, VISION_WIDTH)}
    assert len(states) == LOCAL + 1 + GLOBAL + 1, "what enters each layer and what leaves the last, for both"
    final = states[-1].reshape(2, TILES, PADDED, VISION_WIDTH)[:, :, :POSITIONS]
    close(array(made, "last_hidden_state")[0, ..., :VISION_WIDTH], final, "the final state comes first in the output")
    for place, index in enumerate((1, 2, 4)):
        entering = states[index].reshape(2, TILES, PADDED, VISION_WIDTH)[:, :, :POSITIONS]
        kept = array(made, "last_hidden_state")[0, ..., VISION_WIDTH + place :: 3]
        close(kept, entering, f"intermediate index {index} selects the state that enters that layer")


@requirement("MLLAMA-VIS-009", "MLLAMA-VIS-013")
def test_attention_weights_of_both_transformers_are_returned(mllama: MllamaObjects) -> None:
    made = mllama.vision.call("", output_attentions=True, **arguments(**pixels(2, 6)))
    weights = made.get("attentions")
    assert weights is not None, "output_attentions=True gives none"
    length = TILES * PADDED
    assert shapes(weights) == [(2, VISION_HEADS, length, length)] * (LOCAL + GLOBAL)
    bad = np.zeros((TILES, PADDED), bool)
    bad[2:] = True
    bad[:, POSITIONS:] = True
    first = weights[0][0][:, bad.reshape(-1)][:, :, bad.reshape(-1)]
    assert not first.any(), "padding attends to padding"
    assert weights[0][0][:, ~bad.reshape(-1)][:, :, bad.reshape(-1)].min() > 0, "real positions attend to padding"


@requirement("MLLAMA-VIS-010")
def test_a_tuple_when_asked_for(mllama: MllamaObjects) -> None:
    plain = mllama.vision.call("", return_dict=False, **arguments(**pixels(2)))
    close(np.asarray(plain[0]), features(mllama, **pixels(2)))


@requirement("MLLAMA-VIS-011")
@pytest.mark.parametrize("name", ["aspect_ratio_ids", "aspect_ratio_mask"])
def test_aspect_ratios_are_required(mllama: MllamaObjects, name: str) -> None:
    inputs = {key: value for key, value in pixels(2).items() if key != name}
    assert error_of(lambda: features(mllama, **inputs)), f"{name} may be left out"
