"""Configurations: documented defaults, both layouts of config.json, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from vlmqual_impl.configs import (
    ConfigError,
    Idefics3Config,
    Idefics3VisionConfig,
    LlamaConfig,
    PretrainedConfig,
    config_for,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

# What the two versions write for one model, shortened to what differs.
LAYOUT_4 = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": 300,
    "model_type": "idefics3",
    "scale_factor": 2,
    "text_config": {
        "hidden_size": 32,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 7,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "num_beams": 1,
        "vocab_size": 320,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "vision_config": {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "model_type": "idefics3",
        "tie_word_embeddings": True,
    },
}
LAYOUT_5 = {
    "_pad_token_id": 9,
    "dtype": "bfloat16",
    "image_token_id": 300,
    "model_type": "idefics3",
    "scale_factor": 2,
    "text_config": {
        "hidden_size": 32,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 7,
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
        "vocab_size": 320,
    },
    "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 16, "num_attention_heads": 4, "model_type": "idefics3_vision"},
}


def test_default_composite_has_the_documented_values() -> None:
    config = Idefics3Config()
    wanted = {
        "use_cache": True,
        "image_token_id": 128257,
        "tie_word_embeddings": False,
        "scale_factor": 2,
        "pad_token_id": 128002,
    }
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert config.text_config.pad_token_id == 128002, "the padding id does not reach the default text configuration"
    assert type(config.vision_config).__name__ == "Idefics3VisionConfig"
    assert type(config.text_config).__name__ == "LlamaConfig"
    assert not hasattr(config, "vocab_size"), "the composite has no vocab_size, the text configuration has"


def test_default_parts_have_the_values_of_the_documented_version() -> None:
    vision, text = Idefics3VisionConfig(), LlamaConfig()
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1152, 3072, 12)
    assert (vision.num_attention_heads, vision.num_channels, vision.image_size, vision.patch_size) == (16, 3, 224, 32)
    assert (vision.hidden_act, vision.layer_norm_eps, vision.initializer_range) == ("gelu_pytorch_tanh", 1e-6, 0.02)
    assert (text.vocab_size, text.hidden_size, text.intermediate_size) == (32000, 4096, 11008)
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (32, 32, 32)
    assert (text.head_dim, text.rms_norm_eps, text.rope_theta, text.rope_scaling) == (128, 1e-6, 10000.0, None)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, None)
    assert Idefics3Config().text_config.rms_norm_eps == 1e-5, "the default text part has an epsilon of its own"
    assert Idefics3Config().tokens_per_frame == 12, "224/32 with scale 2 gives int(49 / 4)"


def test_arguments_can_be_given_by_position_in_the_documented_order() -> None:
    config = Idefics3Config(False, 5, True, {"image_size": 56, "patch_size": 14}, {"hidden_size": 64}, 4, 7)
    assert (config.use_cache, config.image_token_id, config.tie_word_embeddings) == (False, 5, True)
    assert (config.vision_config.image_size, config.text_config.hidden_size) == (56, 64)
    assert (config.scale_factor, config.pad_token_id) == (4, 7)


@pytest.mark.parametrize(("layout", "pad"), [(LAYOUT_4, 128002), (LAYOUT_5, 9)], ids=["4.46", "5.x"])
def test_both_layouts_of_config_json_are_read(layout: dict[str, Any], pad: int) -> None:
    config = Idefics3Config.from_dict(layout)
    assert config.text_config.rope_theta == 500000.0
    assert config.text_config.rope() == LLAMA3
    assert config.torch_dtype == "bfloat16"
    assert config.pad_token_id == pad
    assert config.text_config.pad_token_id == 7
    assert config.unknown() == config.text_config.unknown() == config.vision_config.unknown() == ()


def test_a_written_config_is_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    config = Idefics3Config.from_dict(LAYOUT_5)
    config.save_pretrained(tmp_path)
    assert Idefics3Config.from_pretrained(tmp_path) == config
    theirs = transformers.Idefics3Config.from_pretrained(tmp_path)
    assert theirs.text_config.rope_parameters == {**LLAMA3, "rope_theta": 500000.0}
    assert theirs.text_config.num_key_value_heads == 2
    assert theirs.vision_config.hidden_size == 16
    assert theirs.image_token_id == 300
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["rope_theta"] == 500000.0, "4.46 reads the base from rope_theta"
    assert written["text_config"]["rope_scaling"] == LLAMA3, "4.46 reads the scaling from rope_scaling"
    assert written["torch_dtype"] == "bfloat16"


def test_a_part_is_read_from_a_composite_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LAYOUT_4))
    assert Idefics3VisionConfig.from_pretrained(tmp_path).hidden_size == 16
    assert LlamaConfig.from_pretrained(tmp_path).vocab_size == 320


def test_unknown_keys_are_kept_and_reported_but_bookkeeping_is_not() -> None:
    config = Idefics3Config(foo=1, num_beams=4)
    assert isinstance(config, PretrainedConfig)
    assert config.foo == 1
    assert config.unknown() == ("foo",)
    assert config.to_dict()["foo"] == 1


def test_a_configuration_is_frozen_and_replace_gives_a_changed_copy() -> None:
    config = Idefics3Config()
    with pytest.raises(AttributeError, match="frozen"):
        config.scale_factor = 4
    with pytest.raises(AttributeError, match="frozen"):
        del config.scale_factor
    assert config.replace(scale_factor=4).scale_factor == 4
    assert config.scale_factor == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Idefics3Config.from_dict({"model_type": "idefics2"}), ["'idefics2'", "'idefics3'"]),
        (lambda: config_for({"model_type": "smolvlm"}), ["'smolvlm'", "idefics3"]),
        (lambda: Idefics3Config(text_config={"model_type": "mistral"}), ["text_config.model_type", "'mistral'"]),
        (lambda: Idefics3VisionConfig(model_type="siglip"), ["vision_config.model_type", "'siglip'"]),
        (lambda: LlamaConfig(hidden_act="swish7"), ["hidden_act", "'swish7'", "silu"]),
        (lambda: LlamaConfig(rope_scaling={"rope_type": "yarn"}), ["rope_scaling", "yarn", "llama3"]),
        (lambda: LlamaConfig(rope_scaling={"type": "llama3", "factor": 2.0}), ["low_freq_factor"]),
        (lambda: LlamaConfig(num_attention_heads=6, num_key_value_heads=4), ["num_attention_heads", "6", "4"]),
        (lambda: LlamaConfig(vocab_size=0), ["vocab_size", "0", "positive"]),
        (lambda: Idefics3VisionConfig(hidden_size=10, num_attention_heads=4), ["hidden_size", "10", "4"]),
        (lambda: Idefics3Config(vision_config=3), ["vision_config", "int", "Idefics3VisionConfig"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value), f"the message does not say {word!r}: {caught.value}"


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not a JSON file"), ("[]", "expected an object"), (None, "no config")]
)
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        Idefics3Config.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
