"""Idefics' configurations: documented fields, both layouts of config.json, what fields do, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_idefics_model import RESAMPLER, VISION, batch, opened, settings
from transformers.models.idefics import configuration_idefics

import vlmqual_impl
from vlmqual_impl.api.idefics import IdeficsForVisionText2Text
from vlmqual_impl.configs import (
    ConfigError,
    IdeficsConfig,
    IdeficsPerceiverConfig,
    IdeficsVisionConfig,
    PretrainedConfig,
    config_for,
)

NEWER = int(transformers.__version__.split(".")[0]) >= 5
#: The documented fields in their order, with the documented default and another value.
FIELDS: dict[str, tuple[Any, Any]] = {
    "vocab_size": (32000, 600),
    "additional_vocab_size": (0, 2),
    "hidden_size": (4096, 64),
    "intermediate_size": (11008, 96),
    "num_hidden_layers": (32, 6),
    "num_attention_heads": (32, 8),
    "dropout": (0.0, 0.25),
    "hidden_act": ("silu", "gelu"),
    "initializer_range": (0.02, 0.5),
    "alpha_initializer": ("zeros", "normal"),
    "alphas_initializer_range": (0.0, 0.125),
    "alpha_type": ("float", "vector"),
    "rms_norm_eps": (1e-6, 1e-3),
    "use_cache": (True, False),
    "pad_token_id": (0, 5),
    "bos_token_id": (1, 6),
    "eos_token_id": (2, 7),
    "tie_word_embeddings": (False, True),
    "cross_layer_interval": (1, 3),
    "qk_layer_norms": (False, True),
    "freeze_text_layers": (True, False),
    "freeze_text_module_exceptions": ([], ["Linear"]),
    "freeze_lm_head": (False, True),
    "freeze_vision_layers": (True, False),
    "freeze_vision_module_exceptions": ([], ["LayerNorm", "Embedding"]),
    "use_resampler": (False, True),
    "vision_config": (None, None),
    "perceiver_config": (None, None),
}
CHANGED = {name: other for name, (_, other) in FIELDS.items() if other is not None}
#: Fields of the parts, which the documents do not list, with another value than transformers' default.
PARTS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "embed_dim": 48,
        "image_size": 56,
        "intermediate_size": 80,
        "patch_size": 7,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_channels": 1,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-3,
        "attention_dropout": 0.5,
        "initializer_range": 0.125,
        "initializer_factor": 2.0,
    },
    "perceiver_config": {
        "use_resampler": True,
        "resampler_n_latents": 5,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 6,
        "qk_layer_norms_perceiver": True,
    },
}
THEIRS = {
    "vision_config": configuration_idefics.IdeficsVisionConfig,
    "perceiver_config": configuration_idefics.IdeficsPerceiverConfig,
}
OURS: dict[str, type[PretrainedConfig]] = {
    "vision_config": IdeficsVisionConfig,
    "perceiver_config": IdeficsPerceiverConfig,
}


def assert_changed(config: Any) -> None:
    """Every field has the value of `CHANGED` and `PARTS`; of transformers' objects as well."""
    found = {name: getattr(config, name) for name in CHANGED}
    lists = {name: list(value) for name, value in found.items() if isinstance(value, tuple)}  # as 5.x has them
    assert {**found, **lists} == CHANGED
    for part, values in PARTS.items():
        assert {name: getattr(getattr(config, part), name) for name in values} == values


# ---------------------------------------------------------------------------------------------------------- defaults


def test_the_documented_fields_come_in_their_order_with_their_defaults() -> None:
    parameters = list(inspect.signature(IdeficsConfig).parameters.values())
    assert [(p.name, p.default) for p in parameters[:-1]] == [(name, value[0]) for name, value in FIELDS.items()]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    config = IdeficsConfig()
    assert {name: getattr(config, name) for name in CHANGED} == {name: FIELDS[name][0] for name in CHANGED}
    assert (config.vision_config, config.perceiver_config) == (IdeficsVisionConfig(), IdeficsPerceiverConfig())
    config = IdeficsConfig(123, 4, 64)
    assert (config.vocab_size, config.additional_vocab_size, config.hidden_size) == (123, 4, 64)


@pytest.mark.parametrize("part", PARTS)
def test_the_parts_have_the_fields_and_defaults_of_transformers(part: str) -> None:
    mine, other = OURS[part](), THEIRS[part]()
    names = list(inspect.signature(OURS[part]).parameters)[:-1]
    assert names == list(PARTS[part])
    if NEWER:
        added = {item.name for item in dataclasses.fields(other)} - {
            item.name for item in dataclasses.fields(transformers.PretrainedConfig)
        }
        assert set(names) == added - {"model_type"}
    else:
        assert names == list(inspect.signature(THEIRS[part]).parameters)[:-1]
    for name, changed in PARTS[part].items():
        assert getattr(mine, name) == getattr(other, name), name
        assert getattr(mine, name) != changed, f"{name} is to be changed by these tests"


def test_a_default_list_is_not_shared_and_a_given_one_is_copied() -> None:
    first, second = IdeficsConfig(), IdeficsConfig()
    assert first.freeze_text_module_exceptions is not second.freeze_text_module_exceptions
    given = ["Linear"]
    config = IdeficsConfig(freeze_text_module_exceptions=given, freeze_vision_module_exceptions=("Embedding",))
    given.append("LayerNorm")
    assert config.freeze_text_module_exceptions == ["Linear"]
    assert config.freeze_vision_module_exceptions == ["Embedding"], "5.x has tuples"


def test_the_classes_are_in_the_root_and_frozen() -> None:
    for kind in (IdeficsConfig, IdeficsVisionConfig, IdeficsPerceiverConfig):
        assert getattr(vlmqual_impl, kind.__name__) is kind
        assert kind.__name__ in vlmqual_impl.__all__
        assert issubclass(kind, PretrainedConfig)
        assert kind.model_type == "idefics"
    config = IdeficsConfig()
    with pytest.raises(AttributeError, match="IdeficsConfig is frozen"):
        config.dropout = 0.5
    assert config.replace(dropout=0.5).dropout == 0.5
    assert config_for({"model_type": "idefics", "vocab_size": 77}) == IdeficsConfig(vocab_size=77)


# ------------------------------------------------------------------------------------------------- parts and synonyms


def test_a_part_may_be_an_object_a_mapping_or_nothing() -> None:
    vision, perceiver = IdeficsVisionConfig(image_size=42), IdeficsPerceiverConfig(resampler_n_latents=9)
    config = IdeficsConfig(vision_config=vision, perceiver_config=perceiver)
    assert config.vision_config is vision
    assert config.perceiver_config is perceiver
    same = IdeficsConfig(vision_config={"image_size": 42}, perceiver_config={"resampler_n_latents": 9})
    assert (type(same.vision_config), type(same.perceiver_config)) == (IdeficsVisionConfig, IdeficsPerceiverConfig)
    assert same == config
    assert same.vision_config.embed_dim == 768, "what a mapping does not say has its default"


def test_the_width_of_the_tower_has_two_names_and_one_is_stored() -> None:
    for name in ("embed_dim", "hidden_size"):
        vision = IdeficsVisionConfig(**{name: 48})
        assert (vision.embed_dim, vision.hidden_size) == (48, 48)
        assert vision.replace(image_size=56).embed_dim == 48
        assert IdeficsConfig(vision_config={name: 48}).vision_config == vision
    assert "hidden_size" not in IdeficsVisionConfig().to_dict(), "as every version writes it"
    assert THEIRS["vision_config"](embed_dim=48).hidden_size == 48, "transformers has the synonym as well"


def test_names_of_other_versions_are_read() -> None:
    assert IdeficsConfig(dtype="bfloat16").torch_dtype == IdeficsConfig(torch_dtype=torch.bfloat16).torch_dtype
    assert IdeficsConfig(torch_dtype="bfloat16").torch_dtype == "bfloat16"
    assert not IdeficsConfig(return_dict=False).use_return_dict
    rotary = IdeficsConfig(max_position_embeddings=4, rope_parameters={"rope_theta": 10000.0})
    assert (rotary.max_position_embeddings, rotary.rope_parameters, rotary.unknown()) == (4, {"rope_theta": 1e4}, ())
    assert not {"max_position_embeddings", "rope_parameters"} & set(rotary.to_dict()), "4.46.3 does not write them"
    for kind in ("idefics", "idefics_vision", "clip_vision_model"):
        assert IdeficsVisionConfig(model_type=kind).model_type == "idefics"
    for kind in ("idefics", "idefics_perciever"):
        assert IdeficsPerceiverConfig(model_type=kind).model_type == "idefics"


def test_unknown_fields_are_kept_and_reported() -> None:
    config = IdeficsConfig(foo_bar=7, vision_config={"image_num_channels": 3}, max_length=20)
    assert (config.foo_bar, config.unknown(), config.max_length) == (7, ("foo_bar",), 20)
    assert config.vision_config.unknown() == ("image_num_channels",)
    assert IdeficsConfig.from_dict(config.to_dict()).foo_bar == 7


# ------------------------------------------------------------------------------------------------------------- files


def test_every_field_survives_files_of_ours_and_of_transformers(tmp_path: Path) -> None:
    config = IdeficsConfig(**CHANGED, **PARTS)
    assert_changed(config)
    config.save_pretrained(tmp_path / "ours")
    assert IdeficsConfig.from_pretrained(tmp_path / "ours") == config
    theirs = transformers.IdeficsConfig.from_pretrained(tmp_path / "ours")
    assert_changed(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text("utf-8"))
    again = config_for(written)
    assert isinstance(again, IdeficsConfig)
    assert_changed(again)
    assert not again.unknown() + again.vision_config.unknown() + again.perceiver_config.unknown()
    for place in ("ours", "theirs"):  # the parts of a composite file
        assert IdeficsVisionConfig.from_pretrained(tmp_path / place) == config.vision_config
        assert IdeficsPerceiverConfig.from_pretrained(tmp_path / place) == config.perceiver_config
    assert IdeficsConfig.from_pretrained(tmp_path / "ours", dropout=0.5).dropout == 0.5


def test_a_file_that_says_nothing_about_the_parts_gives_their_defaults() -> None:
    # 4.46.3 leaves out of the parts what has its default value.
    layout = {"model_type": "idefics", "perceiver_config": {"model_type": "idefics"}}
    config = IdeficsConfig.from_dict({**layout, "vision_config": {"embed_dim": 48, "model_type": "idefics"}})
    assert config == IdeficsConfig(vision_config={"embed_dim": 48})


# ---------------------------------------------------------------------------------------------------- what fields do


def names(**changes: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig(**settings(**changes)))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_default_sizes_are_those_of_transformers() -> None:
    fewer: dict[str, Any] = {"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 1}, "use_resampler": True}
    with torch.device("meta"):
        mine = IdeficsForVisionText2Text(IdeficsConfig(**fewer))
        other = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**fewer))
    shapes = [
        {key: tuple(value.shape) for key, value in model.state_dict().items() if "inv_freq" not in key}
        for model in (mine, other)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("interval", "blocks"), [(1, 4), (2, 2), (4, 1)])
def test_the_interval_says_how_many_cross_attention_blocks_there_are(interval: int, blocks: int) -> None:
    found = {name.split(".")[2] for name in names(cross_layer_interval=interval) if "gated_cross_attn_layers" in name}
    assert found == {str(index) for index in range(blocks)}


def test_switches_add_norms_of_heads_where_they_belong() -> None:
    def normed(**changes: Any) -> set[str]:
        found = (name.split(".") for name in names(use_resampler=True, **changes) if "_layer_norm.weight" in name)
        return {f"{name[1]}.{name[-2]}" for name in found if name[-2] in ("q_layer_norm", "k_layer_norm")}

    perceiver = {**RESAMPLER, "qk_layer_norms_perceiver": True}
    text = {"gated_cross_attn_layers.q_layer_norm", "gated_cross_attn_layers.k_layer_norm"}
    images = {"perceiver_resampler.q_layer_norm", "perceiver_resampler.k_layer_norm"}
    assert normed() == set()
    assert normed(qk_layer_norms=True) == text
    assert normed(perceiver_config=perceiver) == images
    assert normed(qk_layer_norms=True, perceiver_config=perceiver) == text | images


def test_the_resampler_is_there_when_the_composite_says_so() -> None:
    inner = {**RESAMPLER, "use_resampler": True}
    assert not [name for name in names(perceiver_config=inner) if "perceiver" in name], "the part's own switch is inert"
    shapes = names(use_resampler=True)
    assert shapes["model.perceiver_resampler.latents"] == (3, 24)
    assert shapes["model.perceiver_resampler.blocks.1.0.q_proj.weight"] == (20, 24)
    assert names() == names(perceiver_config={**RESAMPLER, "resampler_n_latents": 7}), "no resampler, no latents"


def logits(**changes: Any) -> torch.Tensor:
    model = IdeficsForVisionText2Text(IdeficsConfig(**settings(**changes)))
    opened(model)
    with torch.no_grad():
        found: torch.Tensor = model.double().eval()(**batch()).logits
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu"},
        {"rms_norm_eps": 0.1},
        {"vision_config": {**VISION, "hidden_act": "relu"}},
        {"vision_config": {**VISION, "layer_norm_eps": 0.1}},
        {"num_attention_heads": 8},
        {"vision_config": {**VISION, "num_attention_heads": 2}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_fields_that_change_no_tensor_change_the_result(changes: dict[str, Any]) -> None:
    assert names(**changes) == names()
    assert not torch.allclose(logits(**changes), logits())


def test_inert_fields_change_nothing() -> None:
    def made(**changes: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return IdeficsForVisionText2Text(IdeficsConfig(**settings(**changes))).state_dict()

    inert: dict[str, Any] = {
        "vision_config": {**VISION, "initializer_range": 0.5, "initializer_factor": 3.0},
        "perceiver_config": {**RESAMPLER, "use_resampler": True},
        "max_position_embeddings": 4,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "alphas_initializer_range": 0.5,  # gates start at 0
    }
    before, after = made(), made(**inert)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set()
    assert torch.equal(logits(**inert), logits())


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IdeficsConfig(vocab_size=0), "idefics.vocab_size is 0; it has to be a positive integer"),
        (lambda: IdeficsConfig(additional_vocab_size=-1), "additional_vocab_size is -1; it has to be a number of at "),
        (lambda: IdeficsConfig(hidden_size=100), "hidden_size is 100; it does not divide by num_attention_heads 32"),
        (lambda: IdeficsConfig(hidden_size=96), "rotary embedding needs 32 heads of even width"),
        (lambda: IdeficsConfig(intermediate_size="9"), "intermediate_size is '9'; it has to be a positive integer"),
        (lambda: IdeficsConfig(dropout=1.5), "dropout is 1.5; it is a probability, at most 1"),
        (lambda: IdeficsConfig(dropout=-0.5), "dropout is -0.5; it has to be a number of at least 0"),
        (lambda: IdeficsConfig(hidden_act="tanh"), "hidden_act is 'tanh'; known activations are gelu"),
        (lambda: IdeficsConfig(initializer_range=None), "initializer_range is None; it has to be a number"),
        (lambda: IdeficsConfig(alpha_initializer="uniform"), "alpha_initializer is 'uniform'; valid are zeros, ones,"),
        (lambda: IdeficsConfig(alphas_initializer_range=-1), "alphas_initializer_range is -1; it has to be a number"),
        (lambda: IdeficsConfig(alpha_type="matrix"), "alpha_type is 'matrix'; valid are float, vector"),
        (lambda: IdeficsConfig(rms_norm_eps="x"), "rms_norm_eps is 'x'; it has to be a number"),
        (lambda: IdeficsConfig(use_cache="no"), "use_cache is 'no'; it has to be true or false"),
        (lambda: IdeficsConfig(tie_word_embeddings=1), "tie_word_embeddings is 1; it has to be true or false"),
        (lambda: IdeficsConfig(cross_layer_interval=3), "cross_layer_interval is 3; num_hidden_layers 32 does not div"),
        (lambda: IdeficsConfig(cross_layer_interval=0), "cross_layer_interval is 0; it has to be a positive integer"),
        (lambda: IdeficsConfig(qk_layer_norms="false"), "qk_layer_norms is 'false'; it has to be true or false"),
        (lambda: IdeficsConfig(use_resampler=None), "use_resampler is None; it has to be true or false"),
        (lambda: IdeficsConfig(freeze_text_layers=0), "freeze_text_layers is 0; it has to be true or false"),
        (lambda: IdeficsConfig(freeze_lm_head="x"), "freeze_lm_head is 'x'; it has to be true or false"),
        (lambda: IdeficsConfig(freeze_vision_layers=[]), r"freeze_vision_layers is \[\]; it has to be true or false"),
        # The documents call these bool (IDEFICS-CFG-049).
        (
            lambda: IdeficsConfig(freeze_text_module_exceptions=False),
            "freeze_text_module_exceptions is False; it has to be a list of some of LayerNorm, Linear, Embedding",
        ),
        (
            lambda: IdeficsConfig(freeze_vision_module_exceptions=["Conv2d"]),
            r"freeze_vision_module_exceptions is \['Conv2d'\]; it has to be a list of some of LayerNorm",
        ),
        (lambda: IdeficsConfig(rope_parameters="x"), "rope_parameters is 'x'; it has to be a mapping"),
        (lambda: IdeficsConfig(rope_parameters={"rope_theta": 5e5}), "rotary embedding is fixed to 10000"),
        (lambda: IdeficsConfig(model_type="mllama"), "model_type is 'mllama'; IdeficsConfig reads 'idefics'"),
        (lambda: IdeficsConfig(vision_config=7), "vision_config is a int; expected IdeficsVisionConfig"),
        (lambda: IdeficsConfig(perceiver_config="x"), "perceiver_config is a str; expected IdeficsPerceiverConfig"),
        (lambda: IdeficsConfig(perceiver_config=IdeficsVisionConfig()), "perceiver_config is a IdeficsVisionConfig"),
        (lambda: IdeficsVisionConfig(embed_dim=50), "vision_config.embed_dim is 50; it does not divide by num_atten"),
        (lambda: IdeficsVisionConfig(hidden_act="tanh"), "vision_config.hidden_act is 'tanh'; known activations are"),
        (lambda: IdeficsVisionConfig(patch_size=900), "patch_size is 900; it is larger than image_size 224"),
        (lambda: IdeficsVisionConfig(num_channels=0), "num_channels is 0; it has to be a positive integer"),
        (lambda: IdeficsVisionConfig(attention_dropout=2), "attention_dropout is 2; it is a probability"),
        (lambda: IdeficsVisionConfig(model_type="vit"), "vision_config.model_type is 'vit'; IdeficsVisionConfig reads"),
        (lambda: IdeficsPerceiverConfig(resampler_depth=0), "perceiver_config.resampler_depth is 0; it has to be a po"),
        (lambda: IdeficsPerceiverConfig(qk_layer_norms_perceiver=2), "qk_layer_norms_perceiver is 2; it has to be tr"),
        (lambda: IdeficsPerceiverConfig(model_type="x"), "perceiver_config.model_type is 'x'; IdeficsPerceiverConfig"),
    ],
)
def test_values_that_do_not_fit_are_named(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
