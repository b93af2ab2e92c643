"""Results, loss and generation of Idefics' model with head, and the documented example with its processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_models import (
    GENERATING,
    HEAD_DIM,
    HEADS,
    LATENTS,
    LAYERS,
    POSITIONS,
    REAL,
    ROWS,
    SLOTS,
    TOKENS,
    VISION_WIDTH,
    VOCABULARY,
    WIDTH,
    IdeficsModels,
    close,
    idefics_models,
    inputs,
    result,
    run,
    text,
    weights,
)
from vlmqual_conformance.suite.library_objects import arguments, array, error_of, image
from vlmqual_conformance.suite.test_idefics_models import FORWARD
from vlmqual_conformance.suite.test_model_loss import cross_entropy
from vlmqual_contract.subject import Handle, RemoteLibrary
from vlmqual_contract.target import Array

#: Token ids without additional ones, for `IdeficsModels.plain`.
IDS = np.array([[0, 0, 1, 80, 31, 17, 40], [1, 33, 12, 8, 89, 71, 56]], np.int64)
PROMPT = [
    "In this picture we can see",
    image(60, 80),
    " a cat. What do we see in this one?",
    image(40, 40, seed=1),
    "Answer:",
]


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsModels:
    """Objects of the library under test."""
    return idefics_models(library)


def loss_of(model: Handle, labels: Array, **changes: Array | None) -> tuple[float, Array]:
    """Loss and logits."""
    made = run(model, labels=labels, **changes)
    loss = array(made, "loss")
    assert loss.size == 1
    return float(loss.ravel()[0]), array(made, "logits")


# signature and results --------------------------------------------------------------------------------------------


@requirement("IDEFICS-LM-001")
def test_parameters_of_the_generating_models_forward(library: RemoteLibrary) -> None:
    place = FORWARD.index("use_cache")
    parameters = [item for item in library.signature(f"{GENERATING}.forward") if not item.kind.startswith("VAR_")]
    assert [item.name for item in parameters] == [*FORWARD[:place], "labels", *FORWARD[place:]]
    defaults = {item.name: item.default for item in parameters}
    assert defaults.pop("interpolate_pos_encoding") is False
    assert set(defaults.values()) == {None}


@requirement("IDEFICS-LM-002", "IDEFICS-LM-004")
def test_logits_of_additional_ids_stand_behind_the_others(idefics: IdeficsModels) -> None:
    made = run(idefics.model)
    assert made.type_name == "IdeficsCausalLMOutputWithPast"
    found, seen = array(made, "logits"), result(idefics.base)
    assert found.shape == (ROWS, TOKENS, VOCABULARY + 2)
    heads = [weights(idefics.model)[name] for name in ("lm_head.weight", "lm_head.additional_fc.weight")]
    close(found[REAL], (seen @ np.concatenate(heads).T)[REAL])


@requirement("IDEFICS-LM-003")
def test_logits_are_over_the_vocabulary(idefics: IdeficsModels) -> None:
    assert result(idefics.plain, input_ids=IDS).shape == (ROWS, TOKENS, VOCABULARY)


@requirement("IDEFICS-LM-010", "IDEFICS-LM-011")
@pytest.mark.parametrize(("name", "length"), [("model", LATENTS), ("plain", POSITIONS)])
def test_image_features_are_one_tensor(idefics: IdeficsModels, name: str, length: int) -> None:
    found = run(getattr(idefics, name), input_ids=IDS).get("image_hidden_states")
    assert isinstance(found, np.ndarray), f"image_hidden_states is a {type(found).__name__}"
    assert found.shape == (ROWS, SLOTS, length, VISION_WIDTH)


@requirement("IDEFICS-LM-012")
def test_the_cache_of_the_generating_model_is_a_tuple(idefics: IdeficsModels) -> None:
    past = run(idefics.model).get("past_key_values")
    assert isinstance(past, tuple), f"past_key_values is {past!r}, not a tuple"
    shape = (ROWS, HEADS, TOKENS, HEAD_DIM)
    assert [tuple(tensor.shape for tensor in pair[:2]) for pair in past] == [(shape, shape)] * LAYERS


@requirement("IDEFICS-LM-013")
def test_states_and_attention_weights_are_returned(idefics: IdeficsModels) -> None:
    made = run(idefics.eager(GENERATING), {"output_hidden_states": True, "output_attentions": True})
    states, attentions = made.get("hidden_states"), made.get("attentions")
    assert [item.shape for item in states] == [(ROWS, TOKENS, WIDTH)] * (LAYERS + 1)
    shape = (ROWS, HEADS, TOKENS, TOKENS)
    assert [getattr(item, "shape", None) for item in attentions] == [shape] * LAYERS


@requirement("IDEFICS-LM-014")
def test_a_tuple_begins_with_the_loss_or_with_the_logits(idefics: IdeficsModels) -> None:
    given = inputs(input_ids=IDS)
    plain = idefics.plain.call("", return_dict=False, **arguments(**given))
    assert isinstance(plain, tuple), f"return_dict=False gives {plain!r}"
    assert plain[0].shape == (ROWS, TOKENS, VOCABULARY)
    with_loss = idefics.plain.call("", return_dict=False, **arguments(labels=IDS, **given))
    assert isinstance(with_loss, tuple)
    assert np.size(with_loss[0]) == 1, "the loss comes first"
    close(with_loss[1][REAL], plain[0][REAL])


# loss -------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-LM-005", "IDEFICS-LM-006")
def test_the_loss_is_a_scalar_that_comes_with_labels(idefics: IdeficsModels) -> None:
    assert array(run(idefics.plain, input_ids=IDS, labels=IDS), "loss").shape == ()
    assert run(idefics.plain, input_ids=IDS).get("loss") is None


@requirement("IDEFICS-LM-008")
@pytest.mark.parametrize("turn", [0, 3])
def test_the_loss_is_the_cross_entropy_of_the_next_token(idefics: IdeficsModels, turn: int) -> None:
    labels = np.roll(IDS, turn, axis=1)
    loss, logits = loss_of(idefics.plain, labels, input_ids=IDS, attention_mask=None)
    assert loss == pytest.approx(cross_entropy(logits, labels), rel=1e-4)


@requirement("IDEFICS-LM-008")
def test_targets_that_the_attention_mask_hides_are_left_out(idefics: IdeficsModels) -> None:
    mask = np.ones_like(IDS)
    mask[1, 4:] = 0
    loss, logits = loss_of(idefics.plain, IDS, input_ids=IDS, attention_mask=mask)
    assert cross_entropy(logits, IDS) != pytest.approx(cross_entropy(logits, IDS, mask), rel=1e-2)
    assert loss == pytest.approx(cross_entropy(logits, IDS, mask), rel=1e-4)


@requirement("IDEFICS-LM-007")
def test_labels_of_minus_100_are_left_out(idefics: IdeficsModels) -> None:
    labels = IDS.copy()
    labels[:, [2, 5]] = -100
    loss, logits = loss_of(idefics.plain, labels, input_ids=IDS, attention_mask=None)
    assert cross_entropy(logits, IDS) != pytest.approx(cross_entropy(logits, labels), rel=1e-3)
    assert loss == pytest.approx(cross_entropy(logits, labels), rel=1e-4)


@requirement("IDEFICS-LM-009")
@pytest.mark.parametrize("label", [VOCABULARY, VOCABULARY + 7, -1])
def test_labels_outside_of_the_vocabulary_are_refused(idefics: IdeficsModels, label: int) -> None:
    labels = IDS.copy()
    labels[1, 4] = label
    error = error_of(lambda: loss_of(idefics.plain, labels, input_ids=IDS))
    assert error, f"label {label} is taken with a vocabulary of {VOCABULARY}"
    labels[1, 4] = VOCABULARY - 1
    assert np.isfinite(loss_of(idefics.plain, labels, input_ids=IDS)[0])


@requirement("IDEFICS-LM-019")
def test_additional_ids_are_targets_of_the_loss(idefics: IdeficsModels) -> None:
    ids = text()["input_ids"]
    assert (ids >= VOCABULARY).any()
    loss, logits = loss_of(idefics.model, ids, attention_mask=None)
    assert loss == pytest.approx(cross_entropy(logits, ids), rel=1e-4)


# the documented example -------------------------------------------------------------------------------------------


def prepared(idefics: IdeficsModels, *prompts: list[Any]) -> dict[str, Array]:
    """Tensors that the processor of the tiny checkpoint makes of prompts, given by name."""
    names = [item.name for item in idefics.library.signature("IdeficsProcessor.__call__")]
    given = {"prompts" if "prompts" in names else "text": list(prompts)}  # the name before 4.46, and since
    made = idefics.processor.call("", return_tensors="pt", **given)
    return {name: array(made, name) for name in made.mapping()}


def continued(idefics: IdeficsModels, **given: Array) -> Array:
    """Prompts and at most six greedy tokens."""
    ids = idefics.checkpoint_model.call("generate", max_new_tokens=6, do_sample=False, **arguments(**given))
    assert isinstance(ids, np.ndarray)
    return ids


@requirement("IDEFICS-LM-015")
def test_generation_takes_what_the_processor_makes(idefics: IdeficsModels) -> None:
    given = prepared(idefics, PROMPT, PROMPT[:3])
    length = given["input_ids"].shape[1]
    ids = continued(idefics, **given)
    assert ids.shape[0] == 2
    assert length < ids.shape[1] <= length + 6
    np.testing.assert_array_equal(ids[:, :length], given["input_ids"], err_msg="the prompt is not in the result")


@requirement("IDEFICS-LM-015")
def test_generation_takes_the_largest_logit_of_each_step(idefics: IdeficsModels) -> None:
    given = prepared(idefics, PROMPT)
    length = given["input_ids"].shape[1]
    ids = continued(idefics, **given)
    last = given["image_attention_mask"][:, -1:]
    for end in range(length, ids.shape[1]):
        seen = np.concatenate([given["image_attention_mask"], *[last] * (end - length)], axis=1)
        now = {"input_ids": ids[:, :end], "attention_mask": np.ones((1, end), np.int64), "image_attention_mask": seen}
        step = idefics.checkpoint_model.call("", **arguments(**{**given, **now}))
        assert ids[0, end] == array(step, "logits")[0, -1].argmax(), f"new token {end - length}"


@requirement("IDEFICS-LM-016")
def test_prompts_may_be_the_processors_first_argument(idefics: IdeficsModels) -> None:
    wanted = prepared(idefics, PROMPT)
    made = idefics.processor.call("", [PROMPT], return_tensors="pt")
    assert set(made.mapping()) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(array(made, name), value, err_msg=name)


@requirement("IDEFICS-LM-017")
def test_texts_are_decoded_without_special_tokens(idefics: IdeficsModels) -> None:
    ids = prepared(idefics, PROMPT, PROMPT[:3])["input_ids"]
    bare = idefics.processor.call("batch_decode", ids, skip_special_tokens=True)
    whole = idefics.processor.call("batch_decode", ids)
    assert isinstance(bare, list)
    assert len(bare) == 2
    for special in ("<s>", "<image>", "<fake_token_around_image>"):
        assert all(special in each for each in whole), f"{special} is not in {whole}"
        assert not any(special in each for each in bare), f"{special} is in {bare}"
    assert all("picture" in each.replace(" ", "") for each in bare)


@requirement("IDEFICS-LM-018")
def test_text_alone_is_continued_with_the_processors_zeros_only(idefics: IdeficsModels) -> None:
    given = prepared(idefics, ["In this picture we can see"])
    assert not given["pixel_values"].any()
    assert not given["image_attention_mask"].any()
    length = given["input_ids"].shape[1]
    assert length < continued(idefics, **given).shape[1] <= length + 6
    bare = {name: given[name] for name in ("input_ids", "attention_mask")}
    error = error_of(lambda: continued(idefics, **bare))
    assert error, "ids alone are continued"
    assert "ValueError" in error.bases, f"refused with {error}"
