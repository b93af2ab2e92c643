"""Inputs and outputs of Idefics3's models: positions, masks, caches, image features, documented results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import (
    FRAME_TOKENS,
    HEAD_DIM,
    HEADS,
    IMAGE_ID,
    KEY_VALUE_HEADS,
    LAYERS,
    SIDE,
    VOCABULARY,
    WIDTH,
    Idefics3Objects,
    arguments,
    array,
    as_frames,
    error_of,
    frames,
    idefics3_objects,
    prompt,
)
from vlmqual_contract.errors import TargetRaised
from vlmqual_contract.subject import Handle, RemoteLibrary, Tensor, Tuple
from vlmqual_contract.target import Array

TEXT = np.array([[576, 40, 41, 42, 43, 44, 45, 46]], np.int64)


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


def close(found: Array, wanted: Array, message: str = "") -> None:
    """Equal up to what another order of float32 sums may change."""
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5, err_msg=message)


def apart(found: Array, other: Array) -> bool:
    """Different by far more than rounding."""
    return bool(np.abs(found - other).max() > 1e-2 * np.abs(other).max())


def run(model: Handle, **inputs: Array | None) -> Handle:
    """Call a model with arrays."""
    made = model.call("", **arguments(**inputs))
    assert isinstance(made, Handle)
    return made


def logits(model: Handle, **inputs: Array | None) -> Array:
    """Logits of a call."""
    return array(run(model, **inputs), "logits")


def layers(cache: Handle, library: RemoteLibrary) -> list[list[Array]]:
    """The tensors of each layer that a cache gives out when it is looped over."""
    items = library.call("builtins:list", cache)
    return [[tensor for tensor in item if isinstance(tensor, np.ndarray)] for item in items]


# results ----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-MODEL-004", "IDEFICS3-MODEL-033")
def test_the_model_gives_a_hidden_state_for_each_token(idefics3: Idefics3Objects) -> None:
    state = array(run(idefics3.trunk, input_ids=np.repeat(TEXT, 2, axis=0)), "last_hidden_state")
    assert state.shape == (2, 8, WIDTH)
    close(state[1], state[0])


@requirement("IDEFICS3-LM-002", "IDEFICS3-LM-003", "IDEFICS3-LM-004", "IDEFICS3-MODEL-033")
def test_the_generating_model_gives_logits_over_the_text_vocabulary(idefics3: Idefics3Objects) -> None:
    made = run(idefics3.model, input_ids=TEXT)
    assert made.type_name == "Idefics3CausalLMOutputWithPast"
    assert array(made, "logits").shape == (1, 8, VOCABULARY)
    assert idefics3.model.get("config.text_config.vocab_size") == VOCABULARY


@requirement("IDEFICS3-LM-007")
def test_the_model_knows_its_image_token(idefics3: Idefics3Objects) -> None:
    assert idefics3.model.get("image_token_id") == idefics3.model.get("config.image_token_id") == IMAGE_ID


@requirement("IDEFICS3-MODEL-026", "IDEFICS3-LM-012")
@pytest.mark.parametrize("name", ["trunk", "model"])
def test_attention_weights_are_returned_for_each_text_layer(idefics3: Idefics3Objects, name: str) -> None:
    made = getattr(idefics3, name).call("", output_attentions=True, **arguments(input_ids=TEXT))
    weights = made.get("attentions")
    assert weights is not None, "output_attentions=True returns none"
    assert [item.shape for item in weights] == [(1, HEADS, 8, 8)] * LAYERS
    for item in weights:
        np.testing.assert_allclose(item.sum(-1), 1, atol=1e-5)
        assert not np.triu(item[0, 0], 1).any(), "a token attends to a later one"
    assert run(getattr(idefics3, name), input_ids=TEXT).get("attentions") is None


@requirement("IDEFICS3-MODEL-027", "IDEFICS3-LM-012")
@pytest.mark.parametrize("name", ["trunk", "model"])
def test_hidden_states_are_those_of_the_embedding_and_of_each_layer(idefics3: Idefics3Objects, name: str) -> None:
    made = getattr(idefics3, name).call("", output_hidden_states=True, **arguments(input_ids=TEXT))
    states = made.get("hidden_states")
    assert states is not None, "output_hidden_states=True returns none"
    assert [item.shape for item in states] == [(1, 8, WIDTH)] * (LAYERS + 1)
    table = idefics3.model.call("get_input_embeddings").get("weight")
    close(states[0], table[TEXT], "the first hidden state is the embedding")
    last = array(run(idefics3.trunk, input_ids=TEXT), "last_hidden_state")
    close(states[-1], last, "the last hidden state is the model's result")
    assert run(getattr(idefics3, name), input_ids=TEXT).get("hidden_states") is None


@requirement("IDEFICS3-MODEL-028", "IDEFICS3-LM-015")
def test_return_dict_false_gives_a_tuple(idefics3: Idefics3Objects) -> None:
    inner = idefics3.trunk.call("", return_dict=False, use_cache=False, **arguments(input_ids=TEXT))
    assert isinstance(inner, tuple)
    assert inner[0].shape == (1, 8, WIDTH)
    plain = idefics3.model.call("", return_dict=False, use_cache=False, **arguments(input_ids=TEXT))
    assert isinstance(plain, tuple)
    assert plain[0].shape == (1, 8, VOCABULARY)
    with_loss = idefics3.model.call("", return_dict=False, use_cache=False, **arguments(input_ids=TEXT, labels=TEXT))
    assert isinstance(with_loss, tuple)
    assert np.size(with_loss[0]) == 1, "the loss comes first"
    close(with_loss[1], plain[0])


# text -------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-MODEL-006")
def test_the_attention_mask_is_all_ones_by_default(idefics3: Idefics3Objects) -> None:
    wanted = logits(idefics3.model, input_ids=TEXT)
    close(logits(idefics3.model, input_ids=TEXT, attention_mask=np.ones_like(TEXT)), wanted)


@requirement("IDEFICS3-MODEL-005")
@pytest.mark.parametrize("junk", [578, 33])
def test_padding_on_the_left_does_not_influence_real_positions(idefics3: Idefics3Objects, junk: int) -> None:
    padded = np.concatenate([np.full((1, 3), junk), TEXT], axis=1)
    mask = np.array([[0] * 3 + [1] * 8], np.int64)
    positions = np.array([[0] * 3 + list(range(8))], np.int64)
    found = logits(idefics3.model, input_ids=padded, attention_mask=mask, position_ids=positions)
    close(found[:, 3:], logits(idefics3.model, input_ids=TEXT))
    unmasked = logits(idefics3.model, input_ids=padded, position_ids=positions)
    assert apart(unmasked[:, 3:], found[:, 3:]), "the test would not see a mask that is ignored"


@requirement("IDEFICS3-MODEL-007")
def test_positions_count_from_zero_by_default(idefics3: Idefics3Objects) -> None:
    wanted = logits(idefics3.model, input_ids=TEXT)
    close(logits(idefics3.model, input_ids=TEXT, position_ids=np.arange(8)[None]), wanted)
    moved = logits(idefics3.model, input_ids=TEXT, position_ids=np.arange(8)[None] * 3)
    assert apart(moved, wanted), "position_ids have no effect"


@requirement("IDEFICS3-MODEL-013")
def test_embeddings_can_be_given_instead_of_ids(idefics3: Idefics3Objects) -> None:
    table = idefics3.model.call("get_input_embeddings").get("weight")
    found = logits(idefics3.model, inputs_embeds=table[TEXT])
    close(found, logits(idefics3.model, input_ids=TEXT))


@requirement("IDEFICS3-MODEL-014")
@pytest.mark.parametrize("name", ["trunk", "model"])
def test_neither_ids_nor_embeddings_is_an_error(idefics3: Idefics3Objects, name: str) -> None:
    with pytest.raises(TargetRaised) as caught:
        run(getattr(idefics3, name), attention_mask=np.ones_like(TEXT))
    assert "ValueError" in caught.value.bases


# cache ------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-MODEL-008", "IDEFICS3-LM-011", "IDEFICS3-MODEL-009", "IDEFICS3-MODEL-010")
@pytest.mark.parametrize("name", ["trunk", "model"])
def test_the_cache_is_an_object_with_keys_and_values_of_every_layer(idefics3: Idefics3Objects, name: str) -> None:
    cache = run(getattr(idefics3, name), input_ids=TEXT).get("past_key_values")
    assert isinstance(cache, Handle), "the cache is a plain tuple"
    assert cache.call("get_seq_length") == 8
    shape = (1, KEY_VALUE_HEADS, 8, HEAD_DIM)
    found = [[tensor.shape for tensor in layer] for layer in layers(cache, idefics3.library)]
    assert found == [[shape, shape]] * LAYERS


@requirement("IDEFICS3-MODEL-025")
@pytest.mark.parametrize("name", ["trunk", "model"])
def test_use_cache_decides_whether_a_cache_is_returned(idefics3: Idefics3Objects, name: str) -> None:
    model = getattr(idefics3, name)
    assert model.call("", use_cache=False, **arguments(input_ids=TEXT)).get("past_key_values") is None
    cache = model.call("", use_cache=True, **arguments(input_ids=TEXT)).get("past_key_values")
    assert isinstance(cache, Handle), "use_cache=True returns no cache object"
    assert cache.call("get_seq_length") == 8


@requirement("IDEFICS3-MODEL-011")
def test_only_new_tokens_need_to_be_passed_with_a_cache(idefics3: Idefics3Objects) -> None:
    wanted = logits(idefics3.model, input_ids=TEXT)
    cache = run(idefics3.model, input_ids=TEXT[:, :5]).get("past_key_values")
    for end in (6, 7, 8):
        mask = np.ones((1, end), np.int64)
        made = idefics3.model.call(
            "", past_key_values=cache, **arguments(input_ids=TEXT[:, end - 1 : end], attention_mask=mask)
        )
        close(array(made, "logits")[:, 0], wanted[:, end - 1], f"token {end}")
        cache = made.get("past_key_values")


@requirement("IDEFICS3-MODEL-012")
def test_a_cache_made_of_tuples_is_refused(idefics3: Idefics3Objects) -> None:
    cache = run(idefics3.model, input_ids=TEXT[:, :5]).get("past_key_values")
    tuples = Tuple(tuple(Tuple(tuple(Tensor(t) for t in layer)) for layer in layers(cache, idefics3.library)))
    error = error_of(lambda: idefics3.model.call("", past_key_values=tuples, **arguments(input_ids=TEXT[:, 5:6])))
    assert error is not None, "a tuple of tuples is taken as a cache"


# images -----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-MODEL-016", "IDEFICS3-MODEL-024")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_images_may_be_in_a_row(idefics3: Idefics3Objects, count: int) -> None:
    pixels = frames(count)
    found = logits(idefics3.model, input_ids=prompt(count), pixel_values=pixels)
    changed = pixels.copy()
    changed[0, -1] = frames(1, seed=7)[0, 0]
    other = logits(idefics3.model, input_ids=prompt(count), pixel_values=changed)
    assert apart(other[:, -1], found[:, -1]), "the last image has no effect on the last token"
    start = 1 + (count - 1) * (FRAME_TOKENS + 1)
    close(other[:, :start], found[:, :start], "the last image has an effect on tokens before it")


@requirement("IDEFICS3-MODEL-015")
def test_pixel_values_without_an_image_axis_are_refused(idefics3: Idefics3Objects) -> None:
    error = error_of(lambda: run(idefics3.model, input_ids=prompt(1), pixel_values=frames(1)[0]))
    assert error is not None, "4-dimensional pixel values are taken"


@requirement("IDEFICS3-MODEL-018")
def test_the_pixel_mask_is_all_ones_by_default(idefics3: Idefics3Objects) -> None:
    inputs = {"input_ids": prompt(2), "pixel_values": frames(2)}
    mask = np.ones((1, 2, SIDE, SIDE), np.int64)
    close(logits(idefics3.model, pixel_attention_mask=mask, **inputs), logits(idefics3.model, **inputs))


@requirement("IDEFICS3-MODEL-017")
def test_a_pixel_mask_without_an_image_axis_is_refused(idefics3: Idefics3Objects) -> None:
    mask = np.ones((1, SIDE, SIDE), np.int64)
    error = error_of(
        lambda: run(idefics3.model, input_ids=prompt(1), pixel_values=frames(1), pixel_attention_mask=mask)
    )
    assert error is not None, "a 3-dimensional pixel mask is taken"


@requirement("IDEFICS3-MODEL-019")
def test_masked_pixels_do_not_influence_the_rest_of_the_frame(idefics3: Idefics3Objects) -> None:
    pixels, mask = frames(1), np.ones((1, 1, SIDE, SIDE), np.int64)
    mask[:, :, SIDE // 2 :] = 0
    changed = np.where(mask[:, :, None] == 0, frames(1, seed=5), pixels)
    features = [
        as_frames(
            array(
                run(idefics3.model, input_ids=prompt(1), pixel_values=values, pixel_attention_mask=seen),
                "image_hidden_states",
            )
        )[0]
        for values, seen in ((pixels, mask), (changed, mask), (pixels, None), (changed, None))
    ]
    upper = FRAME_TOKENS // 2  # tokens of the upper half, whose patches are all unmasked
    close(features[1][:upper], features[0][:upper], "masked pixels change the features of the others")
    assert apart(features[3][:upper], features[2][:upper]), "the test would not see a mask that is ignored"


@requirement("IDEFICS3-MODEL-022", "IDEFICS3-MODEL-023")
def test_only_real_frames_go_through_the_vision_tower(idefics3: Idefics3Objects) -> None:
    counts = [1, 3, 1, 2]
    rows = [frames(count, 3, seed=index) for index, count in enumerate(counts)]
    ids = np.full((4, prompt(3).shape[1]), 578, np.int64)
    mask = np.zeros_like(ids)
    for row, count in enumerate(counts):
        alone = prompt(count)[0]
        ids[row, : len(alone)], mask[row, : len(alone)] = alone, 1
    made = run(idefics3.model, input_ids=ids, attention_mask=mask, pixel_values=np.concatenate(rows))
    features = as_frames(array(made, "image_hidden_states"))
    assert len(features) == 7, "1 + 3 + 1 + 2 frames are real"
    place = 0
    for row, count in enumerate(counts):
        single = run(idefics3.model, input_ids=prompt(count), pixel_values=rows[row][:, :count])
        close(features[place : place + count], as_frames(array(single, "image_hidden_states")), f"row {row}")
        real = prompt(count).shape[1]
        close(array(made, "logits")[row, :real], array(single, "logits")[0], f"row {row} alone gives other logits")
        place += count


@requirement("IDEFICS3-MODEL-023")
@pytest.mark.parametrize("slots", [2, 4])
def test_frames_of_zeros_do_not_change_the_result(idefics3: Idefics3Objects, slots: int) -> None:
    wanted = logits(idefics3.model, input_ids=prompt(1), pixel_values=frames(1))
    close(logits(idefics3.model, input_ids=prompt(1), pixel_values=frames(1, slots)), wanted)


@requirement("IDEFICS3-MODEL-032")
@pytest.mark.parametrize("tokens", [FRAME_TOKENS - 1, FRAME_TOKENS + 1, 2 * FRAME_TOKENS])
def test_image_tokens_that_do_not_match_the_features_are_an_error(idefics3: Idefics3Objects, tokens: int) -> None:
    error = error_of(lambda: run(idefics3.model, input_ids=prompt(1, tokens=tokens), pixel_values=frames(1)))
    assert error is not None, f"{tokens} image tokens are taken for {FRAME_TOKENS} features"


@requirement("IDEFICS3-MODEL-020")
@pytest.mark.parametrize("name", ["trunk", "model"])
def test_image_features_can_be_given_instead_of_pixels(idefics3: Idefics3Objects, name: str) -> None:
    model = getattr(idefics3, name)
    result = "logits" if name == "model" else "last_hidden_state"
    made = run(model, input_ids=prompt(2), pixel_values=frames(2))
    features = array(made, "image_hidden_states")
    again = run(model, input_ids=prompt(2), image_hidden_states=features)
    close(array(again, result), array(made, result))


@requirement("IDEFICS3-MODEL-021", "IDEFICS3-LM-013")
@pytest.mark.parametrize("name", ["trunk", "model"])
def test_image_features_have_one_entry_for_each_real_frame(idefics3: Idefics3Objects, name: str) -> None:
    ids = np.concatenate([np.pad(prompt(1), ((0, 0), (0, FRAME_TOKENS + 1)), constant_values=578), prompt(2)])
    pixels = np.concatenate([frames(1, 2), frames(2, seed=1)])
    made = run(
        getattr(idefics3, name), input_ids=ids, attention_mask=(ids != 578).astype(np.int64), pixel_values=pixels
    )
    assert array(made, "image_hidden_states").shape == (3, FRAME_TOKENS, WIDTH)


@requirement("IDEFICS3-LM-014")
def test_image_features_are_one_tensor(idefics3: Idefics3Objects) -> None:
    made = run(idefics3.model, input_ids=prompt(1), pixel_values=frames(1))
    assert isinstance(made.get("image_hidden_states"), np.ndarray)


# vocabulary -------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-MODEL-031")
@pytest.mark.parametrize("rows", [310, 330])
def test_the_vocabulary_can_be_resized(idefics3: Idefics3Objects, rows: int) -> None:
    model = idefics3.new_model()
    ids: Any = np.array([[1, 5, 9, 200]], np.int64)
    before = logits(model, input_ids=ids)
    model.call("resize_token_embeddings", rows)
    after = logits(model, input_ids=ids)
    assert after.shape == (1, 4, rows)
    assert model.get("config.text_config.vocab_size") == rows
    kept = min(rows, 320)
    close(after[..., :kept], before[..., :kept], "rows that stay changed their values")
