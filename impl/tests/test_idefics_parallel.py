"""Tensor parallelism of Idefics: real ranks against one, row by row; what is cut, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import assert_ranks_equal_one
from test_idefics_model import opened, settings

from vlmqual_faults.nursery import Nursery
from vlmqual_impl.api.idefics import IdeficsForVisionText2Text
from vlmqual_impl.configs import IdeficsConfig
from vlmqual_impl.models import idefics
from vlmqual_impl.tp import check, shard

#: A model without and one with a resampler.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "resampler": {
        "use_resampler": True,
        "qk_layer_norms": True,
        "alpha_type": "vector",
        "cross_layer_interval": 1,
        "perceiver_config": {
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 5,
            "qk_layer_norms_perceiver": True,
        },
    },
}
# Rows with two images, one image and none; padding on both sides; prefill and forced decode steps, both models.
EXAMPLE = """
import numpy as np
from vlmqual_contract.target import Model, Options
from vlmqual_impl.target import EagerTarget


def run(path, ranks):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 60, (3, 12))
    ids[0, 4] = ids[0, 8] = ids[1, 2] = 61
    mask = np.ones((3, 12), np.int64)
    mask[0, :2] = 0
    mask[1, 9:] = 0
    pixels = rng.standard_normal((3, 2, 3, 28, 28)).astype(np.float32)
    pixels[1, 1] = pixels[2] = 0
    seen = np.zeros((3, 12, 2), np.int64)
    seen[0, 4:8, 0] = seen[0, 8:, 1] = seen[1, 2:, 0] = 1
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_attention_mask=seen)
    found = []
    for kind in ("plain", "resampler"):
        model = Model(f"{path}/{kind}", "idefics")
        with EagerTarget(dtype="float64").open(model, Options(tp=ranks, max_length=16)) as session:
            step = session.prefill(inputs, session.vision(inputs))
            logits = [step.logits()]
            for index in range(3):
                step = session.decode(step, np.array([5 + index, 60, 11 + index]))
                logits.append(step.logits())
        found.append(np.stack(logits))
    return np.concatenate(found, axis=1)
"""


def config(kind: str, **changes: Any) -> IdeficsConfig:
    return IdeficsConfig(**settings(**{**KINDS[kind], **changes}))


def test_two_and_four_ranks_equal_one_for_every_row(tmp_path: Path, nursery: Nursery) -> None:
    for kind in KINDS:  # biases and gates far from 0: what every rank adds has to show
        model = IdeficsForVisionText2Text(config(kind))
        opened(model)
        model.save_pretrained(tmp_path / "model" / kind)
    assert_ranks_equal_one(tmp_path, EXAMPLE, nursery.python)


LAYER, TOWER, RESAMPLER = (
    "model.layers.0",
    "model.vision_model.encoder.layers.0",
    "model.perceiver_resampler.blocks.0",
)


@pytest.mark.parametrize(
    ("kind", "changes", "ranks", "words"),
    [
        ("plain", {}, 3, f"config: 4 attention heads do not divide by 3 ranks ({LAYER}.self_attn.q_proj)"),
        (
            "plain",
            {"intermediate_size": 50},
            4,
            f"config: 50 feed-forward columns do not divide by 4 ranks ({LAYER}.mlp.gate_proj)",
        ),
        (
            "plain",
            {"vision_config": {"embed_dim": 24, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}},
            4,
            f"vision_config: 2 attention heads do not divide by 4 ranks ({TOWER}.self_attn.q_proj)",
        ),
        (
            "plain",
            {"vision_config": {"embed_dim": 24, "num_attention_heads": 4, "intermediate_size": 42}},
            4,
            f"vision_config: 42 feed-forward columns do not divide by 4 ranks ({TOWER}.mlp.fc1)",
        ),
        (
            "resampler",
            {"perceiver_config": {"resampler_n_heads": 6}},
            4,
            f"perceiver_config: 6 attention heads do not divide by 4 ranks ({RESAMPLER}.0.q_proj)",
        ),
    ],
)
def test_what_does_not_divide_names_the_module(kind: str, changes: dict[str, Any], ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match="do not divide") as caught:
        check(idefics.divisible(config(kind, **changes)), ranks)
    assert str(caught.value) == words


def test_the_heads_of_a_resampler_that_is_not_there_need_not_divide() -> None:
    check(idefics.divisible(config("plain", perceiver_config={"resampler_n_heads": 3})), 4)
    for kind in KINDS:
        for ranks in (1, 2, 4):
            check(idefics.divisible(config(kind)), ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_counted_columns_are_those_of_the_module_that_is_named(kind: str) -> None:
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config(kind))
    for _, what, count, name in idefics.divisible(config(kind)):
        if "columns" in what:
            assert model.get_submodule(name).out_features == count, name


@pytest.mark.parametrize(("kind", "blocks", "readers"), [("plain", 2, 0), ("resampler", 4, 2)])
def test_the_plan_cuts_every_head_and_feed_forward_module_and_nothing_else(
    kind: str, blocks: int, readers: int
) -> None:
    with torch.device("meta"):
        model = idefics.Idefics(config(kind))
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    cuts = shard(model, idefics.PLAN, rank=1, ranks=4)
    weights = [name for name in cuts if name.endswith(".weight")]
    assert len(weights) == (4 + blocks) * 7 + 2 * 6 + readers * 6, (
        "seven modules of a decoder layer and of a gated block, six of a vision layer and of a resampler block"
    )
    parts = ("norm", "embed", "lm_head", "alpha", "latents", ".ln.")
    assert not [name for name in cuts if any(part in name for part in parts)]
    for name, cut in cuts.items():
        assert cut.stop - cut.start == whole[name][cut.dim] // 4 == cut.start, f"{name}: the second of four parts"
    trunk = "model.gated_cross_attn_layers.1.cross_attn"
    assert (cuts[f"{trunk}.k_proj.weight"].dim, cuts[f"{trunk}.o_proj.weight"].dim) == (0, 1)
    assert (cuts[f"{trunk}.k_proj.weight"].start, cuts[f"{trunk}.k_proj.weight"].stop) == (8, 16), "one head of 8"
    biased = {name.rpartition(".")[0].rpartition(".")[2] for name in cuts if name.endswith(".bias")}
    assert biased == {"q_proj", "k_proj", "v_proj", "fc1"}, "a row's bias is whole and added once"
