"""Fields of Idefics' configuration that concern new models, training and the end of generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_models import (
    LAYERS,
    REAL,
    WIDTH,
    IdeficsModels,
    apart,
    close,
    idefics_models,
    inputs,
    result,
    run,
    settings,
    trainable,
    weights,
)
from vlmqual_conformance.suite.idefics_reference import Reference, parameter_shapes
from vlmqual_conformance.suite.library_objects import arguments, array
from vlmqual_contract.subject import Handle, RemoteLibrary
from vlmqual_contract.target import Array

UP = "model.layers.0.mlp.up_proj.weight"
FC1 = "model.vision_model.encoder.layers.0.mlp.fc1.weight"
MATRICES = [
    UP,
    FC1,
    "model.gated_cross_attn_layers.1.cross_attn.k_proj.weight",
    "model.perceiver_resampler.blocks.0.1.fc.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
]


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsModels:
    """Objects of the library under test."""
    return idefics_models(library)


def near(value: float, wanted: float) -> bool:
    """Equal up to what a deviation over some hundred numbers can be off by."""
    return 0.85 * wanted < value < 1.15 * wanted


# random weights ---------------------------------------------------------------------------------------------------


@requirement("IDEFICS-FIELD-009", "IDEFICS-CFG-057")
@pytest.mark.parametrize("deviation", [0.02, 0.2])
def test_new_matrices_have_the_configured_deviation(idefics: IdeficsModels, deviation: float) -> None:
    made = weights(idefics.new_model(initializer_range=deviation))
    for name in MATRICES:
        assert near(made[name].std(), deviation), f"{name} has deviation {made[name].std():.4f}"
        assert abs(made[name].mean()) < deviation / 5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("initializer_range", marks=requirement("IDEFICS-FIELD-039")),
        pytest.param("initializer_factor", marks=requirement("IDEFICS-FIELD-040")),
    ],
)
def test_a_new_towers_matrices_follow_the_whole_models_deviation(idefics: IdeficsModels, name: str) -> None:
    made = weights(idefics.new_model(initializer_range=0.1, **{f"vision_config.{name}": 5.0}))
    assert near(made[FC1].std(), 0.1), f"vision_config.{name} makes it {made[FC1].std():.4f}"


def gates(made: dict[str, Array]) -> Array:
    """The values of all gates."""
    found = [value.ravel() for name, value in made.items() if "alpha_" in name]
    assert found, "the model has no gates"
    return np.concatenate(found)


@requirement("IDEFICS-FIELD-010", "IDEFICS-CFG-041")
@pytest.mark.parametrize("kind", ["float", "vector"])
@pytest.mark.parametrize(("initializer", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_new_gates_are_what_their_initializer_says(
    idefics: IdeficsModels, initializer: str, value: float, kind: str
) -> None:
    changes = {"alpha_type": kind, "alphas_initializer_range": 0.5, "alpha_initializer": initializer}
    found = gates(weights(idefics.new_model(**changes)))
    assert found.size == 2 * LAYERS // 2 * (WIDTH if kind == "vector" else 1)
    np.testing.assert_array_equal(found, value)


@requirement("IDEFICS-FIELD-010", "IDEFICS-FIELD-011", "IDEFICS-CFG-043")
@pytest.mark.parametrize("deviation", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("initializer", ["normal", "gaussian", "random"])
def test_random_gates_have_their_own_deviation(idefics: IdeficsModels, initializer: str, deviation: float) -> None:
    changes = {"alpha_type": "vector", "alphas_initializer_range": deviation, "alpha_initializer": initializer}
    found = gates(weights(idefics.new_model(num_hidden_layers=8, cross_layer_interval=1, **changes)))
    assert found.size == 2 * 8 * WIDTH
    if deviation:
        assert near(found.std(), deviation), f"the gates have deviation {found.std():.4f}"
        assert abs(found.mean()) < deviation / 4
    else:
        assert not found.any()


@requirement("IDEFICS-FIELD-015")
@pytest.mark.parametrize("padding", [0, 7])
def test_a_new_tables_padding_row_is_nought(idefics: IdeficsModels, padding: int) -> None:
    table = weights(idefics.new_model(pad_token_id=padding))["model.embed_tokens.weight"]
    assert np.flatnonzero(~table.any(1)).tolist() == [padding]


# freezing ---------------------------------------------------------------------------------------------------------


def text(name: str) -> bool:
    """Decoder layers, final norm, main table."""
    return name.startswith(("model.layers.", "model.norm.")) or name == "model.embed_tokens.weight"


def tower(name: str) -> bool:
    """The vision tower."""
    return name.startswith("model.vision_model.")


def off(*ids: str, frozen: Callable[[str], bool], name: str, **changes: Any) -> Any:
    """One row: changes of a configuration that freezes nothing, and which parameters they freeze."""
    marks = requirement(*(f"IDEFICS-{item}" for item in ids))
    free = {"freeze_text_layers": False, "freeze_vision_layers": False}
    return pytest.param({**free, **changes}, frozen, marks=marks, id=name)


TEXT: dict[str, Any] = {"freeze_text_layers": True}
TOWER: dict[str, Any] = {"freeze_vision_layers": True}
EXCEPTIONS = "freeze_text_module_exceptions", "freeze_vision_module_exceptions"


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        off("FIELD-021", "FIELD-024", "CFG-047", "CFG-051", frozen=lambda name: False, name="nothing"),
        off("FIELD-021", "CFG-047", "CFG-040", frozen=text, name="text", **TEXT),
        off("FIELD-024", "CFG-051", frozen=tower, name="tower", **TOWER),
        off(
            *("FIELD-023", "CFG-050"),
            frozen=lambda name: name == "lm_head.weight",
            name="head",
            freeze_lm_head=True,
        ),
        off(
            *("FIELD-022", "CFG-048"),
            frozen=lambda name: text(name) and not name.endswith("_proj.weight"),
            name="text but Linear",
            **TEXT,
            freeze_text_module_exceptions=["Linear"],
        ),
        off(
            *("FIELD-022", "CFG-048"),
            frozen=text,
            name="text but LayerNorm and Embedding",
            **TEXT,
            freeze_text_module_exceptions=["LayerNorm", "Embedding"],
        ),
        off(
            *("FIELD-025", "CFG-052"),
            frozen=lambda name: tower(name) and "norm" not in name,
            name="tower but LayerNorm",
            **TOWER,
            freeze_vision_module_exceptions=["LayerNorm"],
        ),
        off(
            *("FIELD-025", "CFG-052"),
            frozen=lambda name: tower(name) and not any(part in name for part in (".self_attn.", ".mlp.")),
            name="tower but Linear",
            **TOWER,
            freeze_vision_module_exceptions=["Linear"],
        ),
        off(
            *("FIELD-025", "CFG-052"),
            frozen=lambda name: tower(name) and "position_embedding" not in name and "norm" not in name,
            name="tower but Embedding and LayerNorm",
            **TOWER,
            freeze_vision_module_exceptions=["Embedding", "LayerNorm"],
        ),
        off(
            *("FIELD-022", "FIELD-025"),
            frozen=lambda name: False,
            name="exceptions alone",
            **{key: ["Linear"] for key in EXCEPTIONS},
        ),
    ],
)
def test_switches_freeze_their_own_parameters(
    idefics: IdeficsModels, changes: dict[str, Any], frozen: Callable[[str], bool]
) -> None:
    names = set(parameter_shapes(settings()))
    found = names - trainable(idefics.new_model(**changes))
    assert found == {name for name in names if frozen(name)}


# dropout ----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-FIELD-007", "IDEFICS-CFG-058")
def test_dropout_is_of_training_only(idefics: IdeficsModels) -> None:
    model = idefics.filled(dropout=0.5)
    np.testing.assert_array_equal(result(model), result(model))
    model.call("train")
    assert apart(result(model)[REAL], result(model)[REAL]), "two passes in training are the same"


@requirement("IDEFICS-FIELD-007")
def test_dropout_concerns_every_branch_of_the_text_model_and_no_picture(idefics: IdeficsModels) -> None:
    model = idefics.filled(dropout=1.0)
    model.call("train")
    made = run(model)
    features, logits = Reference(settings(num_hidden_layers=0), weights(model)).run(**inputs())
    close(array(made, "image_hidden_states"), features)
    close(array(made, "logits")[REAL], logits[REAL], "with no branch at all the head sees the embeddings")


@requirement("IDEFICS-FIELD-038")
def test_attention_dropout_concerns_the_tower_in_training(idefics: IdeficsModels) -> None:
    model = idefics.filled(**{"vision_config.attention_dropout": 1.0})
    model.call("train")
    made = weights(model)
    made |= {name: np.zeros_like(value) for name, value in made.items() if tower(name) and ".v_proj." in name}
    features, logits = Reference(settings(), made).run(**inputs())
    answer = run(model)
    close(array(answer, "image_hidden_states"), features, "without attention weights there are no values")
    close(array(answer, "logits")[REAL], logits[REAL])


# the end of generation ----------------------------------------------------------------------------------------------


def continued(model: Handle, **options: Any) -> Array:
    """Six greedy tokens behind the inputs, (B, up to 6)."""
    given = inputs()
    found = model.call("generate", max_new_tokens=6, do_sample=False, **arguments(**given), **options)
    assert isinstance(found, np.ndarray)
    return found[:, given["input_ids"].shape[1] :]


@requirement("IDEFICS-FIELD-015", "IDEFICS-FIELD-017")
def test_generation_ends_a_row_at_the_end_token_and_fills_it_with_padding(idefics: IdeficsModels) -> None:
    endless = continued(idefics.filled(eos_token_id=None))
    assert endless.shape == (2, 6)
    first = int(endless[0, 0])
    stop = [row.tolist().index(first) if first in row else 6 for row in endless]
    assert stop[0] == 0 < stop[1], f"both rows begin with {first}"
    found = continued(idefics.filled(eos_token_id=first, pad_token_id=88))
    for row, wanted, end in zip(found, endless, stop, strict=True):
        kept = min(end + 1, len(row))
        np.testing.assert_array_equal(row[:kept], wanted[:kept])
        np.testing.assert_array_equal(row[kept:], 88)
    assert len(found[0]) == min(max(stop) + 1, 6), "generation goes on when every row has ended"


@requirement("IDEFICS-FIELD-015", "IDEFICS-FIELD-016", "IDEFICS-FIELD-017")
def test_generation_takes_its_tokens_from_the_configuration(idefics: IdeficsModels) -> None:
    model = idefics.new_model(pad_token_id=11, bos_token_id=12, eos_token_id=13)
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    found = [np.ravel(model.get(f"generation_config.{name}")).tolist() for name in names]  # several ids may end rows
    assert found == [[11], [12], [13]]
