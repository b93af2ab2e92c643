"""Tensor parallelism: real ranks against one, row by row; and what cannot be cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import assert_ranks_equal_one

from vlmqual_faults.nursery import Nursery
from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration
from vlmqual_impl.configs import Idefics3Config
from vlmqual_impl.models import idefics3
from vlmqual_impl.tp import check, environment, shard

# A batch padded on both sides, a text-only row, a partly masked frame; prefill and forced decode steps.
EXAMPLE = """
import numpy as np
from vlmqual_contract.target import Model, Options
from vlmqual_impl.target import EagerTarget


def run(path, ranks):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 59, (3, 12))
    ids[0, 3:7] = 60
    ids[1, 4:8] = 60
    mask = np.ones((3, 12), np.int64)
    mask[0, :2] = 0
    mask[1, 9:] = 0
    pixels = rng.standard_normal((3, 1, 3, 56, 56)).astype(np.float32)
    pixels[2] = 0
    seen = np.ones((3, 1, 56, 56), np.int64)
    seen[1, 0, :, 28:] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels, pixel_attention_mask=seen)
    with EagerTarget(dtype="float64").open(Model(path, "idefics3"), Options(tp=ranks, max_length=16)) as session:
        step = session.prefill(inputs)
        logits = [step.logits()]
        for index in range(3):
            step = session.decode(step, np.array([5 + index, 9 + index, 11 + index]))
            logits.append(step.logits())
    return np.stack(logits)
"""


def config(**text: int) -> Idefics3Config:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "attention_bias": True,
        "mlp_bias": True,
        **text,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    return Idefics3Config(image_token_id=60, text_config=sizes, vision_config=vision)


def test_two_and_four_ranks_equal_one_for_every_row(tmp_path: Path, nursery: Nursery) -> None:
    torch.manual_seed(4)
    model = Idefics3ForConditionalGeneration(config())
    with torch.no_grad():  # biases far from 0: one that is added by every rank has to show
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(tmp_path / "model")
    assert_ranks_equal_one(tmp_path, EXAMPLE, nursery.python)


@pytest.mark.parametrize(
    ("text", "ranks", "words"),
    [
        ({}, 3, "text_config: 8 attention heads do not divide by 3 ranks (model.text_model.layers.0.self_attn.q_proj)"),
        ({}, 8, "text_config: 4 key/value heads do not divide by 8 ranks (model.text_model.layers.0.self_attn.k_proj)"),
        (
            {"intermediate_size": 50},
            4,
            "text_config: 50 feed-forward columns do not divide by 4 ranks (model.text_model.layers.0.mlp.gate_proj)",
        ),
    ],
)
def test_what_does_not_divide_names_the_module(text: dict[str, int], ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match="do not divide") as caught:
        check(idefics3.divisible(config(**text)), ranks)
    assert str(caught.value) == words


def test_the_plan_cuts_every_head_and_feed_forward_module_and_nothing_else() -> None:
    with torch.device("meta"):
        model = idefics3.Idefics3(config())
    cuts = shard(model, idefics3.PLAN, rank=1, ranks=4)
    weights = [name for name in cuts if name.endswith(".weight")]
    assert len(weights) == 2 * 7 + 1 * 6, "seven modules of a text layer, six of a vision layer"
    assert not [name for name in cuts if "norm" in name or "embed" in name or "lm_head" in name or "connector" in name]
    cut = cuts["model.text_model.layers.1.self_attn.k_proj.weight"]
    assert (cut.dim, cut.start, cut.stop) == (0, 4, 8), "one head of width 4"
    cut = cuts["model.text_model.layers.1.mlp.down_proj.weight"]
    assert (cut.dim, cut.start, cut.stop) == (1, 12, 24)
    assert "model.text_model.layers.1.mlp.down_proj.bias" not in cuts, "a row's bias is whole"


def test_the_environment_has_to_fit() -> None:
    full = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert environment(full, 2) == 1
    with pytest.raises(ValueError, match="launcher that sets RANK, MASTER_PORT"):
        environment({"WORLD_SIZE": "2", "MASTER_ADDR": "h"}, 2)
    with pytest.raises(ValueError, match="size 4 does not match WORLD_SIZE 2"):
        environment(full, 4)
