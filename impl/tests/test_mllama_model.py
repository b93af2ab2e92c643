"""Mllama's model against transformers in float64, and against the rules written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.mllama import modeling_mllama

from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import MllamaConfig
from vlmqual_impl.models import mllama, mllama_vision
from vlmqual_impl.runtime.eager_mllama import COUNTER, MllamaRuntime

IMAGE = 64  # the first id above the vocabulary
POSITIONS = 5  # of a tile: 2 x 2 patches and the class embedding
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "cross_attention_layers": [1, 3],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_global_layers": 2,
    "attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_layers_indices": [1, 3, 4],
    "vision_output_dim": 64,
}


def ours(dtype: torch.dtype = torch.float64) -> mllama.Mllama:
    """A tiny model with open gates whose weights are large enough that every rule shows."""
    generator = torch.Generator().manual_seed(7)
    model = mllama.Mllama(MllamaConfig(VISION, TEXT, image_token_index=IMAGE))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 1 if parameter.ndim == 1 else noise)
    return model.to(dtype).eval()


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' model with our weights; softmax and norms do not fall back to float32.

    From 5.0 on an intermediate index names the state that leaves a layer (MLLAMA-TOWER-011), so it is lowered by one.
    """
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt())

    monkeypatch.setattr(modeling_mllama.MllamaTextRMSNorm, "forward", norm)
    newer = int(transformers.__version__.split(".")[0]) >= 5
    indices = [index - newer for index in VISION["intermediate_layers_indices"]]
    vision = VISION | {"intermediate_layers_indices": indices}
    config = transformers.MllamaConfig(vision_config=vision, text_config=TEXT, image_token_index=IMAGE)
    model = transformers.MllamaForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = model.double().eval()
    weights = ours().state_dict()
    if newer:
        weights = {
            name.replace("language_model.lm_head", "lm_head")
            .replace("language_model.model.", "model.language_model.")
            .replace("vision_model.", "model.vision_model.")
            .replace("multi_modal_projector.", "model.multi_modal_projector."): value
            for name, value in weights.items()
        }
    model.load_state_dict(weights)
    return model


def batch() -> dict[str, Tensor]:
    """Rows with two images, one image and none; padded on the left, on the right, and not; text before images."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 63, (3, 14), generator=generator)
    ids[0, 5] = ids[0, 9] = ids[1, 2] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 11:] = 0
    pixels = torch.randn((3, 2, 4, 3, 28, 28), generator=generator, dtype=torch.float64)
    ratios = torch.tensor([[2, 6], [5, 0], [0, 0]])
    tiles = torch.zeros((3, 2, 4), dtype=torch.int64)
    tiles[:, :, 0] = 1
    tiles[0, 0, :2] = tiles[0, 1, :4] = tiles[1, 0, :2] = 1
    pixels[1, 1] = pixels[2] = 0
    seen = torch.zeros((3, 14, 2, 4), dtype=torch.int64)
    seen[0, 5:9, 0, :2] = seen[0, 9:, 1, :4] = seen[1, 2:, 0, :2] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen,
    }


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_close(mine: Tensor, other: Tensor, name: str, limit: float = 1e-12) -> None:
    mine, other = mine.detach(), other.detach()
    assert mine.shape == other.shape, f"{name} is {tuple(mine.shape)}, not {tuple(other.shape)}"
    error = float((mine - other).abs().max() / other.abs().max())
    assert error < limit, f"{name} differs by {error:.2e} of its largest value, the limit is {limit:.0e}"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_and_states_equal_transformers_in_float64(reference: Any, implementation: str) -> None:
    model, inputs = ours(), batch()
    model.implementation = implementation
    real = inputs["attention_mask"].bool()
    wide = {**inputs, "cross_attention_mask": inputs["cross_attention_mask"].double()}
    with torch.no_grad():
        theirs = reference(**wide, position_ids=positions(inputs["attention_mask"]), output_hidden_states=True)
    runtime = MllamaRuntime(model)
    step = runtime.prefill(inputs, max_length=20, taps=True)
    names = ["text.embeddings", *(f"text.layers.{index}" for index in range(4)), "text.norm"]
    for name, state in zip(names, theirs.hidden_states[-6:], strict=True):
        assert_close(step.taps[name][real], state[real], name)
    assert_close(runtime.head(step.hidden)[real], theirs.logits[real], "logits")


def test_the_vision_model_equals_transformers_in_float64(reference: Any) -> None:
    model, inputs = ours(), batch()
    trunk = reference if hasattr(reference, "vision_model") else reference.model
    pixels = [inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    with torch.no_grad():
        theirs = trunk.vision_model(*pixels)[0]
        mine = model.vision_model.encode(*pixels, implementation="eager")
        assert_close(mine, theirs, "features of the vision model")
        projected = trunk.multi_modal_projector(theirs).flatten(1, 3)
        assert_close(mllama.encode_images(model, *pixels), projected, "projected features")


def test_text_alone_equals_transformers_in_float64(reference: Any) -> None:
    ids = batch()["input_ids"][2:]
    with torch.no_grad():
        theirs = reference(input_ids=ids).logits
    runtime = MllamaRuntime(ours())
    step = runtime.prefill({"input_ids": ids}, max_length=20, taps=True)
    assert_close(runtime.head(step.hidden), theirs, "logits")
    skipped = {"text.layers.1", "text.layers.3", COUNTER} & set(step.taps)
    assert not skipped, f"without images these have nothing to say: {sorted(skipped)}"


def test_an_intermediate_index_selects_the_state_that_enters_the_layer() -> None:
    states = {index: torch.full((1, 2, 3), float(index)) for index in (0, 2, 4)}
    chosen = mllama_vision.selected_states(states, [2, 4])
    assert chosen.tolist() == [[[2, 4, 2, 4, 2, 4]] * 2], "channel c of the k-th state is channel c * 2 + k"
    model, inputs = ours(), batch()
    taps: dict[str, Tensor] = {}
    pixels = [inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    model.vision_model.encode(*pixels, taps=taps)
    for place, name in enumerate(("vision.layers.0", "vision.layers.2", "vision.layers.3")):
        found = taps["vision.intermediate_states"][..., place::3]
        assert torch.equal(found, taps[name]), f"index {VISION['intermediate_layers_indices'][place]} is not {name}"


def test_only_padding_does_not_see_padding() -> None:
    pairs = mllama_vision.unwanted_pairs(torch.tensor([[1, 0]]), positions=2, padded=3)[0]
    bad = [False, False, True, True, True, True]  # the pad of tile 0, all of tile 1
    wanted = [[one and other for other in bad] for one in bad]
    assert pairs.tolist() == wanted


def test_rows_that_see_no_image_attend_to_every_token_and_lose_the_feed_forward_branch() -> None:
    mask = torch.tensor([[[[0, 0]], [[1, 0]], [[1, 1]]]])  # three tokens, one image, two tiles
    bias, rows = mllama.visible_tokens(mask, 2, torch.zeros(1, dtype=torch.float64))
    least = torch.finfo(torch.float64).min
    assert bias[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, least, least], [0, 0, 0, 0]]
    assert rows[0, :, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_keys_and_values_of_images_are_computed_once(implementation: str) -> None:
    model = ours()
    model.implementation = implementation
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    runtime = MllamaRuntime(model)
    step = runtime.prefill(batch(), max_length=30, taps=True)
    assert sorted(calls) == sorted({*calls}), "a projection of image features ran more than once in the prefill"
    assert len(calls) == 4, "two layers, keys and values"
    for _ in range(8):
        step = runtime.decode(step, step.logits.argmax(-1), taps=True)
    assert len(calls) == 4, f"decode steps projected image features {len(calls) - 4} times more"
    assert step.taps[COUNTER].tolist() == [1, 1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoding_step_by_step_equals_all_at_once(implementation: str) -> None:
    model, inputs = ours(), batch()
    model.implementation = implementation
    runtime = MllamaRuntime(model)
    features = runtime.encode(inputs)
    step = runtime.prefill(inputs, features, max_length=20)
    forced = torch.randint(3, 63, (3, 4), generator=torch.Generator().manual_seed(1))
    logits = []
    for index in range(4):
        step = runtime.decode(step, forced[:, index])
        logits.append(step.logits)
    longer = {
        "input_ids": torch.cat((inputs["input_ids"], forced), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones((3, 4), dtype=torch.int64)), dim=1),
        "cross_attention_mask": torch.cat(
            (inputs["cross_attention_mask"], inputs["cross_attention_mask"][:, -1:].expand(-1, 4, -1, -1)), dim=1
        ),
    }
    whole = runtime.prefill(longer, features, max_length=20)
    assert_close(torch.stack(logits, dim=1), runtime.head(whole.hidden)[:, -4:], "logits of four steps", 1e-11)


def test_a_blind_model_is_what_closed_gates_make() -> None:
    model, inputs = ours(), batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
                parameter.zero_()
    runtime = MllamaRuntime(model)
    seeing = runtime.prefill(inputs, max_length=20).logits
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert torch.equal(runtime.prefill(other, max_length=20).logits, seeing), "closed gates have to hide the image"
    open_gates = MllamaRuntime(ours())
    moved = open_gates.prefill(other, max_length=20).logits - open_gates.prefill(inputs, max_length=20).logits
    assert float(moved.abs().max()) > 0.1, "open gates have to let the image through"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_float64(dtype: torch.dtype) -> None:
    inputs = batch()
    gold = MllamaRuntime(ours()).prefill(inputs, max_length=20).logits
    found = MllamaRuntime(ours(dtype)).prefill(inputs, max_length=20).logits
    limit = {torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    assert_close(found.double(), gold, f"logits in {dtype}", limit)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aspect_ratio_ids": None}, "aspect_ratio_ids is missing; vision needs pixel_values"),
        ({"aspect_ratio_mask": None}, "aspect_ratio_mask is missing"),
        ({"aspect_ratio_ids": torch.full((3, 2), 9)}, "aspect_ratio_ids holds 9; valid are 0 to 8"),
        ({"aspect_ratio_ids": torch.zeros((3, 1), dtype=torch.int64)}, r"aspect_ratio_ids is \(3, 1\)"),
        ({"pixel_values": torch.zeros((3, 2, 3, 28, 28))}, r"pixel_values is \(3, 2, 3, 28, 28\); it has to be"),
        ({"pixel_values": torch.zeros((3, 2, 4, 3, 56, 56))}, r"here \(batch, images, \*\(4, 3, 28, 28\)\)"),
        ({"cross_attention_mask": torch.ones((3, 13, 2, 4))}, r"cross_attention_mask is \(3, 13, 2, 4\)"),
        ({"cross_attention_mask": torch.ones((3, 14, 1, 4))}, "over 1 images of 4 tiles, 5 image tokens each"),
        ({"input_ids": torch.full((3, 14), 72)}, "input_ids holds 72; the vocabulary is 0 to 71"),
        ({"pixel_values": None}, "cross_attention_mask is given, but there are no images for it"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Tensor | None], words: str) -> None:
    inputs = {name: value for name, value in {**batch(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        MllamaRuntime(ours()).prefill(inputs, max_length=20)


def test_the_cache_holds_text_and_images_by_layer() -> None:
    runtime = MllamaRuntime(ours())
    cache = runtime.prefill(batch(), max_length=20).cache
    assert isinstance(cache, KeyValueCache)
    shapes = [tuple(keys.shape) for keys, _ in cache]
    text, images = (3, 2, 14, 8), (3, 2, 2 * 4 * POSITIONS, 8)
    assert shapes == [text, images, text, images, text], "two key/value heads in every layer"
    empty = runtime.prefill({"input_ids": batch()["input_ids"][2:]}, max_length=20).cache
    assert [keys.shape[2] for keys, _ in empty] == [14, 0, 14, 0, 14]
    with pytest.raises(IndexError, match="layer 5 is not in the cache; layers are 0 to 4"):
        cache[5]
