"""Inputs and outputs of Idefics' model without head: states, masks, positions, caches, images, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_models import (
    BASE,
    GENERATING,
    HEAD_DIM,
    HEADS,
    LAYERS,
    REAL,
    ROWS,
    TOKENS,
    WIDTH,
    IdeficsModels,
    apart,
    close,
    idefics_models,
    images,
    inputs,
    result,
    run,
    text,
    weights,
)
from vlmqual_conformance.suite.library_objects import arguments, array, error_of
from vlmqual_conformance.suite.test_model_api import layers
from vlmqual_contract.subject import Handle, RemoteLibrary, Tensor, Tuple
from vlmqual_contract.target import Array

FORWARD = [
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "pixel_values",
    "image_encoder_embeddings",
    "perceiver_embeddings",
    "image_attention_mask",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "interpolate_pos_encoding",
    "return_dict",
    "cache_position",
]
#: The second row of the inputs, without padding, and all but its last token.
ROW = {name: value[1:] for name, value in inputs().items()}
BEGIN = {name: value if name == "pixel_values" else value[:, :-1] for name, value in ROW.items()}


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsModels:
    """Objects of the library under test."""
    return idefics_models(library)


def states(model: Handle, options: dict[str, Any] | None = None, /, **given: Array) -> Array:
    """Hidden states for exactly these inputs."""
    return array(model.call("", **(options or {}), **arguments(**given)), "last_hidden_state")


def begun(idefics: IdeficsModels) -> Handle:
    """A call with a cache over all tokens of a row but the last."""
    made = idefics.base.call("", use_cache=True, **arguments(**BEGIN))
    assert isinstance(made, Handle)
    return made


# class and signature ----------------------------------------------------------------------------------------------


@requirement("IDEFICS-MODEL-001")
def test_parameters_of_the_models_forward(library: RemoteLibrary) -> None:
    parameters = library.signature(f"{BASE}.forward")
    assert [item.name for item in parameters if not item.kind.startswith("VAR_")] == FORWARD
    defaults = {item.name: item.default for item in parameters if not item.kind.startswith("VAR_")}
    assert defaults.pop("interpolate_pos_encoding") is False
    assert set(defaults.values()) == {None}


@requirement("IDEFICS-MODEL-002")
@pytest.mark.parametrize("base", ["PreTrainedModel", "Module"])
def test_the_model_is_a_pretrained_model_and_a_module(library: RemoteLibrary, base: str) -> None:
    assert base in library.type_of(BASE)


# results ----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-MODEL-003")
def test_the_model_gives_a_state_for_each_token(idefics: IdeficsModels) -> None:
    found = result(idefics.base)
    assert found.shape == (ROWS, TOKENS, WIDTH)
    head = weights(idefics.model)["lm_head.weight"]
    close((found @ head.T)[REAL], result(idefics.model)[REAL][:, : len(head)], "the head reads these states")


@requirement("IDEFICS-MODEL-016")
def test_return_dict_false_gives_a_tuple(idefics: IdeficsModels) -> None:
    plain = idefics.base.call("", return_dict=False, use_cache=False, **arguments(**inputs()))
    assert isinstance(plain, tuple), f"return_dict=False gives {plain!r}"
    close(plain[0][REAL], result(idefics.base)[REAL])
    assert "ModelOutput" in run(idefics.base, {"return_dict": True}).bases


@requirement("IDEFICS-MODEL-015")
def test_hidden_states_begin_with_the_embeddings_and_end_with_the_result(idefics: IdeficsModels) -> None:
    made = run(idefics.base, {"output_hidden_states": True})
    found = made.get("hidden_states")
    assert found is not None, "output_hidden_states=True gives none"
    assert [item.shape for item in found] == [(ROWS, TOKENS, WIDTH)] * (LAYERS + 1)
    close(found[-1], array(made, "last_hidden_state"), "the last state is the result")
    embedded = idefics.model.call("get_input_embeddings").call("", Tensor(text()["input_ids"]))
    close(found[0], embedded, "the first state is the embedding")
    assert run(idefics.base).get("hidden_states") is None


@requirement("IDEFICS-MODEL-014")
def test_attention_weights_of_every_decoder_layer(idefics: IdeficsModels) -> None:
    model = idefics.eager(BASE)
    found = model.call("", output_attentions=True, **arguments(**ROW)).get("attentions")
    assert found is not None, "output_attentions=True gives none"
    assert [getattr(item, "shape", None) for item in found] == [(1, HEADS, TOKENS, TOKENS)] * LAYERS
    for item in found:
        np.testing.assert_allclose(item.sum(-1), 1, atol=1e-5)
        assert not np.triu(item, 1).any(), "a token attends to a later one"


# text -------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-MODEL-004")
@pytest.mark.parametrize("junk", [0, 33])
def test_padding_on_the_left_changes_no_other_state(idefics: IdeficsModels, junk: int) -> None:
    row = {name: value[:, 2:] if name != "pixel_values" else value for name, value in ROW.items()}
    wanted = states(idefics.base, **row)
    padded = {**ROW, "input_ids": ROW["input_ids"].copy(), "attention_mask": np.ones_like(ROW["attention_mask"])}
    padded["input_ids"][0, :2] = junk
    padded["attention_mask"][0, :2] = 0
    close(states(idefics.base, **padded)[:, 2:], wanted)


@requirement("IDEFICS-MODEL-005")
def test_the_attention_mask_is_all_ones_by_default(idefics: IdeficsModels) -> None:
    ones = result(idefics.base, attention_mask=np.ones_like(text()["input_ids"]))
    close(result(idefics.base, attention_mask=None), ones)
    assert apart(result(idefics.base)[REAL], ones[REAL]), "a mask changes nothing"


@requirement("IDEFICS-MODEL-006")
@pytest.mark.parametrize("masked", [True, False])
def test_positions_count_from_nought_by_default(idefics: IdeficsModels, masked: bool) -> None:
    row = ROW if masked else {name: value for name, value in ROW.items() if name != "attention_mask"}
    plain = states(idefics.base, **row)
    close(states(idefics.base, **row, position_ids=np.arange(TOKENS)[None]), plain)
    spread = states(idefics.base, **row, position_ids=np.arange(TOKENS)[None] // 2)
    assert apart(spread, plain), "positions change nothing"


@requirement("IDEFICS-MODEL-007")
def test_embeddings_may_be_given_in_the_place_of_ids(idefics: IdeficsModels) -> None:
    embedded = idefics.model.call("get_input_embeddings").call("", Tensor(text()["input_ids"]))
    close(result(idefics.base, input_ids=None, inputs_embeds=embedded)[REAL], result(idefics.base)[REAL])


@requirement("IDEFICS-MODEL-008")
@pytest.mark.parametrize("given", ["both", "neither"])
def test_exactly_one_of_ids_and_embeddings(idefics: IdeficsModels, given: str) -> None:
    embedded = np.zeros((ROWS, TOKENS, WIDTH), np.float32)
    changes = {"inputs_embeds": embedded} if given == "both" else {"input_ids": None}
    error = error_of(lambda: run(idefics.base, **changes))
    assert error, f"{given} are accepted"
    assert "ValueError" in error.bases or given == "neither", f"refused with {error}"


# caches -----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-MODEL-009")
def test_the_cache_is_a_tuple_of_keys_and_values(idefics: IdeficsModels) -> None:
    past = begun(idefics).get("past_key_values")
    assert isinstance(past, tuple), f"past_key_values is {past!r}, not a tuple"
    shape = (1, HEADS, TOKENS - 1, HEAD_DIM)
    assert [tuple(tensor.shape for tensor in pair[:2]) for pair in past] == [(shape, shape)] * LAYERS
    assert all(isinstance(pair, tuple) for pair in past)


@requirement("IDEFICS-MODEL-010")
def test_the_cache_holds_nothing_of_images(idefics: IdeficsModels) -> None:
    past = begun(idefics).get("past_key_values")
    held = layers(past, idefics.library) if isinstance(past, Handle) else past
    assert [len(item) for item in held] == [2] * LAYERS


def last(idefics: IdeficsModels, past: Any) -> Array:
    """State of a row's last token, with a cache of the others."""
    now = {**ROW, **{name: ROW[name][:, -1:] for name in ("input_ids", "image_attention_mask")}}
    return states(idefics.base, {"past_key_values": past, "use_cache": True}, **now)


@requirement("IDEFICS-MODEL-011")
def test_a_tuple_of_tuples_is_taken_as_cache(idefics: IdeficsModels) -> None:
    past = begun(idefics).get("past_key_values")
    held = layers(past, idefics.library) if isinstance(past, Handle) else past
    given = Tuple(tuple(Tuple(tuple(Tensor(tensor) for tensor in pair)) for pair in held))
    close(last(idefics, given), states(idefics.base, **ROW)[:, -1:])


@requirement("IDEFICS-MODEL-012")
def test_a_cache_and_the_last_token_give_what_all_tokens_give(idefics: IdeficsModels) -> None:
    past = begun(idefics).get("past_key_values")
    if isinstance(past, tuple):
        past = Tuple(tuple(Tuple(tuple(Tensor(tensor) for tensor in pair)) for pair in past))
    close(last(idefics, past), states(idefics.base, **ROW)[:, -1:])


@requirement("IDEFICS-MODEL-017")
def test_cache_positions_that_count_from_nought_change_nothing(idefics: IdeficsModels) -> None:
    close(result(idefics.base, cache_position=np.arange(TOKENS))[REAL], result(idefics.base)[REAL])


# images -----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-MODEL-018")
@pytest.mark.parametrize("given", ["none", "pixels and encoded", "pixels and resampled", "encoded and resampled"])
def test_exactly_one_image_input(idefics: IdeficsModels, given: str) -> None:
    features: Array = array(run(idefics.base), "image_hidden_states")
    names = {"pixels": "pixel_values", "encoded": "image_encoder_embeddings", "resampled": "perceiver_embeddings"}
    each = {"pixels": images()["pixel_values"], "encoded": features, "resampled": features}
    changes: dict[str, Array | None] = {"pixel_values": None}
    changes |= {names[name]: each[name] for name in names if name in given}
    error = error_of(lambda: run(idefics.base, **changes))
    assert error, f"{given} is accepted"
    assert "ValueError" in error.bases, f"refused with {error}"


@requirement("IDEFICS-MODEL-019")
def test_images_need_their_mask(idefics: IdeficsModels) -> None:
    assert error_of(lambda: run(idefics.base, image_attention_mask=None)), "pixel_values without mask are accepted"


@pytest.mark.parametrize(
    ("name", "resampler"),
    [
        pytest.param("image_encoder_embeddings", False, marks=requirement("IDEFICS-MODEL-020"), id="encoded"),
        pytest.param("perceiver_embeddings", True, marks=requirement("IDEFICS-MODEL-021"), id="resampled"),
    ],
)
def test_features_may_be_given_in_the_place_of_pixels(idefics: IdeficsModels, name: str, resampler: bool) -> None:
    model = idefics.filled(BASE, use_resampler=resampler)
    made = run(model)
    wanted, features = array(made, "last_hidden_state"), array(made, "image_hidden_states")
    close(result(model, pixel_values=None, **{name: features})[REAL], wanted[REAL])
    assert apart(result(model, pixel_values=None, **{name: -features})[REAL], wanted[REAL]), "features change nothing"


@requirement("IDEFICS-MODEL-022")
@pytest.mark.parametrize("side", [42, 56])
def test_pictures_of_another_size_need_interpolation(idefics: IdeficsModels, side: int) -> None:
    assert error_of(lambda: run(idefics.plain, **images(side=side))), f"pictures of {side} pixels are accepted"
    ids = np.full((ROWS, TOKENS), 5)
    made = run(idefics.plain, {"interpolate_pos_encoding": True}, input_ids=ids, **images(side=side))
    assert array(made, "image_hidden_states").shape[2] == (side // 14) ** 2 + 1
    assert np.isfinite(array(made, "logits")).all()


# files and tables -------------------------------------------------------------------------------------------------


@requirement("IDEFICS-MODEL-023")
@pytest.mark.parametrize("name", [BASE, GENERATING])
def test_a_model_comes_back_from_its_files(idefics: IdeficsModels, name: str, tmp_path: Path) -> None:
    model = idefics.filled(name)
    model.call("save_pretrained", str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    loaded = idefics.call(f"{name}.from_pretrained", str(tmp_path))
    np.testing.assert_array_equal(result(loaded)[REAL], result(model)[REAL])


@requirement("IDEFICS-MODEL-023")
def test_the_base_model_comes_from_the_files_of_the_generating_one(idefics: IdeficsModels, tmp_path: Path) -> None:
    idefics.model.call("save_pretrained", str(tmp_path))
    loaded = idefics.call(f"{BASE}.from_pretrained", str(tmp_path))
    np.testing.assert_array_equal(result(loaded)[REAL], result(idefics.base)[REAL])


@requirement("IDEFICS-MODEL-024")
@pytest.mark.parametrize("rows", [100, 60])
def test_the_main_table_can_be_resized(idefics: IdeficsModels, rows: int) -> None:
    model = idefics.filled(BASE)
    before = weights(model)["embed_tokens.weight"]
    model.call("resize_token_embeddings", rows)
    after = weights(model)["embed_tokens.weight"]
    assert after.shape == (rows, WIDTH)
    kept = min(rows, len(before))
    np.testing.assert_array_equal(after[:kept], before[:kept])
