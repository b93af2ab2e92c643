"""The model against transformers in float64, and against the rules written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama import modeling_llama

from vlmqual_impl.configs import Idefics3Config
from vlmqual_impl.layers import rotary_frequencies
from vlmqual_impl.models import idefics3
from vlmqual_impl.runtime.eager_idefics3 import Idefics3Runtime

IMAGE = 300
PARTS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
}


def ours(dtype: torch.dtype = torch.float64) -> idefics3.Idefics3:
    """A tiny model whose weights are large enough that every rule shows."""
    generator = torch.Generator().manual_seed(7)
    model = idefics3.Idefics3(Idefics3Config(**PARTS))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 1 if parameter.ndim == 1 else noise)
    return model.to(dtype).eval()


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> transformers.Idefics3ForConditionalGeneration:
    """transformers' model with our weights; its softmax and norms do not fall back to float32."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt())

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    config = transformers.Idefics3Config(**PARTS)
    model = transformers.Idefics3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = model.double().eval()
    model.load_state_dict(ours().state_dict())
    return model


def batch() -> dict[str, Tensor]:
    """Padded on the left, padded on the right, and text only; a frame that is partly masked; padding frames."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 299, (3, 20), generator=generator)
    ids[0, 4:8] = IMAGE
    ids[1, 2:10] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 14:] = 0
    mask[2, :11] = 0
    pixels = torch.randn((3, 2, 3, 56, 56), generator=generator, dtype=torch.float64)
    pixel_mask = torch.ones((3, 2, 56, 56), dtype=torch.int64)
    pixels[0, 1] = 0
    pixels[2] = 0
    pixels[1, 0, :, :, 28:] = 0
    pixel_mask[1, 0, :, 28:] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_attention_mask": pixel_mask}


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_hidden_state_equals_transformers_in_float64(
    reference: transformers.Idefics3ForConditionalGeneration, implementation: str
) -> None:
    model, inputs = ours(), batch()
    model.model.implementation = implementation
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        theirs = reference(
            **inputs,
            position_ids=positions(inputs["attention_mask"]),
            output_hidden_states=True,
            output_attentions=True,
        )
    runtime = Idefics3Runtime(model)
    step = runtime.prefill(inputs, max_length=24, taps=True)
    names = ["text.embeddings", "text.layers.0", "text.layers.1", "text.norm"]
    for name, state in zip(names, theirs.hidden_states, strict=True):
        assert_close(step.taps[name][real], state[real], name)
    assert_close(step.taps["connector"].flatten(0, 1), theirs.image_hidden_states, "connector")
    assert_close(runtime.head(step.hidden)[real], theirs.logits[real], "logits")
    if implementation == "eager":
        weights: list[Tensor] = []
        features = runtime.encode(inputs)
        embeddings = runtime.embed(inputs, features)
        idefics3.prefill(model.model, embeddings, positions(inputs["attention_mask"]), real, None, attentions=weights)
        for index, (mine, other) in enumerate(zip(weights, theirs.attentions, strict=True)):
            assert_close(mine.transpose(1, 2)[real], other.transpose(1, 2)[real], f"attentions of layer {index}")


def assert_close(mine: Tensor, other: Tensor, name: str, limit: float = 1e-12) -> None:
    mine, other = mine.detach(), other.detach()
    error = float((mine - other).abs().max() / other.abs().max())
    assert error < limit, f"{name} differs by {error:.2e} of its largest value, the limit is {limit:.0e}"


def test_taps_name_every_component_and_cost_nothing_when_off() -> None:
    model, inputs = ours(), batch()
    step = Idefics3Runtime(model).prefill(inputs, max_length=24, taps=True)
    vision = ["vision.embeddings", "vision.layers.0", "vision.layers.1", "vision.post_layernorm", "connector"]
    text = ["text.embeddings", "text.layers.0", "text.layers.1", "text.layers.2", "text.norm"]
    assert list(step.taps) == vision + text
    assert step.taps["vision.embeddings"].shape == (3, 16, 16), "three real frames of 16 patches"
    assert step.taps["connector"].shape == (3, 4, 32)
    assert not Idefics3Runtime(model).prefill(inputs, max_length=24).taps


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_prefill_and_decode_of_a_padded_batch_equal_every_row_alone(implementation: str) -> None:
    model, inputs = ours(), batch()
    model.model.implementation = implementation
    runtime = Idefics3Runtime(model)
    forced = torch.tensor([[5, 6, 7], [300, 9, 10], [11, 12, 13]])  # an image token too: it is plain text here
    step = runtime.prefill(inputs, max_length=24)
    together = [step.logits]
    for index in range(3):
        step = runtime.decode(step, forced[:, index])
        together.append(step.logits)
    frames = {0: [(0, 0)], 1: [(1, 0), (1, 1)], 2: []}
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        alone: dict[str, Tensor] = {"input_ids": inputs["input_ids"][row : row + 1, kept]}
        if frames[row]:
            alone["pixel_values"] = torch.stack([inputs["pixel_values"][at] for at in frames[row]])[None]
            alone["pixel_attention_mask"] = torch.stack([inputs["pixel_attention_mask"][at] for at in frames[row]])[
                None
            ]
        single = runtime.prefill(alone, max_length=24)
        assert_close(together[0][row], single.logits[0], f"prefill of row {row}")
        for index in range(3):
            single = runtime.decode(single, forced[row : row + 1, index])
            assert_close(together[index + 1][row], single.logits[0], f"decode step {index} of row {row}")


def test_step_by_step_equals_all_at_once() -> None:
    model = ours()
    runtime = Idefics3Runtime(model)
    ids = torch.randint(3, 299, (2, 12), generator=torch.Generator().manual_seed(1))
    full = runtime.prefill({"input_ids": ids}, max_length=12)
    step = runtime.prefill({"input_ids": ids[:, :1]}, max_length=12)
    for index in range(1, 12):
        step = runtime.decode(step, ids[:, index])
        assert_close(step.hidden[:, 0], full.hidden[:, index], f"position {index}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_float64(dtype: torch.dtype) -> None:
    inputs = batch()
    gold = Idefics3Runtime(ours()).prefill(inputs, max_length=24).logits
    for implementation in ("eager", "sdpa"):
        model = ours(dtype)
        model.model.implementation = implementation
        logits = Idefics3Runtime(model).prefill(inputs, max_length=24).logits
        assert logits.dtype == dtype
        rough = float((logits.double() - gold).square().mean().sqrt() / gold.square().mean().sqrt())
        assert rough < 64 * torch.finfo(dtype).eps, f"{implementation} in {dtype} is off by {rough:.1e}"


def test_a_row_of_padding_only_leaves_no_nan_in_the_others() -> None:
    model, inputs = ours(torch.float16), batch()
    inputs["attention_mask"][0, :19] = 0
    for implementation in ("eager", "sdpa"):
        model.model.implementation = implementation
        step = Idefics3Runtime(model).prefill(inputs, max_length=24)
        assert torch.isfinite(step.hidden).all(), implementation


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotary_frequencies_equal_the_formula(kind: str) -> None:
    rope = {**PARTS["text_config"]["rope_scaling"], "rope_type": kind}
    found = rotary_frequencies(64, 500000.0, rope)
    for j, value in enumerate(found.tolist()):
        plain = 500000.0 ** (-2 * j / 64)
        turns = 16 / (2 * torch.pi / plain)  # how often it turns within the trained length
        wanted = plain
        if kind == "linear" or (kind == "llama3" and turns < 1.0):
            wanted = plain / 8
        elif kind == "llama3" and turns <= 4.0:
            share = (turns - 1.0) / 3.0
            wanted = (1 - share) * plain / 8 + share * plain
        assert value == pytest.approx(wanted, rel=1e-5), f"frequency {j}"
    assert found.dtype == torch.float32


def test_positions_of_a_full_grid_are_exact_for_the_released_geometry() -> None:
    for side in (4, 16, 26, 32):
        ids = idefics3.position_ids(torch.ones((1, side, side), dtype=torch.bool), side)
        assert ids[0].tolist() == list(range(side * side)), f"{side} patches a side"


@pytest.mark.parametrize("side", [5, 14, 19, 26, 38])
def test_positions_of_part_grids_are_those_of_the_documented_version(side: int) -> None:
    # The rule as the documented version spells it, one frame and one axis at a time.
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    for rows, columns in [(1, side), (side, 1), (3, side - 1), (side - 2, 2)]:
        mask = torch.zeros((1, side, side), dtype=torch.bool)
        mask[0, :rows, :columns] = True
        down = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / torch.tensor(rows)), boundaries, right=True)
        across = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / torch.tensor(columns)), boundaries, right=True)
        wanted = torch.zeros((side, side), dtype=torch.int64)
        wanted[:rows, :columns] = down[:, None] * side + across
        assert torch.equal(idefics3.position_ids(mask, side)[0], wanted.flatten()), f"{rows}x{columns} of {side}"


def test_positions_are_floors_but_for_whole_quotients_of_some_sides() -> None:
    exceptions = {}
    for side in range(1, 33):
        table = idefics3.position_buckets(side, side)
        for valid in range(1, side + 1):
            for patch in range(valid):
                found, floor = int(table[valid, patch]), patch * side // valid
                if found != floor:
                    assert (found, patch * side % valid) == (floor - 1, 0), f"patch {patch} of {valid}, side {side}"
                    exceptions[side, valid, patch] = found
    assert {side for side, _, _ in exceptions} == {19, 25, 29, 30, 31}
    assert exceptions[25, 25, 5] == 4


def test_pixel_shuffle_joins_neighbouring_patches() -> None:
    connector = idefics3.Idefics3Connector(Idefics3Config(**PARTS)).double()
    with torch.no_grad():
        connector.modality_projection.proj.weight.copy_(torch.eye(32, 64))
        x = torch.arange(16.0, dtype=torch.float64)[None, :, None].expand(1, 16, 16).contiguous()
        folded = connector(x)
    # the first 32 of 64 folded channels are the upper two patches of each block
    assert folded[0, :, 0].tolist() == [0, 2, 8, 10], "the upper left patch of each block comes first"
    assert folded[0, :, 16].tolist() == [1, 3, 9, 11], "then its right neighbour"


def test_masked_patches_are_not_attended_to() -> None:
    model, inputs = ours(), batch()
    runtime = Idefics3Runtime(model)
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    runtime.encode(inputs, before)
    inputs["pixel_values"][1, 0, :, :, 28:] = 5.0
    runtime.encode(inputs, after)
    left = [patch for patch in range(16) if patch % 4 < 2]
    name = "vision.post_layernorm"
    assert torch.equal(before[name][1][left], after[name][1][left]), "a masked pixel reached an unmasked patch"
    assert not torch.equal(before[name][1], after[name][1]), "masked patches are computed too"


def test_frames_of_zeros_are_dropped_in_order() -> None:
    pixels = torch.ones((2, 3, 3, 28, 28)) * torch.arange(6).view(2, 3, 1, 1, 1)
    pixels[0, 2] = 0
    frames, mask = idefics3.real_frames(pixels, None, 14)
    assert frames[:, 0, 0, 0].tolist() == [1, 3, 4, 5]
    assert mask is None


def test_wrong_shapes_and_counts_are_named() -> None:
    model, inputs = ours(), batch()
    runtime = Idefics3Runtime(model)
    with pytest.raises(ValueError, match=r"pixel_values has 4 dimensions"):
        runtime.encode({"pixel_values": inputs["pixel_values"][0]})
    with pytest.raises(ValueError, match=r"pixel_attention_mask is \(3, 56, 56\)"):
        runtime.encode({**inputs, "pixel_attention_mask": inputs["pixel_attention_mask"][:, 0]})
    with pytest.raises(ValueError, match="42x42 pixels give 3x3 patches"):
        runtime.encode({"pixel_values": inputs["pixel_values"][:, :, :, :42, :42]})
    inputs["input_ids"][0, 4] = 5
    with pytest.raises(ValueError, match="11 image tokens, but there are 12"):
        runtime.prefill(inputs, max_length=24)
    with pytest.raises(ValueError, match="holds 320; the vocabulary is 0 to 319"):
        runtime.prefill({"input_ids": torch.tensor([[320]])}, max_length=4)
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\)"):
        runtime.prefill({"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones((1, 3))}, max_length=4)
    with pytest.raises(ValueError, match="row 0 of attention_mask has no real token"):
        runtime.prefill({"input_ids": torch.tensor([[5]]), "attention_mask": torch.zeros((1, 1))}, max_length=4)


def test_a_full_cache_and_a_step_decoded_twice_are_refused() -> None:
    runtime = Idefics3Runtime(ours())
    with pytest.raises(ValueError, match="4 positions, 0 are taken and 5 more"):
        runtime.prefill({"input_ids": torch.full((1, 5), 9)}, max_length=4)
    step = runtime.prefill({"input_ids": torch.full((1, 3), 9)}, max_length=4)
    last = runtime.decode(step, torch.tensor([5]))
    with pytest.raises(ValueError, match="decoded already"):
        runtime.decode(step, torch.tensor([5]))
    with pytest.raises(ValueError, match="4 positions, 4 are taken"):
        runtime.decode(last, torch.tensor([5]))
