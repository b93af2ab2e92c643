"""Idefics before and in training: random weights, what is frozen, sizes of the vocabulary, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_idefics_model import FAKE, IMAGE, KINDS, assert_close, batch, exact, opened, settings, theirs

from vlmqual_impl.api.idefics import IdeficsForVisionText2Text
from vlmqual_impl.api.idefics_model import IdeficsModel
from vlmqual_impl.configs import IdeficsConfig

__all__ = ["exact"]  # a fixture that is used by name

RANDOM = {"alpha_initializer": "normal", "alphas_initializer_range": 0.5}


def fresh(**changes: Any) -> IdeficsForVisionText2Text:
    torch.manual_seed(5)
    return IdeficsForVisionText2Text(IdeficsConfig(**settings(**{"use_resampler": True, **changes})))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def deviation(drawn: torch.Tensor) -> float:
    return float(drawn.detach().std())


def named(model: torch.nn.Module, *starts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


# ---------------------------------------------------------------------------------------------------- random weights


def test_matrices_are_drawn_with_the_deviation_that_is_configured() -> None:
    model = fresh(hidden_size=128, initializer_range=0.2)
    trunk = model.model
    block = trunk.gated_cross_attn_layers[0]
    for matrix in (
        trunk.layers[0].mlp.up_proj,
        block.cross_attn.q_proj,
        trunk.embed_tokens,
        model.lm_head,
        trunk.vision_model.encoder.layers[0].mlp.fc1,
        trunk.perceiver_resampler.blocks[0][1].fc,
    ):
        assert 0.17 < deviation(matrix.weight) < 0.23, matrix
    assert 0.12 < deviation(trunk.embed_tokens.additional_embedding.weight) < 0.28
    assert 0.12 < deviation(model.lm_head.additional_fc.weight) < 0.28
    for drawn in (trunk.vision_model.embeddings.class_embedding, trunk.perceiver_resampler.latents):
        assert 0.6 < deviation(drawn) < 1.4, "these are drawn with deviation 1"
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "bias":
            assert not parameter.any(), f"{name} is not 0"
        elif "norm" in name:
            assert bool((parameter == 1).all()), f"{name} is not 1"


def test_the_row_of_the_padding_id_is_nought() -> None:
    table = fresh(pad_token_id=7).model.embed_tokens.weight
    assert [row for row in range(60) if not table[row].any()] == [7]
    for none in (None, FAKE):
        assert bool(fresh(pad_token_id=none).model.embed_tokens.weight.any(1).all())


@pytest.mark.parametrize(("kind", "shape"), [("float", (1,)), ("vector", (1, 1, 32))])
def test_gates_start_as_configured_in_both_shapes(kind: str, shape: tuple[int, ...]) -> None:
    for name, wanted in (("zeros", 0.0), ("ones", 1.0)):
        for block in fresh(alpha_type=kind, alpha_initializer=name).model.gated_cross_attn_layers:
            for gate in (block.alpha_cross_attn, block.alpha_dense):
                assert tuple(gate.shape) == shape
                assert bool((gate == wanted).all())
    for name in ("normal", "gaussian", "random"):
        model = fresh(**{**RANDOM, "alpha_type": kind, "alpha_initializer": name, "cross_layer_interval": 1})
        gates = [parameter for key, parameter in model.named_parameters() if ".alpha_" in key]
        assert len(gates) == 8, "two of every block"
        drawn = torch.cat([gate.detach().flatten() for gate in gates])
        assert 0.2 < deviation(drawn) < 0.9, f"{name} is drawn with alphas_initializer_range"
        assert len(set(drawn.tolist())) == len(drawn)


def test_a_new_model_does_not_see_its_images_until_its_gates_are_open() -> None:
    inputs = {**batch(), "pixel_values": batch()["pixel_values"].float()}
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    closed, ajar = fresh().eval(), fresh(**RANDOM).eval()
    assert torch.equal(closed(**inputs).logits, closed(**other).logits)
    assert not torch.equal(ajar(**inputs).logits, ajar(**other).logits)


# ----------------------------------------------------------------------------------------------------------- freezing


def test_by_default_text_layers_and_the_vision_tower_are_frozen() -> None:
    model = fresh()
    frozen = {name for name, _ in model.named_parameters()} - trainable(model)
    wanted = named(model, "model.layers.", "model.norm.", "model.vision_model.") | {"model.embed_tokens.weight"}
    assert frozen == wanted
    for name in ("additional_embedding", "gated_cross_attn_layers", "perceiver_resampler", "lm_head"):
        assert [item for item in trainable(model) if name in item], f"{name} has to stay trainable"


def test_every_switch_freezes_its_own_part() -> None:
    off = {"freeze_text_layers": False, "freeze_vision_layers": False}
    assert trainable(fresh(**off)) == named(fresh(), "")
    text = fresh(**off | {"freeze_text_layers": True})
    assert not trainable(text) & named(text, "model.layers.", "model.norm.", "model.embed_tokens.weight")
    assert trainable(text) >= named(text, "model.vision_model.")
    head = fresh(**off | {"freeze_lm_head": True})
    assert named(head, "") - trainable(head) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("exceptions", "kept"),
    [(["Linear"], "_proj.weight"), (["LayerNorm"], None), (["Embedding"], None), (["Linear", "LayerNorm"], "_proj.")],
)
def test_kinds_of_text_modules_can_be_excepted(exceptions: list[str], kept: str | None) -> None:
    model = fresh(freeze_text_module_exceptions=exceptions)
    found = trainable(model) & named(model, "model.layers.", "model.norm.")
    wanted = {name for name in named(model, "model.layers.") if kept is not None and kept in name}
    assert found == wanted, "RMS norms are no LayerNorm"
    assert "model.embed_tokens.weight" not in trainable(model), "the table is frozen by itself"


@pytest.mark.parametrize(
    ("exceptions", "words"),
    [(["LayerNorm"], ("norm",)), (["Linear"], ("self_attn", "mlp")), (["Embedding"], ("position_embedding",))],
)
def test_kinds_of_vision_modules_can_be_excepted(exceptions: list[str], words: tuple[str, ...]) -> None:
    model = fresh(freeze_vision_module_exceptions=exceptions)
    tower = named(model, "model.vision_model.")
    assert trainable(model) & tower == {name for name in tower if any(word in name for word in words)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze_text_layers": False},
        {"freeze_vision_layers": False, "freeze_lm_head": True},
        {"freeze_text_module_exceptions": ["Linear"], "freeze_vision_module_exceptions": ["LayerNorm", "Embedding"]},
        {"freeze_text_module_exceptions": ["LayerNorm"], "freeze_vision_module_exceptions": ["Linear"]},
        {"tie_word_embeddings": True, "freeze_lm_head": True},
        {"tie_word_embeddings": True, "freeze_text_layers": False, "freeze_lm_head": True},
        {"additional_vocab_size": 0, "use_resampler": False},
    ],
    ids=str,
)
def test_what_is_frozen_is_what_transformers_freezes(changes: dict[str, Any]) -> None:
    other = transformers.IdeficsForVisionText2Text(
        transformers.IdeficsConfig(**settings(**{"use_resampler": True, **changes}))
    )
    assert trainable(fresh(**changes)) == trainable(other)


def test_parts_can_be_frozen_later() -> None:
    model = IdeficsModel(IdeficsConfig(**settings(freeze_text_layers=False, freeze_vision_layers=False)))
    model.freeze_text_layers(["Linear"])
    assert not model.layers[0].input_layernorm.weight.requires_grad
    assert model.layers[0].mlp.up_proj.weight.requires_grad
    model.freeze_vision_layers()
    assert not trainable(model) & named(model, "vision_model.")
    assert model.embed_tokens.weight.requires_grad, "only a new model freezes its table"
    model.freeze_relevant_params(IdeficsConfig(**settings()))
    assert not trainable(model) & named(model, "layers.", "norm.")
    with pytest.raises(ValueError, match="module_exceptions holds 'RMSNorm'; known are LayerNorm, Linear, Embedding"):
        model.freeze_text_layers(["RMSNorm"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze_lm_head": True, "freeze_vision_module_exceptions": ["LayerNorm"]},
        {"freeze_text_layers": False, "tie_word_embeddings": True, "freeze_lm_head": True},
        {"tie_word_embeddings": True},
    ],
)
def test_a_loaded_model_is_frozen_as_a_new_one(changes: dict[str, Any], tmp_path: Path) -> None:
    model = fresh(**changes)
    model.save_pretrained(tmp_path)
    loaded = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert trainable(loaded) == trainable(model)
    assert trainable(loaded), "something is left to train"
    if changes.get("tie_word_embeddings"):  # the head is the table, which its own switch freezes
        assert loaded.lm_head.weight.requires_grad is not loaded.config.freeze_text_layers


# --------------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("rows", [72, 50])
@pytest.mark.parametrize("tied", [False, True])
def test_the_main_table_and_the_main_head_can_be_resized(rows: int, tied: bool) -> None:
    model = fresh(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = model.resize_token_embeddings(rows)
    assert (table.num_embeddings, tuple(table.weight.shape)) == (rows, (rows, 32))
    assert (model.config.vocab_size, model.model.config.vocab_size, model.lm_head.out_features) == (rows,) * 3
    kept = min(rows, 60)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name][:kept], before[name][:kept])
    assert (model.lm_head.weight is table.weight) is tied
    assert not table.weight.requires_grad, "what was frozen stays frozen"
    ids = torch.tensor([[rows, rows + 1, 3]])  # the additional ids follow the last row
    assert torch.equal(table(ids)[0, :2], before["model.embed_tokens.additional_embedding.weight"])
    inputs = {"pixel_values": torch.zeros((1, 1, 3, 28, 28)), "image_attention_mask": torch.zeros((1, 3, 1))}
    assert tuple(model(ids, **inputs).logits.shape) == (1, 3, rows + 2)
    assert model.model.resize_token_embeddings(31).num_embeddings == 31, "the model without head as well"


def test_another_table_is_followed_by_a_tied_head() -> None:
    model = fresh(tie_word_embeddings=True)
    other = fresh().get_input_embeddings()
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert model.lm_head.weight is other.weight
    assert model.lm_head.additional_fc.weight is other.additional_embedding.weight
    head = fresh().get_output_embeddings()
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head


# ----------------------------------------------------------------------------------------------------------- training


def test_gradients_reach_everything_that_is_not_frozen() -> None:
    model = fresh(alpha_initializer="ones").train()
    opened(model)
    inputs = {**batch(), "pixel_values": batch()["pixel_values"].float()}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, f"{name} is frozen"
        else:
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert bool(parameter.grad.any()), f"the gradient of {name} is 0"
    extra = model.model.embed_tokens.additional_embedding.weight.grad
    assert bool(extra[[FAKE - 60, IMAGE - 60]].any(1).all())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_transformers_in_float64(kind: str) -> None:
    changes = {**KINDS[kind], "freeze_text_layers": False, "freeze_vision_layers": False}
    mine, other = fresh(**{"use_resampler": False, **changes}), theirs(**changes)
    opened(mine)
    mine.double().eval()
    inputs = batch(extra=mine.config.additional_vocab_size)
    real = inputs["attention_mask"].bool()
    for model in (mine, other):
        model(**inputs).logits[real].square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in other.named_parameters()}
    found = {name: parameter.grad for name, parameter in mine.named_parameters()}
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        if "post_layernorm" in name:  # belongs to a pooled vector that nothing uses
            assert gradient is None or not gradient.any()
        elif name.endswith(("self_attn.k_proj.bias", "k_layer_norm.bias")):  # moves all scores of a query alike
            assert float(gradient.abs().max()) < 1e-12
        else:
            assert_close(gradient, wanted[name], f"gradient of {name}", 1e-10)


def test_a_closed_gate_opens_in_training() -> None:
    model = fresh().train()
    inputs = {**batch(), "pixel_values": batch()["pixel_values"].float()}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for block in model.model.gated_cross_attn_layers:
        assert bool(block.alpha_cross_attn.grad.any())
        assert bool(block.alpha_dense.grad.any())


def test_dropout_is_for_training_only() -> None:
    model = opened(fresh(dropout=0.5, alpha_initializer="ones"))
    inputs = {**batch(), "pixel_values": batch()["pixel_values"].float()}
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert model.generate(**inputs, max_new_tokens=2).tolist() == model.generate(**inputs, max_new_tokens=2).tolist()
    assert model.training, "generation puts the mode back"
