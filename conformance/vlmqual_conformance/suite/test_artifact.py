"""Idefics3 files: what is saved comes back, for configurations, processors and models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import (
    Idefics3Objects,
    arguments,
    array,
    idefics3_objects,
    image,
    written,
)
from vlmqual_contract.subject import Handle, RemoteLibrary
from vlmqual_contract.target import Array

MODEL = "Idefics3ForConditionalGeneration"


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


def answers(model: Handle, name: str = "logits") -> Array:
    """What a small model makes of an image and some text."""
    ids = np.array([[1, *[300] * 4, 5, 9, 200, 17]], np.int64)
    pixels = np.random.Generator(np.random.PCG64(3)).uniform(-1, 1, (1, 1, 3, 56, 56)).astype(np.float32)
    return array(model.call("", **arguments(input_ids=ids, pixel_values=pixels)), name)


def saved(model: Handle, folder: Path, **options: str) -> Path:
    """Save a model."""
    model.call("save_pretrained", str(folder), **options)
    return folder


# configuration ----------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-CFG-016")
def test_a_configuration_comes_back_with_its_nested_values(idefics3: Idefics3Objects, tmp_path: Path) -> None:
    made = idefics3.new_config(
        scale_factor=4,
        use_cache=False,
        vision_config={"layer_norm_eps": 1e-3, "patch_size": 7},
        text_config={"rms_norm_eps": 3e-4, "intermediate_size": 80},
    )
    made.call("save_pretrained", str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["model_type"] == "idefics3"
    loaded = idefics3.call("Idefics3Config.from_pretrained", str(tmp_path))
    wanted = {
        "scale_factor": 4,
        "image_token_id": 300,
        "tie_word_embeddings": False,
        "use_cache": False,
        "vision_config.layer_norm_eps": 1e-3,
        "vision_config.patch_size": 7,
        "vision_config.image_size": 56,
        "text_config.rms_norm_eps": 3e-4,
        "text_config.intermediate_size": 80,
        "text_config.vocab_size": 320,
        "text_config.num_key_value_heads": 2,
    }
    assert {name: loaded.get(name) for name in wanted} == wanted
    assert loaded.type_of("vision_config")[0] == "Idefics3VisionConfig"
    assert "LlamaConfig" in loaded.type_of("text_config")


@requirement("IDEFICS3-CFG-016")
def test_a_tied_configuration_comes_back_tied(idefics3: Idefics3Objects, tmp_path: Path) -> None:
    idefics3.new_config(tie_word_embeddings=True).call("save_pretrained", str(tmp_path))
    loaded = idefics3.call("Idefics3Config.from_pretrained", str(tmp_path))
    assert loaded.get("tie_word_embeddings") is True


# processors -------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-IMG-046")
def test_an_image_processor_comes_back(idefics3: Idefics3Objects, tmp_path: Path) -> None:
    options = {"do_image_splitting": False, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 0.01, "do_normalize": True}
    made = idefics3.new_image_processor(20, 3, **options)
    made.call("save_pretrained", str(tmp_path))
    loaded = idefics3.call("Idefics3ImageProcessor.from_pretrained", str(tmp_path))
    for name, value in options.items():
        found = loaded.get(name)
        assert found == value or list(found) == value, name
    assert loaded.get("size.longest_edge") == 60
    assert loaded.get("max_image_size.longest_edge") == 20
    before, after = (
        array(each.call("preprocess", image(30, 40), return_tensors="np"), "pixel_values") for each in (made, loaded)
    )
    np.testing.assert_array_equal(after, before)


@requirement("IDEFICS3-PROC-027")
def test_a_processor_comes_back_with_its_token_count_and_template(idefics3: Idefics3Objects, tmp_path: Path) -> None:
    made = idefics3.new_processor(image_seq_len=3)
    made.call("save_pretrained", str(tmp_path))
    loaded = idefics3.call("Idefics3Processor.from_pretrained", str(tmp_path))
    assert loaded.get("image_seq_len") == 3
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    texts = [each.call("apply_chat_template", messages, add_generation_prompt=True) for each in (made, loaded)]
    assert texts[0] == texts[1]
    assert texts[0].count("<image>") == 1
    before, after = (each.call("", images=image(60, 80), text=texts[0], return_tensors="np") for each in (made, loaded))
    for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"):
        np.testing.assert_array_equal(array(after, name), array(before, name), err_msg=name)


# models -----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-MODEL-030")
@pytest.mark.parametrize("size", ["5GB", "150KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_comes_back_with_equal_logits(idefics3: Idefics3Objects, tmp_path: Path, tied: bool, size: str) -> None:
    model = idefics3.new_model(tie_word_embeddings=tied)
    saved(model, tmp_path, max_shard_size=size)
    parts = [name for name in written(tmp_path) if name.endswith(".safetensors")]
    if size == "5GB":
        assert parts == ["model.safetensors"]
    else:
        assert len(parts) > 1, f"max_shard_size {size} gives {parts}"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
        assert set(index["weight_map"].values()) == set(parts)
    loaded = idefics3.call(f"{MODEL}.from_pretrained", str(tmp_path))
    np.testing.assert_array_equal(answers(loaded), answers(model))
    shared = loaded.call("get_input_embeddings").call("weight.data_ptr")
    assert (loaded.call("get_output_embeddings").call("weight.data_ptr") == shared) is tied


@requirement("IDEFICS3-MODEL-030")
def test_a_model_without_head_comes_back_with_equal_states(idefics3: Idefics3Objects, tmp_path: Path) -> None:
    model = idefics3.new_model("Idefics3Model")
    saved(model, tmp_path)
    loaded = idefics3.call("Idefics3Model.from_pretrained", str(tmp_path))
    np.testing.assert_array_equal(answers(loaded, "last_hidden_state"), answers(model, "last_hidden_state"))


@requirement("IDEFICS3-MODEL-030", "IDEFICS3-LM-017")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_bfloat16_model_comes_back_with_equal_weights(idefics3: Idefics3Objects, tmp_path: Path, tied: bool) -> None:
    bfloat16 = idefics3.library.get("torch:bfloat16")
    saved(idefics3.new_model(tie_word_embeddings=tied), tmp_path / "first")
    half = idefics3.call(f"{MODEL}.from_pretrained", str(tmp_path / "first"), torch_dtype=bfloat16)
    saved(half, tmp_path / "second", max_shard_size="100KB")
    stored = json.loads((tmp_path / "second" / "config.json").read_text("utf-8"))
    assert stored.get("torch_dtype", stored.get("dtype")) == "bfloat16", "config.json does not name the stored dtype"
    again = idefics3.call(f"{MODEL}.from_pretrained", str(tmp_path / "second"), torch_dtype=bfloat16)
    before, after = half.call("state_dict").mapping(), again.call("state_dict").mapping()
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    widened = idefics3.call(f"{MODEL}.from_pretrained", str(tmp_path / "second"), torch_dtype="float32")
    np.testing.assert_array_equal(widened.call("state_dict").mapping()["lm_head.weight"], before["lm_head.weight"])
    assert np.isfinite(answers(widened)).all()


@requirement("IDEFICS3-LM-017")
def test_torch_dtype_decides_the_dtype_of_the_weights(idefics3: Idefics3Objects) -> None:
    bfloat16 = idefics3.library.get("torch:bfloat16")
    loaded = idefics3.call(f"{MODEL}.from_pretrained", str(idefics3.checkpoint), torch_dtype=bfloat16)
    kinds = {
        name: idefics3.library.call("builtins:str", loaded.get(f"{name}.dtype"))
        for name in ("lm_head.weight", "model.text_model.layers.0.self_attn.q_proj.weight")
    }
    assert set(kinds.values()) == {"torch.bfloat16"}, kinds
    wide = idefics3.library.call("builtins:str", idefics3.model.get("lm_head.weight.dtype"))
    assert wide == "torch.float32", "a bfloat16 checkpoint loaded with torch_dtype='float32'"
