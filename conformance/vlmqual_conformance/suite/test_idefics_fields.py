"""Every field of Idefics' configurations: what it changes in a model with given weights, or that it changes nothing.

What a model has to be is computed from the written rules in `idefics_reference`: names and shapes of all parameters,
and logits in float64. Fields of new models and of training are in `test_idefics_training`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_models import (
    BASE,
    REAL,
    IdeficsModels,
    apart,
    close,
    idefics_models,
    images,
    inputs,
    result,
    run,
    settings,
    shapes,
)
from vlmqual_conformance.suite.idefics_reference import Reference, parameter_shapes
from vlmqual_conformance.suite.library_objects import array, error_of
from vlmqual_contract.subject import RemoteLibrary

V, P = "vision_config.", "perceiver_config."


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsModels:
    """Objects of the library under test."""
    return idefics_models(library)


def case(*ids: str, **changes: Any) -> Any:
    """One row of a table: changed fields, and what they are tested for."""
    label = "-".join(f"{key.replace('_config', '')}={value}" for key, value in changes.items())
    return pytest.param(changes, marks=requirement(*(f"IDEFICS-{item}" for item in ids)), id=label)


#: Fields that change which parameters there are, or their shapes.
SHAPES = [
    case("FIELD-001", vocab_size=100),
    case("FIELD-002", vocab_size=92, additional_vocab_size=0),
    case("FIELD-002", additional_vocab_size=5),
    case("FIELD-003", hidden_size=64),
    case("FIELD-004", intermediate_size=56),
    case("FIELD-005", num_hidden_layers=2),
    case("FIELD-012", "CFG-042", alpha_type="vector"),
    case("FIELD-019", "CFG-045", cross_layer_interval=1),
    case("FIELD-019", "CFG-045", cross_layer_interval=4),
    case("FIELD-020", "CFG-046", qk_layer_norms=True),
    case("FIELD-026", "CFG-053", use_resampler=False),
    case("FIELD-027", **{V + "embed_dim": 32, V + "patch_size": 7, V + "num_hidden_layers": 1}),
    case("FIELD-028", **{P + "resampler_n_latents": 4, P + "resampler_depth": 1, P + "resampler_head_dim": 3}),
    case("FIELD-029", **{V + "embed_dim": 48}),
    case("FIELD-030", **{V + "image_size": 42}),
    case("FIELD-031", **{V + "intermediate_size": 56}),
    case("FIELD-032", **{V + "patch_size": 7}),
    case("FIELD-033", **{V + "num_hidden_layers": 3}),
    case("FIELD-035", **{V + "num_channels": 1}),
    case("FIELD-042", **{P + "resampler_n_latents": 5}),
    case("FIELD-043", **{P + "resampler_depth": 1}),
    case("FIELD-044", **{P + "resampler_n_heads": 2}),
    case("FIELD-045", **{P + "resampler_head_dim": 10}),
    case("FIELD-046", **{P + "qk_layer_norms_perceiver": True}),
]
#: Fields that change what the same parameters compute.
VALUES = [
    case("FIELD-006", num_attention_heads=2),
    case("FIELD-006", num_attention_heads=8),
    case("FIELD-008", "CFG-059", hidden_act="relu"),
    case("FIELD-008", "CFG-059", hidden_act="gelu"),
    case("FIELD-013", "CFG-056", rms_norm_eps=0.5),
    case("FIELD-034", **{V + "num_attention_heads": 8}),
    case("FIELD-036", **{V + "hidden_act": "relu"}),
    case("FIELD-036", **{V + "hidden_act": "quick_gelu"}),
    case("FIELD-037", **{V + "layer_norm_eps": 0.5}),
    case("FIELD-044", "FIELD-045", **{P + "resampler_n_heads": 6, P + "resampler_head_dim": 4}),
]
#: Fields that change nothing in a model whose weights are given and that is not trained.
INERT = [
    case("FIELD-007", dropout=0.9),
    case("FIELD-009", initializer_range=3.0),
    case("FIELD-010", alpha_initializer="zeros"),
    case("FIELD-011", alphas_initializer_range=2.0),
    case("FIELD-014", use_cache=False),
    case("FIELD-015", pad_token_id=33),
    case("FIELD-016", bos_token_id=33),
    case("FIELD-017", eos_token_id=33),
    case("FIELD-021", freeze_text_layers=False),
    case("FIELD-022", freeze_text_module_exceptions=["Linear"]),
    case("FIELD-023", freeze_lm_head=True),
    case("FIELD-024", freeze_vision_layers=False),
    case("FIELD-025", freeze_vision_module_exceptions=["Linear"]),
    case("FIELD-038", **{V + "attention_dropout": 0.9}),
    case("FIELD-039", **{V + "initializer_range": 3.0}),
    case("FIELD-040", **{V + "initializer_factor": 3.0}),
    case("FIELD-041", **{P + "use_resampler": True}),
]


def follow_the_rules(idefics: IdeficsModels, changes: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Compare shapes, image features and logits of a changed model with the rules; returns the logits."""
    wanted = settings(**changes)
    model = idefics.new_model(**changes)
    assert shapes(model) == parameter_shapes(wanted)
    made = idefics.fill(model)
    vision = wanted["vision_config"]
    given = inputs(**images(vision["num_channels"], vision["image_size"]))
    features, logits = Reference(wanted, made).run(**given)
    answer = run(model, **given)
    close(array(answer, "image_hidden_states"), features, "image features")
    found = array(answer, "logits")
    close(found[REAL], logits[REAL], "logits")
    return found


@requirement("IDEFICS-FIELD-027", "IDEFICS-FIELD-028")
def test_the_unchanged_model_follows_the_rules(idefics: IdeficsModels) -> None:
    follow_the_rules(idefics, {})


@pytest.mark.parametrize("changes", SHAPES)
def test_a_field_changes_the_parameters(idefics: IdeficsModels, changes: dict[str, Any]) -> None:
    assert parameter_shapes(settings(**changes)) != parameter_shapes(settings())
    follow_the_rules(idefics, changes)


@pytest.mark.parametrize("changes", VALUES)
def test_a_field_changes_what_is_computed(idefics: IdeficsModels, changes: dict[str, Any]) -> None:
    assert parameter_shapes(settings(**changes)) == parameter_shapes(settings())
    found = follow_the_rules(idefics, changes)
    assert apart(found[REAL], result(idefics.model)[REAL]), f"{changes} changes nothing"


@pytest.mark.parametrize("changes", INERT)
def test_a_field_changes_nothing_in_a_model_with_given_weights(idefics: IdeficsModels, changes: dict[str, Any]) -> None:
    model = idefics.filled(**changes)
    assert shapes(model) == parameter_shapes(settings())
    np.testing.assert_array_equal(result(model), result(idefics.model))


# special cases ----------------------------------------------------------------------------------------------------


@requirement("IDEFICS-FIELD-014", "IDEFICS-MODEL-013")
@pytest.mark.parametrize("configured", [True, False])
def test_use_cache_decides_where_a_call_does_not(idefics: IdeficsModels, configured: bool) -> None:
    model = idefics.filled(BASE, use_cache=configured)
    assert (run(model).get("past_key_values") is not None) is configured
    assert run(model, {"use_cache": False}).get("past_key_values") is None
    assert run(model, {"use_cache": True}).get("past_key_values") is not None


@requirement("IDEFICS-FIELD-018", "IDEFICS-CFG-054")
@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_are_the_tables(idefics: IdeficsModels, tied: bool) -> None:
    pairs = {
        "lm_head.weight": "model.embed_tokens.weight",
        "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
    }
    model = idefics.new_model(tie_word_embeddings=tied)
    for head, table in pairs.items():
        same = model.call(f"{head}.data_ptr") == model.call(f"{table}.data_ptr")
        assert same is tied, f"{head} and {table} are {'one' if same else 'two'}"
    if tied:
        made = idefics.fill(model, **{head: idefics.fill(model)[table] for head, table in pairs.items()})
        close(result(model)[REAL], Reference(settings(), made).run(**inputs())[1][REAL])


@requirement("IDEFICS-FIELD-028", "IDEFICS-FIELD-041")
@pytest.mark.parametrize("switch", [True, False])
def test_the_switch_in_the_resamplers_configuration_makes_no_resampler(idefics: IdeficsModels, switch: bool) -> None:
    model = idefics.new_model(use_resampler=False, **{P + "use_resampler": switch, P + "resampler_depth": 3})
    assert shapes(model) == parameter_shapes(settings(use_resampler=False))


@requirement("IDEFICS-FIELD-029")
def test_the_towers_width_has_two_names(idefics: IdeficsModels) -> None:
    assert idefics.call("IdeficsConfig", vision_config={"hidden_size": 48}).get("vision_config.embed_dim") == 48
    assert idefics.call("IdeficsConfig", vision_config={"embed_dim": 48}).get("vision_config.hidden_size") == 48


@requirement("IDEFICS-FIELD-030")
def test_pictures_have_the_configured_size(idefics: IdeficsModels) -> None:
    assert error_of(lambda: run(idefics.model, **images(side=42))), "pictures of 42 pixels are taken by a tower for 28"


# what is refused --------------------------------------------------------------------------------------------------


def refused(number: int, words: str, **changes: Any) -> Any:
    """One row: a value that there is not, and words of which the error has to have one."""
    marks = requirement(f"IDEFICS-FIELD-{number:03d}")
    return pytest.param(changes, words.split(), marks=marks, id=",".join(changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        refused(47, "matrix", alpha_type="matrix"),
        refused(48, "xavier", alpha_initializer="xavier"),
        refused(49, "swish7", hidden_act="swish7"),
        refused(50, "swish7", **{V + "hidden_act": "swish7"}),
        refused(51, "RMSNorm", freeze_text_module_exceptions=["RMSNorm"]),
        refused(52, "RMSNorm", freeze_vision_module_exceptions=["RMSNorm"]),
        refused(53, "hidden_size num_attention_heads num_heads", num_attention_heads=5),
        refused(54, "embed_dim num_attention_heads num_heads", **{V + "num_attention_heads": 5}),
        refused(55, "vision_config", vision_config=7),
        refused(55, "perceiver_config", perceiver_config="none"),
        refused(56, "cross_layer_interval num_hidden_layers", cross_layer_interval=3),
    ],
)
def test_a_value_that_there_is_not_is_refused_by_name(
    idefics: IdeficsModels, changes: dict[str, Any], words: list[str]
) -> None:
    error = error_of(lambda: idefics.new_model(**changes))
    assert error, f"{changes} is accepted"
    assert any(word in str(error) for word in words), f"{error} does not name {' or '.join(words)}"
