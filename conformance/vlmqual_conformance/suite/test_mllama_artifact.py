"""Mllama files: what is saved comes back; parts of a whole checkpoint; and generation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import NEVER, arguments, array, ended, image, written
from vlmqual_conformance.suite.mllama_objects import (
    BOS,
    GENERATING,
    IMAGE_ID,
    MllamaObjects,
    close,
    logits,
    mllama_objects,
    pixels,
    prompt,
    run,
    seen,
)
from vlmqual_contract.subject import RemoteLibrary, Tensor
from vlmqual_contract.target import Array

TEXT = prompt(BOS, 40, 41, 42, 43, 44, 45, 46)
WITH_IMAGE = prompt(IMAGE_ID, BOS, 42, 43, 44, 45)
INPUTS = {"input_ids": WITH_IMAGE, **pixels(6), "cross_attention_mask": seen(6, (0, 0, 4))}


@pytest.fixture
def mllama(library: RemoteLibrary) -> MllamaObjects:
    """Objects of the library under test."""
    return mllama_objects(library)


def generated(mllama: MllamaObjects, **options: object) -> list[list[int]]:
    """Greedy tokens behind a prompt with an image."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 580, **options}
    found = mllama.model.call("generate", **settings, **arguments(attention_mask=np.ones_like(WITH_IMAGE), **INPUTS))
    rows: list[list[int]] = np.asarray(found).tolist()
    return rows


# files ------------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CFG-009")
def test_a_configuration_comes_back_with_its_nested_values(mllama: MllamaObjects, tmp_path: Path) -> None:
    made = mllama.new_config(
        vision_config={"norm_eps": 1e-3, "num_global_layers": 2},
        text_config={"rms_norm_eps": 3e-4, "intermediate_size": 80, "cross_attention_layers": [2]},
    )
    made.call("save_pretrained", str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["model_type"] == "mllama"
    loaded = mllama.call("MllamaConfig.from_pretrained", str(tmp_path))
    wanted = {
        "image_token_index": 320,
        "vision_config.norm_eps": 1e-3,
        "vision_config.num_global_layers": 2,
        "vision_config.attention_heads": 4,
        "vision_config.intermediate_layers_indices": [0, 2],
        "vision_config.image_size": 28,
        "text_config.rms_norm_eps": 3e-4,
        "text_config.intermediate_size": 80,
        "text_config.cross_attention_layers": [2],
        "text_config.num_key_value_heads": 2,
        "text_config.vocab_size": 320,
    }
    assert {name: loaded.get(name) for name in wanted} == wanted
    assert loaded.type_of("vision_config")[0] == "MllamaVisionConfig"
    assert loaded.type_of("text_config")[0] == "MllamaTextConfig"


@requirement("MLLAMA-IMG-044")
def test_an_image_processor_comes_back(mllama: MllamaObjects, tmp_path: Path) -> None:
    made = mllama.new_image_processor(20, 3, do_normalize=True, image_mean=[0.1, 0.2, 0.3], rescale_factor=0.01)
    made.call("save_pretrained", str(tmp_path))
    loaded = mllama.call("MllamaImageProcessor.from_pretrained", str(tmp_path))
    assert (loaded.get("size.height"), loaded.get("max_image_tiles"), loaded.get("do_rescale")) == (20, 3, False)
    before, after = (
        array(each.call("preprocess", image(30, 40), return_tensors="np"), "pixel_values") for each in (made, loaded)
    )
    np.testing.assert_array_equal(after, before)


@requirement("MLLAMA-PROC-007", "MLLAMA-PROC-021")
def test_a_processor_comes_back_with_its_template(mllama: MllamaObjects, tmp_path: Path) -> None:
    made = mllama.new_processor()
    template = "{% for turn in messages %}[{{ turn['role'] }}]{% endfor %}"
    made.set("chat_template", template)
    made.call("save_pretrained", str(tmp_path))
    loaded = mllama.call("MllamaProcessor.from_pretrained", str(tmp_path))
    assert loaded.call("apply_chat_template", [{"role": "user", "content": "Hi"}]) == "[user]"
    before, after = (
        each.call("", images=image(30, 60), text="<|image|>What is it?", return_tensors="np") for each in (made, loaded)
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids", "cross_attention_mask"):
        np.testing.assert_array_equal(array(after, name), array(before, name), err_msg=name)


@requirement("MLLAMA-CGEN-032")
@pytest.mark.parametrize("size", ["5GB", "300KB"], ids=["one file", "shards"])
def test_a_model_comes_back_with_equal_logits(mllama: MllamaObjects, tmp_path: Path, size: str) -> None:
    mllama.model.call("save_pretrained", str(tmp_path), max_shard_size=size)
    parts = [name for name in written(tmp_path) if name.endswith(".safetensors")]
    assert (len(parts) == 1) is (size == "5GB"), parts
    loaded = mllama.call(f"{GENERATING}.from_pretrained", str(tmp_path), attn_implementation="eager")
    np.testing.assert_array_equal(logits(loaded, **INPUTS), logits(mllama.model, **INPUTS))


@requirement("MLLAMA-CGEN-034")
def test_torch_dtype_decides_the_dtype_of_the_weights(mllama: MllamaObjects) -> None:
    for name in ("bfloat16", "float32"):
        kind = mllama.library.get(f"torch:{name}")
        loaded = mllama.call(f"{GENERATING}.from_pretrained", str(mllama.checkpoint), torch_dtype=kind)
        found = mllama.library.call("builtins:str", loaded.call("get_output_embeddings").get("weight.dtype"))
        assert found == f"torch.{name}"


@requirement("MLLAMA-CLM-005")
def test_the_language_model_loads_from_a_whole_checkpoint(mllama: MllamaObjects) -> None:
    close(logits(mllama.language, input_ids=TEXT), logits(mllama.model, input_ids=TEXT))


@requirement("MLLAMA-TEXT-011")
def test_the_text_model_loads_from_a_whole_checkpoint(mllama: MllamaObjects) -> None:
    head = mllama.model.call("get_output_embeddings").get("weight")
    state = array(run(mllama.text, input_ids=TEXT), "last_hidden_state")
    close((state @ head.T).astype(np.float32), logits(mllama.model, input_ids=TEXT))


@requirement("MLLAMA-VIS-012")
def test_the_vision_model_loads_from_a_whole_checkpoint(mllama: MllamaObjects) -> None:
    inside = mllama.model.call(mllama.part("vision_model"), **arguments(**pixels(6, 2)))
    alone = mllama.vision.call("", **arguments(**pixels(6, 2)))
    close(array(alone, "last_hidden_state"), array(inside, "last_hidden_state"))


# generation -------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CGEN-029")
@pytest.mark.parametrize("new", [1, 5])
def test_generation_puts_at_most_so_many_tokens_behind_the_prompt(mllama: MllamaObjects, new: int) -> None:
    found = generated(mllama, max_new_tokens=new)[0]
    assert found[:6] == WITH_IMAGE[0].tolist(), "the prompt comes first"
    assert 6 < len(found) <= 6 + new


@requirement("MLLAMA-CGEN-038")
@pytest.mark.parametrize("others", [[], [597]], ids=["one", "several"])
def test_generation_ends_at_an_end_token(mllama: MllamaObjects, others: list[int]) -> None:
    endless = np.array(generated(mllama, eos_token_id=NEVER))[:, WITH_IMAGE.shape[1] :]
    assert endless.shape == (1, 6), f"the row ended without an end token: {endless.tolist()}"
    end = int(endless[0, 2])
    ids = [*others, end] if others else end
    found = np.array(generated(mllama, eos_token_id=ids))[:, WITH_IMAGE.shape[1] :]
    wanted = ended(endless, end, 580)
    assert found.tolist() == wanted.tolist(), f"with the end {ids} the row is {found.tolist()}, not {wanted.tolist()}"


@requirement("MLLAMA-CGEN-030")
def test_generation_with_and_without_a_cache_agree(mllama: MllamaObjects) -> None:
    assert generated(mllama, use_cache=True) == generated(mllama, use_cache=False)


@requirement("MLLAMA-CGEN-031")
def test_a_batch_with_different_numbers_of_images_is_generated(mllama: MllamaObjects) -> None:
    texts = ["<|image|>What is it?", "<|image|><|image|>Which of these two is larger?"]
    images = [[image(60, 40)], [image(30, 90, 1), image(80, 80, 2)]]
    inputs = mllama.processor.call("", images=images, text=texts, padding=True, return_tensors="np")
    arrays: dict[str, Array] = {name: array(inputs, name) for name in inputs.mapping()}
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 580}
    found = np.asarray(mllama.model.call("generate", **settings, **arguments(**arrays)))
    length = arrays["input_ids"].shape[1]
    assert found.shape[0] == 2
    assert length < found.shape[1] <= length + 3
    first = logits(mllama.model, **arrays)
    assert found[:, length].tolist() == first[:, -1].argmax(-1).tolist(), "the first new token is not the likeliest"


@requirement("MLLAMA-CLM-010")
def test_the_language_model_samples_up_to_a_length(mllama: MllamaObjects) -> None:
    mllama.library.call("torch:manual_seed", 3)
    settings = {"max_length": 12, "do_sample": True, "temperature": 0.6, "pad_token_id": 580}
    found = np.asarray(mllama.language.call("generate", Tensor(TEXT), **settings))
    assert found[0, :8].tolist() == TEXT[0].tolist()
    assert 8 < found.shape[1] <= 12
    assert found.max() < 600
