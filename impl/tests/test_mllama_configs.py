"""Mllama's configurations: documented defaults, both layouts of config.json, refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from vlmqual_impl.configs import ConfigError, MllamaConfig, MllamaTextConfig, MllamaVisionConfig, config_for
from vlmqual_impl.configs.mllama import aspect_ratios

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_what_the_installed_transformers_writes_is_read(tmp_path: Path) -> None:
    vision = {"attention_heads": 8, "hidden_size": 64, "intermediate_layers_indices": [1], "vision_output_dim": 128}
    text = {"hidden_size": 64, "rope_scaling": dict(LLAMA3), "rope_theta": 10000.0, "cross_attention_layers": [2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 5.x would rather have rope_parameters, which it writes
        theirs = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=99)
    theirs.save_pretrained(tmp_path)
    config = config_for(json.loads((tmp_path / "config.json").read_text()))
    assert isinstance(config, MllamaConfig)
    assert (config.image_token_index, config.vision_config.num_attention_heads) == (99, 8)
    assert config.vision_config.intermediate_layers_indices == [1]
    assert config.text_config.cross_attention_layers == [2]
    assert (config.text_config.rope_theta, config.text_config.rope()) == (10000.0, LLAMA3)
    assert not config.unknown() + config.vision_config.unknown() + config.text_config.unknown()


def test_what_is_written_is_read_by_both_layouts(tmp_path: Path) -> None:
    config = MllamaConfig({"hidden_size": 80, "attention_heads": 8}, {"hidden_size": 64, "pad_token_id": 3}, 77)
    config.save_pretrained(tmp_path)
    again = MllamaConfig.from_pretrained(tmp_path)
    assert again == config
    theirs = transformers.MllamaConfig.from_pretrained(tmp_path)
    assert (theirs.image_token_index, theirs.vision_config.attention_heads, theirs.text_config.pad_token_id) == (
        77,
        8,
        3,
    )
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["rope_scaling"] == {"rope_type": "default"}, "4.45.2 cannot read None"
    part = MllamaTextConfig.from_pretrained(tmp_path)
    assert part.hidden_size == 64, "the text part of a composite file"
    assert MllamaVisionConfig.from_pretrained(tmp_path).hidden_size == 80


def test_the_number_of_heads_may_be_given_under_either_name() -> None:
    assert MllamaVisionConfig(num_attention_heads=8).attention_heads == 8
    assert MllamaVisionConfig(attention_heads=8).num_attention_heads == 8
    assert "num_attention_heads" not in MllamaVisionConfig().to_dict(), "one stored name, as every version writes it"


@pytest.mark.parametrize(
    ("tiles", "wanted"),
    [
        (1, [[1, 1]]),
        (2, [[1, 1], [1, 2], [2, 1]]),
        (4, [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]),
        (5, [[1, 1], [1, 2], [1, 3], [1, 4], [1, 5], [2, 1], [2, 2], [3, 1], [4, 1], [5, 1]]),
    ],
)
def test_arrangements_are_counted_up_in_height_first(tiles: int, wanted: list[list[int]]) -> None:
    assert aspect_ratios(tiles) == wanted
    assert MllamaVisionConfig(max_num_tiles=tiles).supported_aspect_ratios == wanted


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MllamaVisionConfig(hidden_size=50), "hidden_size is 50; it does not divide by attention_heads 16"),
        (lambda: MllamaVisionConfig(hidden_act="tanh"), "hidden_act is 'tanh'; known activations are gelu"),
        (lambda: MllamaVisionConfig(patch_size=900), "patch_size is 900; it is larger than image_size 448"),
        (
            lambda: MllamaVisionConfig(supported_aspect_ratios=[[1]]),
            "it has to be a list of \\[tiles high, tiles wide\\]",
        ),
        (lambda: MllamaVisionConfig(max_num_tiles=0), "max_num_tiles is 0; it has to be a positive integer"),
        (
            lambda: MllamaVisionConfig(intermediate_layers_indices=[33]).require_fitting(),
            "intermediate_layers_indices is \\[33\\]; states are 0 to num_hidden_layers 32",
        ),
        (
            lambda: MllamaVisionConfig(vision_output_dim=1280).require_fitting(),
            "vision_output_dim is 1280; hidden_size 1280 and 5 intermediate states make 7680",
        ),
        (lambda: MllamaTextConfig(num_key_value_heads=5), "it does not divide by num_key_value_heads 5"),
        (lambda: MllamaTextConfig(tie_word_embeddings=True), "the embedding has 8 rows more than the head"),
        (lambda: MllamaTextConfig(cross_attention_layers=[-1]), "it has to be a list of layer numbers"),
        (lambda: MllamaTextConfig(rope_scaling={"rope_type": "yarn"}), "its rope_type has to be one of default"),
        (lambda: MllamaTextConfig(head_dim=3), "text_config.head_dim is 3; MllamaTextConfig has no such setting"),
        (lambda: MllamaTextConfig(model_type="llama"), "model_type is 'llama'; MllamaTextConfig reads"),
        (lambda: MllamaVisionConfig(model_type="clip"), "model_type is 'clip'; MllamaVisionConfig reads"),
        (lambda: MllamaConfig(model_type="idefics3"), "model_type is 'idefics3'; MllamaConfig reads 'mllama'"),
        (lambda: MllamaConfig(7), "vision_config is a int; expected MllamaVisionConfig"),
        (lambda: MllamaConfig(None, "x"), "text_config is a str; expected MllamaTextConfig"),
        (
            lambda: MllamaConfig(image_token_index=-2),
            "image_token_index is -2; it has to be a token id, at most 12826",
        ),
    ],
)
def test_values_that_do_not_fit_are_named(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
