"""Idefics' configurations: defaults, signature, parts, files; and what a new model takes from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_models import (
    BASE,
    GENERATING,
    LATENTS,
    LAYERS,
    POSITIONS,
    ROWS,
    SLOTS,
    VISION_WIDTH,
    VOCABULARY,
    IdeficsModels,
    apart,
    idefics_models,
    images,
    result,
    run,
    settings,
    shapes,
    trainable,
    weights,
)
from vlmqual_conformance.suite.library_objects import array
from vlmqual_contract.subject import RemoteLibrary, Tensor

DEFAULTS: list[tuple[str, Any]] = [
    ("vocab_size", 32000),
    ("additional_vocab_size", 0),
    ("hidden_size", 4096),
    ("intermediate_size", 11008),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("dropout", 0.0),
    ("hidden_act", "silu"),
    ("initializer_range", 0.02),
    ("alpha_initializer", "zeros"),
    ("alphas_initializer_range", 0.0),
    ("alpha_type", "float"),
    ("rms_norm_eps", 1e-6),
    ("use_cache", True),
    ("pad_token_id", 0),
    ("bos_token_id", 1),
    ("eos_token_id", 2),
    ("tie_word_embeddings", False),
    ("cross_layer_interval", 1),
    ("qk_layer_norms", False),
    ("freeze_text_layers", True),
    ("freeze_text_module_exceptions", []),
    ("freeze_lm_head", False),
    ("freeze_vision_layers", True),
    ("freeze_vision_module_exceptions", []),
    ("use_resampler", False),
]
#: One changed value for each field.
OTHERS: dict[str, Any] = {
    "vocab_size": 70,
    "additional_vocab_size": 3,
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "dropout": 0.25,
    "hidden_act": "relu",
    "initializer_range": 0.5,
    "alpha_initializer": "normal",
    "alphas_initializer_range": 0.125,
    "alpha_type": "vector",
    "rms_norm_eps": 0.001,
    "use_cache": False,
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": 7,
    "tie_word_embeddings": True,
    "cross_layer_interval": 3,
    "qk_layer_norms": True,
    "freeze_text_layers": False,
    "freeze_text_module_exceptions": ["Linear"],
    "freeze_lm_head": True,
    "freeze_vision_layers": False,
    "freeze_vision_module_exceptions": ["LayerNorm", "Embedding"],
    "use_resampler": False,
    "vision_config.embed_dim": 48,
    "vision_config.image_size": 56,
    "vision_config.intermediate_size": 88,
    "vision_config.patch_size": 7,
    "vision_config.num_hidden_layers": 5,
    "vision_config.num_attention_heads": 6,
    "vision_config.num_channels": 1,
    "vision_config.hidden_act": "quick_gelu",
    "vision_config.layer_norm_eps": 0.25,
    "vision_config.attention_dropout": 0.75,
    "vision_config.initializer_range": 0.625,
    "vision_config.initializer_factor": 2.0,
    "perceiver_config.use_resampler": True,
    "perceiver_config.resampler_n_latents": 9,
    "perceiver_config.resampler_depth": 4,
    "perceiver_config.resampler_n_heads": 2,
    "perceiver_config.resampler_head_dim": 10,
    "perceiver_config.qk_layer_norms_perceiver": True,
}


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsModels:
    """Objects of the library under test."""
    return idefics_models(library)


# the class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, marks=requirement(f"IDEFICS-CFG-{number:03d}"), id=name)
        for number, (name, value) in enumerate(DEFAULTS, start=1)
    ],
)
def test_a_default_of_the_configuration(idefics: IdeficsModels, name: str, value: Any) -> None:
    found = idefics.call("IdeficsConfig").get(name)
    assert found == value
    assert type(found) is type(value), f"{name} is a {type(found).__name__}, not a {type(value).__name__}"


@requirement("IDEFICS-CFG-027", "IDEFICS-CFG-028")
@pytest.mark.parametrize(
    ("name", "kind"), [("vision_config", "IdeficsVisionConfig"), ("perceiver_config", "IdeficsPerceiverConfig")]
)
def test_a_part_that_is_not_given_is_a_default_one(idefics: IdeficsModels, name: str, kind: str) -> None:
    assert idefics.call("IdeficsConfig").type_of(name)[0] == kind
    assert idefics.call("IdeficsConfig", **{name: None}).type_of(name)[0] == kind


@requirement("IDEFICS-CFG-029")
def test_parameters_of_the_configuration(idefics: IdeficsModels) -> None:
    parameters = idefics.library.signature("IdeficsConfig")
    named = [item.name for item in parameters if not item.kind.startswith("VAR_")]
    assert named == [*(name for name, _ in DEFAULTS), "vision_config", "perceiver_config"]
    assert any(item.kind == "VAR_KEYWORD" for item in parameters)
    config = idefics.call("IdeficsConfig", 123, 4, 64)
    assert [config.get(name) for name, _ in DEFAULTS[:3]] == [123, 4, 64]


@requirement("IDEFICS-CFG-030", "IDEFICS-CFG-031")
def test_the_configuration_is_a_pretrained_configuration_that_keeps_unknown_values(idefics: IdeficsModels) -> None:
    assert {"PretrainedConfig", "PreTrainedConfig"} & set(idefics.library.type_of("IdeficsConfig"))
    assert idefics.call("IdeficsConfig", colour="blue").get("colour") == "blue"


@requirement("IDEFICS-CFG-032", "IDEFICS-CFG-033")
@pytest.mark.parametrize(
    ("part", "name", "value", "kept"),
    [
        ("vision_config", "image_size", 56, ("patch_size", 14)),
        ("perceiver_config", "resampler_n_latents", 9, ("resampler_depth", 6)),
    ],
)
def test_a_part_may_be_a_mapping(
    idefics: IdeficsModels, part: str, name: str, value: int, kept: tuple[str, int]
) -> None:
    config = idefics.call("IdeficsConfig", **{part: {name: value}})
    assert config.get(f"{part}.{name}") == value
    assert config.get(f"{part}.{kept[0]}") == kept[1], "what is not given keeps its default"


@requirement("IDEFICS-CFG-034")
def test_a_vision_configuration_is_stored_as_it_is(idefics: IdeficsModels) -> None:
    vision = idefics.call("IdeficsConfig", vision_config={"image_size": 42}).get("vision_config")
    config = idefics.call("IdeficsConfig", vision_config=vision)
    assert idefics.library.call("operator:is_", config.get("vision_config"), vision) is True
    assert config.get("vision_config.image_size") == 42


@requirement("IDEFICS-CFG-035")
def test_a_configuration_comes_back_from_its_file(idefics: IdeficsModels, tmp_path: Path) -> None:
    assert set(OTHERS) == {
        f"{key}.{name}" if isinstance(value, dict) else key
        for key, value in settings().items()
        for name in (value if isinstance(value, dict) else [key])
    }
    made = idefics.new_config(**OTHERS)
    made.call("save_pretrained", str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["model_type"] == "idefics"
    loaded = idefics.call("IdeficsConfig.from_pretrained", str(tmp_path))
    assert {name: loaded.get(name) for name in OTHERS} == OTHERS
    assert {name: made.get(name) for name in OTHERS} == OTHERS


@requirement("IDEFICS-CFG-037")
@pytest.mark.parametrize("name", ["IdeficsConfig", BASE, GENERATING, "IdeficsImageProcessor", "IdeficsProcessor"])
def test_a_documented_class_is_in_the_package_root(idefics: IdeficsModels, name: str) -> None:
    assert idefics.library.exists(name), f"{idefics.library.name} has no {name}"


@requirement("IDEFICS-CFG-049")
@pytest.mark.parametrize("name", ["freeze_text_module_exceptions", "freeze_vision_module_exceptions"])
def test_exceptions_are_a_sequence_of_names_and_no_bool(idefics: IdeficsModels, name: str) -> None:
    assert list(idefics.call("IdeficsConfig").get(name)) == []
    assert list(idefics.new_config(**{name: ["LayerNorm", "Linear"]}).get(name)) == ["LayerNorm", "Linear"]


# what a new model takes from it -------------------------------------------------------------------------------------


@requirement("IDEFICS-CFG-036")
def test_a_model_is_built_from_a_configuration_and_keeps_it(idefics: IdeficsModels) -> None:
    config = idefics.new_config()
    model = idefics.call(BASE, config)
    kept = model.get("config")
    assert {name: kept.get(name) for name in OTHERS} == {name: config.get(name) for name in OTHERS}
    assert np.isfinite(result(model)).all()


@requirement("IDEFICS-CFG-040")
def test_additional_ids_follow_the_others_and_stay_trainable(idefics: IdeficsModels) -> None:
    model = idefics.model
    made = weights(model)
    assert made["model.embed_tokens.additional_embedding.weight"].shape[0] == 2
    table = model.call("get_input_embeddings")
    ids = np.array([[VOCABULARY - 1, VOCABULARY, VOCABULARY + 1]], np.int64)
    found = table.call("", Tensor(ids))
    np.testing.assert_array_equal(found[0, 0], made["model.embed_tokens.weight"][-1])
    np.testing.assert_array_equal(found[0, 1:], made["model.embed_tokens.additional_embedding.weight"])
    kept = trainable(model)
    assert "model.embed_tokens.additional_embedding.weight" in kept
    assert "model.embed_tokens.weight" not in kept, "text layers are frozen, so the main table is"


@requirement("IDEFICS-CFG-041")
def test_a_new_models_closed_gates_hide_the_images(idefics: IdeficsModels) -> None:
    for initializer in ("zeros", "ones"):
        model = idefics.new_model(alpha_initializer=initializer, initializer_range=0.3)
        one, other = result(model), result(model, **images(seed=1))
        if initializer == "zeros":
            np.testing.assert_array_equal(one, other)
        else:
            assert apart(one, other), "open gates show no image either"


@requirement("IDEFICS-CFG-044")
@pytest.mark.parametrize("initializer", ["normal", "gaussian", "random"])
def test_scalar_gates_can_be_random(idefics: IdeficsModels, initializer: str) -> None:
    changes: dict[str, Any] = {"alpha_initializer": initializer, "alphas_initializer_range": 0.5}
    made = weights(idefics.new_model(alpha_type="float", cross_layer_interval=1, **changes))
    gates = [value for name, value in made.items() if "alpha_" in name]
    assert [gate.shape for gate in gates] == [(1,)] * (2 * LAYERS)
    assert len({float(gate[0]) for gate in gates}) == 2 * LAYERS, "the gates are not drawn one by one"


@requirement("IDEFICS-CFG-053")
@pytest.mark.parametrize(("resampler", "length"), [(True, LATENTS), (False, POSITIONS)])
def test_the_resampler_gives_a_fixed_number_of_features_for_each_image(
    idefics: IdeficsModels, resampler: bool, length: int
) -> None:
    model = idefics.model if resampler else idefics.plain
    changes = {} if resampler else {"input_ids": np.full((2, 7), 5)}
    assert array(run(model, **changes), "image_hidden_states").shape == (ROWS, SLOTS, length, VISION_WIDTH)


@requirement("IDEFICS-CFG-055")
def test_the_decoder_has_as_many_layers_as_configured(idefics: IdeficsModels) -> None:
    names = {name.split(".")[2] for name in shapes(idefics.model) if name.startswith("model.layers.")}
    assert names == {str(index) for index in range(LAYERS)}
    kinds = {idefics.model.type_of(f"model.layers.{index}")[0] for index in range(LAYERS)}
    assert kinds == {"IdeficsDecoderLayer"}
