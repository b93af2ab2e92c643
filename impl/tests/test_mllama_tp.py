"""Tensor parallelism of Mllama: real ranks against one, row by row; what is cut, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import assert_ranks_equal_one

from vlmqual_faults.nursery import Nursery
from vlmqual_impl.api.mllama import MllamaForConditionalGeneration
from vlmqual_impl.configs import MllamaConfig
from vlmqual_impl.models import mllama
from vlmqual_impl.tp import check, shard

LAYERS = "language_model.model.layers"
# Rows with two images, one image and none; padding on both sides; prefill and forced decode steps.
EXAMPLE = """
import numpy as np
from vlmqual_contract.target import Model, Options
from vlmqual_impl.target import EagerTarget


def run(path, ranks):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 63, (3, 12))
    ids[0, 4] = ids[0, 8] = ids[1, 2] = 64
    mask = np.ones((3, 12), np.int64)
    mask[0, :2] = 0
    mask[1, 9:] = 0
    pixels = rng.standard_normal((3, 2, 4, 3, 28, 28)).astype(np.float32)
    pixels[1, 1] = pixels[2] = 0
    tiles = np.zeros((3, 2, 4), np.int64)
    tiles[:, :, 0] = 1
    tiles[0, 0, :2] = tiles[0, 1, :4] = tiles[1, 0, :2] = 1
    seen = np.zeros((3, 12, 2, 4), np.int64)
    seen[0, 4:8, 0, :2] = seen[0, 8:, 1, :4] = seen[1, 2:, 0, :2] = 1
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels, aspect_ratio_mask=tiles,
                  aspect_ratio_ids=np.array([[2, 6], [5, 0], [0, 0]]), cross_attention_mask=seen)
    with EagerTarget(dtype="float64").open(Model(path, "mllama"), Options(tp=ranks, max_length=16)) as session:
        step = session.prefill(inputs)
        logits = [step.logits()]
        for index in range(3):
            step = session.decode(step, np.array([5 + index, 9 + index, 11 + index]))
            logits.append(step.logits())
    return np.stack(logits)
"""


def config(**text: Any) -> MllamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        **text,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 28,
        "intermediate_layers_indices": [1],
        "vision_output_dim": 32,
    }
    return MllamaConfig(vision, sizes, image_token_index=64)


def test_two_and_four_ranks_equal_one_for_every_row(tmp_path: Path, nursery: Nursery) -> None:
    torch.manual_seed(4)
    model = MllamaForConditionalGeneration(config())
    with torch.no_grad():  # gates open, and biases far from 0: one that is added by every rank has to show
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        for name, parameter in model.named_parameters():
            if "gate" in name.rpartition(".")[2]:
                parameter.fill_(0.7)
    model.save_pretrained(tmp_path / "model")
    assert_ranks_equal_one(tmp_path, EXAMPLE, nursery.python)


@pytest.mark.parametrize(
    ("text", "ranks", "words"),
    [
        ({}, 3, f"text_config: 8 attention heads do not divide by 3 ranks ({LAYERS}.0.self_attn.q_proj)"),
        ({}, 8, f"text_config: 4 key/value heads do not divide by 8 ranks ({LAYERS}.0.self_attn.k_proj)"),
        (
            {"cross_attention_layers": [0], "intermediate_size": 50},
            4,
            f"text_config: 50 feed-forward columns do not divide by 4 ranks ({LAYERS}.1.mlp.gate_proj)",
        ),
    ],
)
def test_what_does_not_divide_names_the_module(text: dict[str, Any], ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match="do not divide") as caught:
        check(mllama.divisible(config(**text)), ranks)
    assert str(caught.value) == words


def test_the_plan_cuts_every_head_and_feed_forward_module_and_nothing_else() -> None:
    with torch.device("meta"):
        model = mllama.Mllama(config())
    cuts = shard(model, mllama.PLAN, rank=1, ranks=4)
    weights = [name for name in cuts if name.endswith(".weight")]
    assert len(weights) == 3 * 7 + 3 * 6, "seven modules of a text layer of either kind, six of a vision layer"
    whole = ("norm", "embed", "lm_head", "projector", "gate.", "class_")
    assert not [name for name in cuts if any(part in name for part in whole)]
    cut = cuts["language_model.model.layers.1.cross_attn.k_proj.weight"]
    assert (cut.dim, cut.start, cut.stop) == (0, 4, 8), "one head of width 4"
    biased = sorted(name for name in cuts if name.endswith(".bias"))
    assert len(biased) == 3, "fc1 of three vision layers"
    assert all(name.endswith("mlp.fc1.bias") for name in biased), "a row's bias is whole and added once"
