"""Loss and generation of Idefics3ForConditionalGeneration."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import (
    IMAGE_ID,
    NEVER,
    VOCABULARY,
    Idefics3Objects,
    arguments,
    array,
    ended,
    error_of,
    frames,
    idefics3_objects,
    image,
    prompt,
)
from vlmqual_contract.subject import Handle, RemoteLibrary, Tensor
from vlmqual_contract.target import Array

TEXT = np.array([[576, 40, 41, 42, 43, 44, 45, 46]], np.int64)
MESSAGES = [
    [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "In this image, we can see the city."},
                {"type": "image"},
                {"type": "text", "text": "What can we see in this image?"},
            ],
        }
    ],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "In which city is that bridge?"}]}],
]


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


def cross_entropy(logits: Array, labels: Array, counts: Array | None = None) -> float:
    """Mean of -log p(label of the next position) in float64.

    Args:
        logits: (B, S, V).
        labels: (B, S); -100 is left out.
        counts: (B, S), 0 for targets that are left out too.
    """
    scores, targets = logits[:, :-1].astype(np.float64), labels[:, 1:]
    kept = targets != -100
    if counts is not None:
        kept &= counts[:, 1:] != 0
    top = scores.max(-1, keepdims=True)
    log_p = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, np.where(kept, targets, 0)[..., None], -1)[..., 0]
    return float(-chosen[kept].mean())


def losses(model: Handle, labels: Array, **inputs: Array) -> tuple[float, Array]:
    """Loss and logits."""
    made = model.call("", **arguments(labels=labels, **inputs))
    return float(array(made, "loss")), array(made, "logits")


# loss -------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-LM-008")
def test_the_loss_is_a_scalar(idefics3: Idefics3Objects) -> None:
    assert array(idefics3.model.call("", **arguments(input_ids=TEXT, labels=TEXT)), "loss").shape == ()


@requirement("IDEFICS3-LM-009")
def test_the_loss_is_the_cross_entropy_of_the_next_token(idefics3: Idefics3Objects) -> None:
    loss, logits = losses(idefics3.model, TEXT, input_ids=TEXT)
    assert loss == pytest.approx(cross_entropy(logits, TEXT), rel=1e-5)
    other = np.roll(TEXT, 3, axis=1)
    assert losses(idefics3.model, other, input_ids=TEXT)[0] == pytest.approx(cross_entropy(logits, other), rel=1e-5)
    assert idefics3.model.call("", **arguments(input_ids=TEXT)).get("loss") is None


@requirement("IDEFICS3-LM-006")
def test_labels_of_minus_100_are_ignored(idefics3: Idefics3Objects) -> None:
    labels = TEXT.copy()
    labels[0, [2, 3, 6]] = -100
    loss, logits = losses(idefics3.model, labels, input_ids=TEXT)
    assert loss == pytest.approx(cross_entropy(logits, labels), rel=1e-5)
    assert loss != pytest.approx(cross_entropy(logits, TEXT), rel=1e-4)


@requirement("IDEFICS3-LM-009")
def test_targets_that_the_attention_mask_hides_are_ignored(idefics3: Idefics3Objects) -> None:
    ids = np.concatenate([TEXT, TEXT[:, ::-1]])
    ids[1, 5:] = 578
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    loss, logits = losses(idefics3.model, ids, input_ids=ids, attention_mask=mask)
    assert cross_entropy(logits, ids) != pytest.approx(cross_entropy(logits, ids, mask), rel=1e-3)
    assert loss == pytest.approx(cross_entropy(logits, ids, mask), rel=1e-5)


@requirement("IDEFICS3-LM-005")
def test_labels_at_image_tokens_are_ordinary_targets(idefics3: Idefics3Objects) -> None:
    ids = prompt(1)
    loss, logits = losses(idefics3.model, ids, input_ids=ids, pixel_values=frames(1))
    assert loss == pytest.approx(cross_entropy(logits, ids), rel=1e-5)
    without = cross_entropy(logits, np.where(ids == IMAGE_ID, -100, ids))
    assert loss != pytest.approx(without, rel=1e-3)


@requirement("IDEFICS3-LM-010")
@pytest.mark.parametrize("label", [VOCABULARY, VOCABULARY + 7])
def test_labels_beyond_the_vocabulary_are_refused(idefics3: Idefics3Objects, label: int) -> None:
    labels = TEXT.copy()
    labels[0, 4] = label
    error = error_of(lambda: losses(idefics3.model, labels, input_ids=TEXT))
    assert error is not None, f"label {label} is taken with a vocabulary of {VOCABULARY}"
    labels[0, 4] = VOCABULARY - 1
    assert np.isfinite(losses(idefics3.model, labels, input_ids=TEXT)[0])


# generation -------------------------------------------------------------------------------------------------------


def batch(idefics3: Idefics3Objects) -> dict[str, Array]:
    """The documented batch of two conversations, with three small images."""
    prompts = [
        idefics3.processor.call("apply_chat_template", messages, add_generation_prompt=True) for messages in MESSAGES
    ]
    images = [[image(60, 80), image(40, 40, seed=1)], [image(80, 60, seed=2)]]
    made = idefics3.processor.call(
        "",
        text=prompts,
        images=images,
        padding=True,
        return_tensors="pt",
        images_kwargs={"size": {"longest_edge": 112}},
    )
    return {name: array(made, name) for name in made.mapping()}


def generated(idefics3: Idefics3Objects, inputs: dict[str, Array], **options: object) -> Array:
    """Greedy continuation."""
    ids = idefics3.model.call("generate", do_sample=False, **arguments(**inputs), **options)
    assert isinstance(ids, np.ndarray)
    return ids


@requirement("IDEFICS3-LM-018", "IDEFICS3-LM-019")
def test_the_documented_batch_is_continued_behind_its_prompts(idefics3: Idefics3Objects) -> None:
    inputs = batch(idefics3)
    length = inputs["input_ids"].shape[1]
    ids = generated(idefics3, inputs, max_new_tokens=5)
    assert ids.shape[0] == 2
    assert length < ids.shape[1] <= length + 5
    np.testing.assert_array_equal(ids[:, :length], inputs["input_ids"], err_msg="the prompt is not in the result")
    texts = idefics3.processor.call("batch_decode", ids, skip_special_tokens=True)
    assert [text.startswith("User:") for text in texts] == [True, True]


@requirement("IDEFICS3-LM-020")
def test_generation_is_the_same_with_and_without_cache(idefics3: Idefics3Objects) -> None:
    inputs = batch(idefics3)
    cached = generated(idefics3, inputs, max_new_tokens=6, use_cache=True)
    np.testing.assert_array_equal(generated(idefics3, inputs, max_new_tokens=6, use_cache=False), cached)


@requirement("IDEFICS3-LM-020", "IDEFICS3-LM-018")
def test_greedy_generation_takes_the_largest_logit_of_each_step(idefics3: Idefics3Objects) -> None:
    inputs = {"input_ids": prompt(1), "pixel_values": frames(1)}
    ids = generated(idefics3, {**inputs, "attention_mask": np.ones_like(inputs["input_ids"])}, max_new_tokens=4)
    length = inputs["input_ids"].shape[1]
    for end in range(length, ids.shape[1]):
        step = idefics3.model.call("", **arguments(**{**inputs, "input_ids": ids[:, :end]}))
        assert ids[0, end] == array(step, "logits")[0, -1].argmax(), f"new token {end - length}"


@requirement("IDEFICS3-LM-022")
@pytest.mark.parametrize("others", [[], [597]], ids=["one", "several"])
def test_generation_ends_a_row_at_an_end_token_and_fills_it_with_padding(
    idefics3: Idefics3Objects, others: list[int]
) -> None:
    inputs = batch(idefics3)
    length = inputs["input_ids"].shape[1]
    endless = generated(idefics3, inputs, max_new_tokens=6, eos_token_id=NEVER)[:, length:]
    assert endless.shape == (2, 6), f"a row ended without an end token: {endless.tolist()}"
    end = int(endless[0, 0])
    ids = [*others, end] if others else end
    found = generated(idefics3, inputs, max_new_tokens=6, eos_token_id=ids, pad_token_id=88)[:, length:]
    wanted = ended(endless, end, 88)
    assert found.tolist() == wanted.tolist(), f"with the end {ids} rows are {found.tolist()}, not {wanted.tolist()}"


@requirement("IDEFICS3-CARD-004")
def test_one_prompt_with_two_images_is_a_batch_of_one_that_generates(idefics3: Idefics3Objects) -> None:
    text = "User:<image>What is it?<end_of_utterance>\nUser:<image>And this?<end_of_utterance>\nAssistant:"
    made = idefics3.processor.call(
        "",
        text=text,
        images=[image(60, 80), image(40, 40)],
        return_tensors="pt",
        images_kwargs={"size": {"longest_edge": 112}},
    )
    moved = {name: made.call(f"{name}.to", "cpu") for name in made.mapping()}
    assert moved["input_ids"].shape[0] == moved["pixel_values"].shape[0] == 1
    assert moved["pixel_values"].shape[1] == 2
    tensors = {name: Tensor(value) for name, value in moved.items()}
    ids = idefics3.model.call("generate", max_new_tokens=4, do_sample=False, **tensors)
    assert 1 <= ids.shape[1] - moved["input_ids"].shape[1] <= 4
