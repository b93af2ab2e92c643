"""Level artifact: files of checkpoints that mean the same, and files that are refused before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.goldens import golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper, options_for
from vlmqual_conformance.suite import idefics_files
from vlmqual_conformance.suite.idefics_files import WEIGHTS, Stored, Tensors, copy, in_shards, stored
from vlmqual_conformance.suite.idefics_images import FAMILY, settings
from vlmqual_contract import fixtures
from vlmqual_contract.errors import TargetRaised, UsageError
from vlmqual_contract.target import Info, Model

HEADS = {
    "lm_head.weight": "model.embed_tokens.weight",
    "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
}


def same_as_gold(keeper: TargetKeeper, info: Info, judge: Judge, model: Model) -> None:
    """Logits of a prompt with an image from pixels, of a checkpoint that means the same as the fixture."""
    case = golden(FAMILY, "photo")
    session = keeper.session(model, options_for(info))
    seen = session.prefill({**case.text, **case.pixels}).logits()
    judge.compare("prefill/logits", seen, case.array("prefill/logits"), case.noise("chain/logits", info.dtype))
    judge.verdict()


# files that mean the same ---------------------------------------------------------------------------------------------


@requirement("IDEFICS-FILE-021")
def test_tensors_dealt_out_to_several_files_are_the_same_model(
    keeper: TargetKeeper, info: Info, judge: Judge, tmp_path: Path
) -> None:
    same_as_gold(keeper, info, judge, in_shards(tmp_path / "shards"))


@requirement("IDEFICS-FILE-022")
def test_stored_rotary_tables_and_position_ids_are_passed_over(
    keeper: TargetKeeper, info: Info, judge: Judge, tmp_path: Path
) -> None:
    config = settings()
    half = config["hidden_size"] // config["num_attention_heads"] // 2

    def with_tables(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for layer in range(config["num_hidden_layers"]):
            made[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = stored(np.full(half, 7.0))
        return made

    same_as_gold(keeper, info, judge, copy(tmp_path / "tables", with_tables))


@requirement("IDEFICS-FILE-023")
def test_tied_heads_are_the_tables_of_the_embedding(
    keeper: TargetKeeper, info: Info, judge: Judge, tmp_path: Path
) -> None:
    def without_heads(tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if name not in HEADS}

    def with_equal_heads(tensors: Tensors) -> Tensors:
        return {**tensors, **{head: tensors[table] for head, table in HEADS.items()}}

    case = golden(FAMILY, "photo")
    untied = copy(tmp_path / "untied", with_equal_heads)
    ties = {"tie_word_embeddings": True}
    tied = {
        "tied": copy(tmp_path / "tied", without_heads, settings=ties),
        "tied, stored twice": copy(tmp_path / "twice", with_equal_heads, settings=ties),
    }
    wanted = keeper.session(untied, options_for(info)).prefill(case.text, case.features).logits()
    noise = case.noise("prefill/logits", info.dtype)
    for name, model in tied.items():
        seen = keeper.session(model, options_for(info)).prefill(case.text, case.features).logits()
        judge.same(f"prefill/logits ({name}, equal heads)", seen, wanted, (noise, noise))
    judge.verdict()


# files that are refused -----------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Tensors], Tensors]:
    """The tensors but one."""
    return lambda tensors: {other: value for other, value in tensors.items() if other != name}


def cut(name: str) -> Callable[[Tensors], Tensors]:
    """The tensors with the last row of one gone."""
    return lambda tensors: {**tensors, name: Stored(tensors[name].bits[:-1])}


WRONG = {
    "a gate is missing": without("model.gated_cross_attn_layers.0.alpha_cross_attn"),
    "a projection of cross-attention is missing": without("model.gated_cross_attn_layers.0.cross_attn.k_proj.weight"),
    "the additional table is missing": without("model.embed_tokens.additional_embedding.weight"),
    "the additional head is missing": without("lm_head.additional_fc.weight"),
    "a bias of the tower is missing": without("model.vision_model.encoder.layers.0.self_attn.q_proj.bias"),
    "the position table is too short": cut("model.vision_model.embeddings.position_embedding.weight"),
    "the additional table is too short": cut("model.embed_tokens.additional_embedding.weight"),
    "a key projection is too narrow": cut("model.gated_cross_attn_layers.0.cross_attn.k_proj.weight"),
}


def refused(keeper: TargetKeeper, info: Info, model: Model, what: str) -> None:
    """Assert that a checkpoint is not opened, or at least not run."""
    case = golden(FAMILY, "photo")
    try:
        session = keeper.session(model, options_for(info))
        session.prefill(case.text, case.features)
    except (TargetRaised, UsageError):
        return
    raise AssertionError(f"a checkpoint in which {what} is opened and run")


@requirement("IDEFICS-FILE-024")
@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(
    keeper: TargetKeeper, info: Info, tmp_path: Path, what: str
) -> None:
    model = copy(tmp_path / "wrong", WRONG[what])
    changed = idefics_files.read(tmp_path / "wrong" / WEIGHTS)
    whole = idefics_files.weights()
    assert {name: value.bits.shape for name, value in changed.items()} != {
        name: value.bits.shape for name, value in whole.items()
    }, f"the copy in which {what} is the fixture itself"
    refused(keeper, info, model, what)


@requirement("IDEFICS-FILE-024")
@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_resampler", True), ("qk_layer_norms", True), ("cross_layer_interval", 1)],
    ids=["resampler", "norms of heads", "more blocks"],
)
def test_a_configuration_that_wants_tensors_that_are_not_there_is_refused(
    keeper: TargetKeeper, info: Info, tmp_path: Path, setting: str, value: Any
) -> None:
    assert settings()[setting] != value, f"the fixture has {setting} {value!r} itself"
    refused(keeper, info, copy(tmp_path / "wrong", settings={setting: value}), f"{setting} is {value!r}")


@requirement("IDEFICS-FILE-025")
@pytest.mark.parametrize(
    "what", ["the file of tensors is cut off", "the file of tensors is missing", "a shard is missing"]
)
def test_a_checkpoint_whose_files_are_damaged_is_refused(
    keeper: TargetKeeper, info: Info, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "damaged"
    if what == "a shard is missing":
        model = in_shards(folder)
        parts = sorted(set(json.loads((folder / idefics_files.INDEX).read_text("utf-8"))["weight_map"].values()))
        (folder / parts[-1]).unlink()
    else:
        model = copy(folder)
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).unlink()
        if what == "the file of tensors is cut off":
            (folder / WEIGHTS).write_bytes(whole[: len(whole) * 3 // 4])
    refused(keeper, info, model, what)


@requirement("IDEFICS-FILE-026")
def test_a_checkpoint_of_another_family_is_refused(keeper: TargetKeeper, info: Info) -> None:
    other = Model(str(fixtures.checkpoint("mllama-tiny")), FAMILY)
    refused(keeper, info, other, "config.json says mllama")
