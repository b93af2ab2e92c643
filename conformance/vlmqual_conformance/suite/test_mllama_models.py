"""Inputs and outputs of Mllama's models with text: results, masks, caches, image features, loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import arguments, array, error_of
from vlmqual_conformance.suite.mllama_objects import (
    BOS,
    CROSSING,
    GENERATING,
    HEAD_DIM,
    HEADS,
    IMAGE_ID,
    KEY_VALUE_HEADS,
    LAYERS,
    POSITIONS,
    TILES,
    VOCABULARY,
    WIDTH,
    MllamaObjects,
    apart,
    close,
    logits,
    mllama_objects,
    pixels,
    prompt,
    run,
    seen,
    shapes,
)
from vlmqual_conformance.suite.test_model_loss import cross_entropy
from vlmqual_contract.subject import Handle, RemoteLibrary, Tensor, Tuple
from vlmqual_contract.target import Array

TEXT = prompt(BOS, 40, 41, 42, 43, 44, 45, 46)
#: Two tokens, an image in two tiles, five tokens.
WITH_IMAGE = prompt(BOS, 40, IMAGE_ID, 42, 43, 44, 45, 46)
IMAGE = pixels(2)
MASK = seen(8, (0, 2, 2))


@pytest.fixture
def mllama(library: RemoteLibrary) -> MllamaObjects:
    """Objects of the library under test."""
    return mllama_objects(library)


def picture_and_text(**changes: Array | None) -> dict[str, Array | None]:
    """The inputs of a prompt with one image, some of them changed."""
    return {"input_ids": WITH_IMAGE, **IMAGE, "cross_attention_mask": MASK, **changes}


def new_cache(mllama: MllamaObjects) -> Handle:
    """An empty cache of the library's own class."""
    return mllama.call("DynamicCache")


def first_run(mllama: MllamaObjects, model: Handle, **inputs: Array | None) -> Handle:
    """A call that begins a cache, and returns it."""
    cache = {"past_key_values": new_cache(mllama)} if mllama.library.exists("DynamicCache") else {}
    return run(model, {"use_cache": True, **cache}, **inputs)


# results ----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CGEN-003")
def test_logits_are_over_the_text_vocabulary(mllama: MllamaObjects) -> None:
    assert logits(mllama.model, **picture_and_text()).shape == (1, 8, VOCABULARY)


@requirement("MLLAMA-CGEN-004")
def test_the_result_is_named_or_a_tuple(mllama: MllamaObjects) -> None:
    made = run(mllama.model, input_ids=TEXT)
    assert made.type_name == "CausalLMOutputWithPast"
    plain = mllama.model.call("", return_dict=False, **arguments(input_ids=TEXT))
    first = plain[0] if isinstance(plain, (list, tuple)) else plain.get("0")
    close(np.asarray(first), array(made, "logits"))


@requirement("MLLAMA-CGEN-019")
def test_text_alone_is_accepted_and_leaves_cross_attention_out(mllama: MllamaObjects) -> None:
    alone = logits(mllama.model, input_ids=TEXT)
    assert np.isfinite(alone).all()
    closed = mllama.loaded(GENERATING)
    mllama.refill(closed, "*cross_attn_*_gate", 0.0)
    close(alone, logits(closed, input_ids=TEXT), "open gates change text alone")
    ids = TEXT.copy()
    ids[0, 2] = IMAGE_ID
    assert apart(logits(mllama.model, **picture_and_text(input_ids=ids)), logits(mllama.model, input_ids=ids)), (
        "the image changes nothing, so leaving cross-attention out cannot be told"
    )


@requirement("MLLAMA-CGEN-025", "MLLAMA-CGEN-026")
def test_attentions_and_states_of_every_layer(mllama: MllamaObjects) -> None:
    made = run(mllama.model, {"output_attentions": True, "output_hidden_states": True}, **picture_and_text())
    weights, states = made.get("attentions"), made.get("hidden_states")
    assert weights is not None, "output_attentions=True gives none"
    assert states is not None, "output_hidden_states=True gives none"
    tokens = TILES * POSITIONS
    wanted = [(1, HEADS, 8, tokens if index in CROSSING else 8) for index in range(LAYERS)]
    assert shapes(weights) == wanted
    assert shapes(states[-(LAYERS + 1) :]) == [(1, 8, WIDTH)] * (LAYERS + 1)
    for item in weights:
        np.testing.assert_allclose(item.sum(-1), 1, atol=1e-5)
    hidden = weights[CROSSING[0]][0, :, 2:].reshape(HEADS, 6, TILES, POSITIONS)[:, :, 2:]
    assert not hidden.any(), "tokens attend to tiles that their mask hides"
    np.testing.assert_allclose(
        weights[CROSSING[0]][0, :, :2].sum(-1), 1, atol=1e-5, err_msg="rows that see no image attend to all of it"
    )
    assert weights[CROSSING[0]][0, :, :2].min() > 0


@requirement("MLLAMA-CGEN-033")
def test_a_new_models_closed_gates_hide_the_image(mllama: MllamaObjects) -> None:
    model = mllama.new_model()
    ids = np.array([[1, 320, 5, 6, 7]], np.int64)
    values = np.random.Generator(np.random.PCG64(1)).uniform(-1, 1, (1, 1, 4, 3, 28, 28)).astype(np.float32)
    images: dict[str, Array] = {
        "pixel_values": values,
        "aspect_ratio_ids": np.array([[6]], np.int64),
        "aspect_ratio_mask": np.ones((1, 1, 4), np.int64),
    }
    mask = seen(5, (0, 1, 4))
    inputs = {"input_ids": ids, "cross_attention_mask": mask, **images}
    close(logits(model, **inputs), logits(model, input_ids=ids))
    mllama.refill(model, "*cross_attn_*_gate", 1.0)
    assert apart(logits(model, **inputs), logits(model, input_ids=ids)), "open gates show no image either"


@requirement("MLLAMA-CGEN-037")
def test_both_attention_implementations_agree(mllama: MllamaObjects) -> None:
    close(logits(mllama.fused, **picture_and_text()), logits(mllama.model, **picture_and_text()))
    close(logits(mllama.fused, input_ids=TEXT), logits(mllama.model, input_ids=TEXT))


@requirement("MLLAMA-TEXT-002", "MLLAMA-TEXT-004")
def test_the_text_model_gives_a_state_for_each_token(mllama: MllamaObjects) -> None:
    made = run(mllama.text, input_ids=np.repeat(WITH_IMAGE, 2, axis=0))
    assert made.type_name == "BaseModelOutputWithPast"
    assert array(made, "last_hidden_state").shape == (2, 8, WIDTH)


@requirement("MLLAMA-TEXT-003")
def test_states_and_attentions_of_text_alone(mllama: MllamaObjects) -> None:
    made = run(mllama.text, {"output_attentions": True, "output_hidden_states": True}, input_ids=TEXT)
    weights, states = made.get("attentions"), made.get("hidden_states")
    assert weights is not None, "output_attentions=True gives none"
    assert states is not None, "output_hidden_states=True gives none"
    assert shapes(weights) == [(1, HEADS, 8, 8)] * (LAYERS - len(CROSSING))
    assert shapes(states) == [(1, 8, WIDTH)] * (LAYERS + 1)
    for index in CROSSING:
        close(states[index + 1], states[index], f"layer {index} is left out")


# logits that are kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("model", marks=requirement("MLLAMA-CGEN-008")),
        pytest.param("language", marks=requirement("MLLAMA-CLM-007")),
    ],
)
def test_logits_of_the_last_positions_only(mllama: MllamaObjects, name: str, kept: int) -> None:
    model = getattr(mllama, name)
    whole = logits(model, input_ids=TEXT)
    some = logits(model, {"num_logits_to_keep": kept}, input_ids=TEXT)
    assert some.shape == (1, kept or 8, VOCABULARY)
    close(some, whole[:, -kept:])


# images -----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CGEN-009")
def test_features_may_be_given_in_the_place_of_pixels(mllama: MllamaObjects) -> None:
    states = mllama.states(**IMAGE)
    given = {"input_ids": WITH_IMAGE, "cross_attention_mask": MASK, "cross_attention_states": states}
    close(logits(mllama.model, **given), logits(mllama.model, **picture_and_text()))
    assert apart(logits(mllama.model, **{**given, "cross_attention_states": -states}), logits(mllama.model, **given))


@requirement("MLLAMA-CGEN-010")
def test_pixels_and_features_exclude_each_other(mllama: MllamaObjects) -> None:
    both = picture_and_text(cross_attention_states=mllama.states(**IMAGE))
    error = error_of(lambda: logits(mllama.model, **both))
    assert error, "both are accepted"
    assert "ValueError" in error.bases, f"refused with {error}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("aspect_ratio_ids", marks=requirement("MLLAMA-CGEN-014")),
        pytest.param("aspect_ratio_mask", marks=requirement("MLLAMA-CGEN-015")),
    ],
)
def test_pixels_need_their_aspect_ratios(mllama: MllamaObjects, name: str) -> None:
    error = error_of(lambda: logits(mllama.model, **picture_and_text(**{name: None})))
    assert error, f"pixel_values without {name} are accepted"
    if name == "aspect_ratio_ids":
        assert "ValueError" in error.bases, f"refused with {error}"


@requirement("MLLAMA-CGEN-011", "MLLAMA-TEXT-008")
@pytest.mark.parametrize("name", ["model", "text"])
def test_embeddings_may_be_given_in_the_place_of_ids(mllama: MllamaObjects, name: str) -> None:
    model = getattr(mllama, name)
    table = mllama.model.call("get_input_embeddings").get("weight")
    field = "logits" if name == "model" else "last_hidden_state"
    embedded = array(run(model, inputs_embeds=table[TEXT]), field)
    close(embedded, array(run(model, input_ids=TEXT), field))


@requirement("MLLAMA-CGEN-012")
@pytest.mark.parametrize("given", ["both", "neither"])
def test_exactly_one_of_ids_and_embeddings(mllama: MllamaObjects, given: str) -> None:
    table = mllama.model.call("get_input_embeddings").get("weight")
    inputs = {"input_ids": TEXT, "inputs_embeds": table[TEXT]} if given == "both" else {"attention_mask": TEXT}
    error = error_of(lambda: run(mllama.model, **inputs))
    assert error, f"{given} are accepted"
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("MLLAMA-CGEN-013")
def test_embeddings_may_stand_beside_pixels(mllama: MllamaObjects) -> None:
    table = mllama.model.call("get_input_embeddings").get("weight")
    changed = picture_and_text(input_ids=None, inputs_embeds=table[WITH_IMAGE])
    close(logits(mllama.model, **changed), logits(mllama.model, **picture_and_text()))


# masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("model", marks=requirement("MLLAMA-CGEN-016")),
        pytest.param("fused", marks=requirement("MLLAMA-CGEN-036")),
    ],
)
def test_without_a_mask_every_token_sees_every_tile(mllama: MllamaObjects, name: str) -> None:
    model = getattr(mllama, name)
    ones = np.ones_like(MASK)
    close(
        logits(model, **picture_and_text(cross_attention_mask=None)),
        logits(model, **picture_and_text(cross_attention_mask=ones)),
    )
    assert apart(logits(model, **picture_and_text()), logits(model, **picture_and_text(cross_attention_mask=ones)))


@requirement("MLLAMA-CGEN-017")
def test_a_token_does_not_depend_on_tiles_that_its_mask_hides(mllama: MllamaObjects) -> None:
    two, other = pixels(2, 6), pixels(2, 6, seed=4)
    other["pixel_values"][:, 0] = two["pixel_values"][:, 0]  # another second image
    mask = np.zeros((1, 8, 2, TILES), np.int64)
    mask[0, 2:, 0, :2] = 1
    mask[0, 6:, 1] = 1
    # Without the first two tokens: they see no image, so they attend to both and pass that on by self-attention.
    inputs = {"input_ids": WITH_IMAGE[:, 2:], "cross_attention_mask": mask[:, 2:]}
    one, changed = (logits(mllama.model, **inputs, **each) for each in (two, other))
    close(changed[:, :4], one[:, :4], "tokens that may not see the second image")
    assert apart(changed[:, 4:], one[:, 4:]), "tokens that may see it do not change either"


@requirement("MLLAMA-CGEN-018")
def test_a_token_that_may_see_nothing_attends_to_everything(mllama: MllamaObjects) -> None:
    before = logits(mllama.model, **picture_and_text())[:, :2]
    other = logits(mllama.model, **picture_and_text(**pixels(2, seed=9)))[:, :2]
    assert apart(other, before), "text before the image does not change with it"
    everything = MASK.copy()
    everything[0, :2] = 1
    fed = logits(mllama.model, **picture_and_text(cross_attention_mask=everything))[:, :2]
    assert apart(fed, before), "the feed-forward branch of text before the image is not suppressed"


@requirement("MLLAMA-CGEN-018")
def test_a_token_that_may_see_nothing_attends_as_if_it_saw_everything(mllama: MllamaObjects) -> None:
    model = mllama.loaded(GENERATING)
    mllama.refill(model, "*cross_attn_mlp_gate", 0.0)
    everything = MASK.copy()
    everything[0, :2] = 1
    found = logits(model, **picture_and_text())
    close(found, logits(model, **picture_and_text(cross_attention_mask=everything)), "without feed-forward branches")
    assert apart(found[:, :2], logits(model, input_ids=WITH_IMAGE)[:, :2]), "the attention branch is suppressed"


@requirement("MLLAMA-CGEN-018")
def test_a_token_that_may_see_nothing_has_no_feed_forward_branch(mllama: MllamaObjects) -> None:
    model = mllama.loaded(GENERATING)
    mllama.refill(model, "*cross_attn_attn_gate", 0.0)
    found, alone = logits(model, **picture_and_text()), logits(model, input_ids=WITH_IMAGE)
    close(found[:, :2], alone[:, :2], "without attention branches such tokens are those of text alone")
    assert apart(found[:, 2:], alone[:, 2:]), "tokens that see the image have no feed-forward branch either"


@requirement("MLLAMA-CGEN-027", "MLLAMA-TEXT-007")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_other_position(mllama: MllamaObjects, side: str) -> None:
    width = ((0, 0), (3, 0) if side == "left" else (0, 3))
    real = slice(3, None) if side == "left" else slice(0, 8)
    padded = {
        "input_ids": np.pad(WITH_IMAGE, width, constant_values=7),
        "attention_mask": np.pad(np.ones_like(WITH_IMAGE), width),
        "cross_attention_mask": np.pad(MASK, (*width, (0, 0), (0, 0))),
    }
    positions = np.maximum(padded["attention_mask"].cumsum(-1) - 1, 0)
    found = logits(mllama.model, **padded, **IMAGE, position_ids=positions)[:, real]
    close(found, logits(mllama.model, **picture_and_text()), f"padded on the {side}")


@requirement("MLLAMA-TEXT-007")
def test_positions_count_from_nought_by_default(mllama: MllamaObjects) -> None:
    plain = array(run(mllama.text, input_ids=TEXT), "last_hidden_state")
    counted = array(run(mllama.text, input_ids=TEXT, position_ids=np.arange(8)[None]), "last_hidden_state")
    close(counted, plain)
    spread = array(run(mllama.text, input_ids=TEXT, position_ids=3 * np.arange(8)[None]), "last_hidden_state")
    assert apart(spread, plain), "positions change nothing"


@requirement("MLLAMA-CLM-011")
def test_expanded_masks_and_states_reach_the_cross_attention_layers(mllama: MllamaObjects) -> None:
    least = np.finfo(np.float32).min
    visible = np.repeat(MASK[0, :, 0], POSITIONS, axis=-1) != 0
    some = visible.any(-1)
    bias = np.where(visible | ~some[:, None], 0, least)[None, None].astype(np.float32)
    given = {
        "input_ids": WITH_IMAGE,
        "cross_attention_states": mllama.states(**IMAGE),
        "cross_attention_mask": bias,
        "full_text_row_masked_out_mask": some[None, None, :, None].astype(np.float32),
    }
    found = logits(mllama.language, **given)
    close(found, logits(mllama.model, **picture_and_text()))
    for name in ("cross_attention_mask", "full_text_row_masked_out_mask", "cross_attention_states"):
        changed = {**given, name: None} if name != "cross_attention_states" else {**given, name: -given[name]}
        assert apart(logits(mllama.language, **changed), found), f"{name} changes nothing"


# caches -----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CGEN-020", "MLLAMA-CGEN-021")
def test_a_call_returns_a_cache_that_is_no_tuple(mllama: MllamaObjects) -> None:
    cache = run(mllama.model, {"use_cache": True}, input_ids=TEXT).get("past_key_values")
    assert cache is not None, "use_cache=True returns no cache"
    assert isinstance(cache, Handle), f"the cache is {cache!r}"
    assert cache.call("get_seq_length") == 8


@requirement("MLLAMA-CLM-012")
def test_the_language_models_cache_is_no_tuple(mllama: MllamaObjects) -> None:
    cache = run(mllama.language, {"use_cache": True}, input_ids=TEXT).get("past_key_values")
    assert not isinstance(cache, (list, tuple)), f"the cache is a {type(cache).__name__}"


@requirement("MLLAMA-TEXT-009")
def test_without_use_cache_there_is_no_cache(mllama: MllamaObjects) -> None:
    assert run(mllama.text, {"use_cache": False}, input_ids=TEXT).get("past_key_values") is None


@requirement("MLLAMA-CGEN-022", "MLLAMA-TEXT-006")
def test_a_cache_is_continued_in_place(mllama: MllamaObjects) -> None:
    first = first_run(mllama, mllama.text, input_ids=TEXT[:, :7])
    cache = first.get("past_key_values")
    kind = cache.type_name
    made = run(mllama.text, {"past_key_values": cache, "use_cache": True}, input_ids=TEXT[:, 7:])
    again = made.get("past_key_values")
    assert (again.type_name, again.call("get_seq_length")) == (kind, 8)
    state = array(made, "last_hidden_state")
    assert state.shape == (1, 1, WIDTH)
    close(state, array(run(mllama.text, input_ids=TEXT), "last_hidden_state")[:, 7:])


@requirement("MLLAMA-CGEN-024")
def test_the_last_token_needs_the_cache_and_no_image(mllama: MllamaObjects) -> None:
    first = first_run(
        mllama, mllama.model, **picture_and_text(input_ids=WITH_IMAGE[:, :7], cross_attention_mask=MASK[:, :7])
    )
    options = {
        "past_key_values": first.get("past_key_values"),
        "use_cache": True,
        "cache_position": Tensor(np.array([7])),
    }
    inputs = {"input_ids": WITH_IMAGE[:, 7:], "attention_mask": np.ones((1, 8), np.int64), "cross_attention_mask": MASK}
    found = logits(mllama.model, options, **inputs)
    close(found, logits(mllama.model, **picture_and_text())[:, 7:])


@requirement("MLLAMA-CGEN-023")
def test_a_tuple_is_no_cache(mllama: MllamaObjects) -> None:
    part = Tensor(np.zeros((1, KEY_VALUE_HEADS, 3, HEAD_DIM), np.float32))
    legacy = Tuple(tuple(Tuple((part, part)) for _ in range(LAYERS)))
    ids = arguments(input_ids=TEXT[:, :1])
    assert error_of(lambda: mllama.model.call("", past_key_values=legacy, **ids)), "a tuple of tuples is accepted"


@requirement("MLLAMA-CGEN-028")
def test_cache_positions_from_nought_change_nothing(mllama: MllamaObjects) -> None:
    options = {"cache_position": Tensor(np.arange(8))}
    close(logits(mllama.model, options, **picture_and_text()), logits(mllama.model, **picture_and_text()))


@requirement("MLLAMA-TEXT-010")
def test_self_attention_caches_key_value_heads(mllama: MllamaObjects) -> None:
    cache = first_run(mllama, mllama.text, input_ids=TEXT).get("past_key_values")
    shape = _first_keys(mllama, cache).shape
    assert shape == (1, KEY_VALUE_HEADS, 8, HEAD_DIM)


def _first_keys(mllama: MllamaObjects, cache: Handle) -> Array:
    """Keys of the first layer, however the cache gives them out."""
    if cache.has("key_cache"):
        keys: Any = cache.get("key_cache.0")
    elif cache.has("layers.0.keys"):
        keys = cache.get("layers.0.keys")
    else:
        keys = mllama.library.call("operator:getitem", cache, 0)[0]
    assert isinstance(keys, np.ndarray)
    return keys


# loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("model", marks=requirement("MLLAMA-CGEN-005", "MLLAMA-CGEN-007")),
        pytest.param("language", marks=requirement("MLLAMA-CLM-006")),
    ],
)
def test_the_loss_is_the_cross_entropy_of_the_next_token(mllama: MllamaObjects, name: str) -> None:
    model = getattr(mllama, name)
    labels = TEXT.copy()
    labels[0, [2, 5]] = -100
    for wanted in (TEXT, labels):
        made = run(model, input_ids=TEXT, labels=wanted)
        loss = array(made, "loss")
        assert loss.shape == ()
        assert float(loss) == pytest.approx(cross_entropy(array(made, "logits"), wanted), rel=1e-5)
    assert run(model, input_ids=TEXT).get("loss") is None


@requirement("MLLAMA-CGEN-005")
def test_image_tokens_are_left_out_by_minus_100(mllama: MllamaObjects) -> None:
    labels = np.where(WITH_IMAGE == IMAGE_ID, -100, WITH_IMAGE)
    made = run(mllama.model, **picture_and_text(labels=labels))
    assert float(array(made, "loss")) == pytest.approx(cross_entropy(array(made, "logits"), labels), rel=1e-5)


@requirement("MLLAMA-CGEN-006")
def test_the_image_token_is_no_label(mllama: MllamaObjects) -> None:
    error = error_of(lambda: run(mllama.model, **picture_and_text(labels=WITH_IMAGE)))
    assert error, "a label of vocab_size is accepted"
