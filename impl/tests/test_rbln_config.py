"""Configurations of the RBLN classes: what they take, settle and refuse."""

from __future__ import annotations

from typing import Any

import pytest

from vlmqual_impl.api.rbln_config import (
    RBLNIdefics3ForConditionalGenerationConfig,
    RBLNIdeficsForVisionText2TextConfig,
    RBLNMllamaForConditionalGenerationConfig,
    RBLNTextModelConfig,
)

KINDS = [
    RBLNIdefics3ForConditionalGenerationConfig,
    RBLNIdeficsForVisionText2TextConfig,
    RBLNMllamaForConditionalGenerationConfig,
]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_what_is_left_out_is_the_default(kind: Any) -> None:
    made = kind()
    assert (made.batch_size, made.vision_model.batch_size, made.text_model.batch_size) == (1, 1, 1)
    assert (made.create_runtimes, made.device, made.npu, made.num_devices) == (True, None, None, 1)
    assert kind.submodules == ["vision_model", "text_model"]


@each_kind
@pytest.mark.parametrize("size", [0, -1, True, 1.0, "2", [1]])
def test_a_batch_size_that_is_no_positive_number_is_refused_with_its_value(kind: Any, size: object) -> None:
    with pytest.raises(ValueError, match=r"batch_size is .*positive whole number") as error:
        kind(batch_size=size)
    assert repr(size) in str(error.value)


@each_kind
def test_the_batch_size_reaches_the_text_model_and_not_the_vision_model(kind: Any) -> None:
    made = kind(batch_size=4)
    assert (made.text_model.batch_size, made.vision_model.batch_size) == (4, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"no_such": 1}, "does not know 'no_such'; it knows .*batch_size.*text_model"),
        ({"text_model": {"no_such": 1}}, "RBLNTextModelConfig does not know 'no_such'; it knows .*max_seq_len"),
        ({"text_model": {"image_slots": [1]}}, "does not know 'image_slots'"),
        ({"text_model": {"batch_size": 2}}, "batch_size of text_model is 2, that of the model is 1"),
        ({"vision_model": {"batch_size": 2}}, "frames run one at a time"),
        ({"vision_model": {"image_size": [1, 2, 3]}}, r"image_size is \[1, 2, 3\]"),
        ({"text_model": {"prefill_chunk_size": 100}}, "prefill_chunk_size is 100; .*multiple of 64"),
        ({"text_model": {"max_seq_len": 0}}, "max_seq_len is 0"),
        ({"text_model": {"attn_impl": "flash_attn"}}, "attn_impl is 'flash_attn'; only 'eager'"),
        ({"text_model": {"use_inputs_embeds": False}}, "use_inputs_embeds is False"),
        ({"text_model": {"use_position_ids": 1}}, "use_position_ids is 1"),
        ({"text_model": {"num_devices": 3}}, "num_devices is 3; .*1, 2, 4, 8, 16, 32"),
        ({"text_model": {"num_devices": 2, "tensor_parallel_size": 4}}, "they are one setting"),
        ({"text_model": {"num_devices": 2, "device": [0]}}, r"device is \[0\]; num_devices is 2"),
        ({"text_model": {"num_devices": 2, "device": [0, 0]}}, r"device is \[0, 0\]"),
        ({"text_model": {"device": []}}, r"device is \[\]"),
        ({"device": 5, "text_model": {"num_devices": 2}}, "device is 5, one device; text_model is divided over 2"),
        ({"device": -1}, "device is -1"),
        ({"num_devices": 2}, "num_devices is 2; only text_model can be divided"),
        ({"create_runtimes": "no"}, "create_runtimes is 'no'; valid are True and False"),
        ({"timeout": 0.5}, "timeout is 0.5"),
        ({"npu": 3}, "npu is 3"),
        ({"text_model": "eager"}, "text_model is a str; it has to be a dictionary or a RBLNTextModelConfig"),
    ],
)
def test_what_is_not_valid_is_refused_by_name_and_value(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RBLNIdefics3ForConditionalGenerationConfig(**given)


@pytest.mark.parametrize("sizes", [[], [1, 2], [2, 2, 1], [1], [2, 0], 2, [2, True]])
def test_decoder_batch_sizes_fall_from_the_batch_size(sizes: object) -> None:
    text = {"decoder_batch_sizes": [2, 1]}
    assert RBLNIdefics3ForConditionalGenerationConfig(2, text_model=text).text_model.decoder_batch_sizes == [2, 1]
    with pytest.raises(ValueError, match=r"decoder_batch_sizes is .*falls from batch_size, here 2"):
        RBLNIdefics3ForConditionalGenerationConfig(2, text_model={"decoder_batch_sizes": sizes})


def test_image_slots_belong_to_models_that_look_at_images_from_their_layers() -> None:
    assert RBLNMllamaForConditionalGenerationConfig().text_model.image_slots == [1]  # type: ignore[attr-defined]
    made = RBLNMllamaForConditionalGenerationConfig(text_model={"image_slots": [2, 0]})
    assert made.text_model.image_slots == [0, 2]  # type: ignore[attr-defined]
    for wrong in ([], [1, 1], [-1], 1):
        with pytest.raises(ValueError, match="image_slots is"):
            RBLNMllamaForConditionalGenerationConfig(text_model={"image_slots": wrong})
    with pytest.raises(ValueError, match="no text without an image slot"):
        RBLNIdeficsForVisionText2TextConfig(text_model={"image_slots": [0, 1]})


def test_parts_are_objects_whatever_they_were_given_as() -> None:
    text = RBLNTextModelConfig(max_seq_len=64, tensor_parallel_size=2)
    made = RBLNIdefics3ForConditionalGenerationConfig(text_model=text, vision_model={"device": 1, "image_size": 56})
    assert isinstance(made.text_model, RBLNTextModelConfig)
    assert (made.text_model.max_seq_len, made.text_model.num_devices) == (64, 2)
    assert (made.vision_model.device, made.vision_model.image_size) == (1, [56, 56])


def test_what_is_saved_gives_the_same_configuration_without_options() -> None:
    made = RBLNIdefics3ForConditionalGenerationConfig(
        2, {"image_size": 56}, {"max_seq_len": 64, "num_devices": 2}, npu="RBLN-CA25", timeout=3, create_runtimes=False
    )
    again = RBLNIdefics3ForConditionalGenerationConfig(**made.to_dict())
    assert again.to_dict() == made.to_dict()
    assert (again.timeout, again.create_runtimes) == (None, True)
    assert "timeout=3" in repr(made)
