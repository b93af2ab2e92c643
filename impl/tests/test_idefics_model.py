"""Idefics' model against transformers in float64, and against the rules written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.idefics import modeling_idefics

from vlmqual_impl.configs import IdeficsConfig
from vlmqual_impl.models import idefics
from vlmqual_impl.runtime.eager_idefics import COUNTER, IdeficsRuntime

VOCABULARY, FAKE, IMAGE = 60, 60, 61  # the two image tokens are the additional vocabulary
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "additional_vocab_size": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_layer_interval": 2,
    "rms_norm_eps": 1e-5,
}
VISION: dict[str, Any] = {
    "embed_dim": 24,
    "image_size": 28,
    "patch_size": 7,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
RESAMPLER: dict[str, Any] = {
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 5,
}
#: What a model can be: one of each kind.
KINDS: dict[str, dict[str, Any]] = {
    "scalar gates": {},
    "resampler and norms of heads": {
        "use_resampler": True,
        "qk_layer_norms": True,
        "alpha_type": "vector",
        "cross_layer_interval": 1,
        "perceiver_config": {**RESAMPLER, "qk_layer_norms_perceiver": True},
    },
    "plain resampler, tied heads": {
        "use_resampler": True,
        "cross_layer_interval": 4,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    },
    "norms of heads, no additional vocabulary": {
        "qk_layer_norms": True,
        "alpha_type": "vector",
        "additional_vocab_size": 0,
    },
}


def settings(**changes: Any) -> dict[str, Any]:
    return {**SIZES, "vision_config": VISION, "perceiver_config": RESAMPLER, **changes}


def opened(model: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Random weights, large enough that every rule shows; gates open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            one = "norm" in name or "alpha" in name
            parameter.copy_(noise + 1 if one else noise)
    return model


def ours(dtype: torch.dtype = torch.float64, **changes: Any) -> idefics.Idefics:
    """A tiny model in evaluation mode."""
    model = idefics.Idefics(IdeficsConfig(**settings(**changes)))
    opened(model)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' softmax and norms do not fall back to float32."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt())

    monkeypatch.setattr(modeling_idefics.IdeficsRMSNorm, "forward", norm)


def theirs(**changes: Any) -> Any:
    """transformers' model with the weights of `ours`."""
    config = transformers.IdeficsConfig(**settings(**changes))
    model = transformers.IdeficsForVisionText2Text._from_config(config).double().eval()
    loaded = model.load_state_dict(ours(**changes).state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if "inv_freq" not in name]
    return model


def batch(side: int = 28, extra: int = 2) -> dict[str, Tensor]:
    """Rows with two images, one image and none; padded on the left, on the right, and not; text before images.

    One token sees two images at once, and tokens after a sentence's end see none.
    """
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (3, 14), generator=generator)
    if extra:
        ids[0, 4] = ids[0, 6] = ids[0, 8] = ids[0, 10] = ids[1, 1] = ids[1, 3] = FAKE
        ids[0, 5] = ids[0, 9] = ids[1, 2] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 11:] = 0
    pixels = torch.randn((3, 2, 3, side, side), generator=generator, dtype=torch.float64)
    pixels[1, 1] = pixels[2] = 0
    seen = torch.zeros((3, 14, 2), dtype=torch.int64)
    seen[0, 5:9, 0] = seen[0, 9:, 1] = seen[0, 12, 0] = seen[1, 2:7, 0] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_attention_mask": seen}


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_close(mine: Tensor, other: Tensor, name: str, limit: float = 1e-12) -> None:
    mine, other = mine.detach(), other.detach()
    assert mine.shape == other.shape, f"{name} is {tuple(mine.shape)}, not {tuple(other.shape)}"
    error = float((mine - other).abs().max() / other.abs().max())
    assert error < limit, f"{name} differs by {error:.2e} of its largest value, the limit is {limit:.0e}"


def outputs(model: Any) -> dict[str, Tensor]:
    """Receives what leaves transformers' components, by our names of them."""
    trunk, found = model.model, {}
    places = {
        "vision.embeddings": trunk.vision_model.pre_layrnorm,
        **{f"vision.layers.{i}": layer for i, layer in enumerate(trunk.vision_model.encoder.layers)},
        **{
            f"text.cross_layers.{i * trunk.config.cross_layer_interval}": layer
            for i, layer in enumerate(trunk.gated_cross_attn_layers)
        },
        **{f"text.layers.{i}": layer for i, layer in enumerate(trunk.layers)},
        "text.embeddings": trunk.embed_tokens,
        "text.norm": trunk.norm,
    }

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in places.items():
        module.register_forward_hook(keep(name))
    return found


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_components_logits_and_decode_steps_equal_transformers_in_float64(kind: str, implementation: str) -> None:
    model, reference = ours(**KINDS[kind]), theirs(**KINDS[kind])
    model.model.implementation = implementation
    extra = model.config.additional_vocab_size
    inputs = batch(extra=extra)
    mask = inputs["attention_mask"]
    real = mask.bool()
    left = outputs(reference)
    with torch.no_grad():
        whole = reference(**inputs, position_ids=positions(mask), use_cache=True)
    left = dict(left)
    runtime = IdeficsRuntime(model)
    step = runtime.prefill(inputs, max_length=20, taps=True)
    resampled = sorted(name for name in step.taps if name.startswith("resampler."))
    assert resampled == [f"resampler.blocks.{i}" for i in range(2 if model.config.use_resampler else 0)]
    assert set(step.taps) - {COUNTER, *resampled} == set(left), "every component has its state"
    for name, state in left.items():
        text = name.startswith("text.")
        assert_close(step.taps[name][real] if text else step.taps[name], state[real] if text else state, name)
    assert_close(runtime.encode(inputs), whole.image_hidden_states, "image features")
    assert_close(runtime.head(step.hidden)[real], whole.logits[real], "logits")

    given = {idefics.features_name(model.config): whole.image_hidden_states}
    past, at = whole.past_key_values, torch.tensor([11, 11, 14])  # the next position of every row
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        tokens = torch.randint(3, VOCABULARY + extra, (3,), generator=generator)
        mask = torch.cat((mask, torch.ones((3, 1), dtype=torch.int64)), dim=1)
        with torch.no_grad():
            other = reference(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=at[:, None],
                past_key_values=past,
                image_attention_mask=inputs["image_attention_mask"][:, -1:],
                use_cache=True,
                **given,
            )
        past, at = other.past_key_values, at + 1
        step = runtime.decode(step, tokens)
        assert_close(step.logits, other.logits[:, -1], "logits of a step", 1e-11)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("height", "width"), [(42, 42), (28, 42), (35, 21), (14, 56), (30, 44)])
def test_pictures_of_another_size_equal_transformers_with_interpolated_positions(height: int, width: int) -> None:
    pixels = torch.randn((2, 1, 3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        tower = theirs().model.vision_model
        other = tower(pixel_values=pixels[:, 0], interpolate_pos_encoding=True).last_hidden_state
    found = idefics.encode_images(ours().model, pixels, interpolate=True)[:, 0]
    assert_close(found, other, "image features")


def test_positions_of_the_usual_size_are_the_table() -> None:
    pixels = batch()["pixel_values"]
    usual = idefics.encode_images(ours().model, pixels)
    assert torch.equal(idefics.encode_images(ours().model, pixels, interpolate=True), usual)
    with pytest.raises(ValueError, match="hold pictures of 42 x 42; the model is for 28 x 28, other sizes need"):
        idefics.encode_images(ours().model, batch(side=42)["pixel_values"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_keys_and_values_of_images_are_computed_once(kind: str, implementation: str) -> None:
    model = ours(**KINDS[kind])
    model.model.implementation = implementation
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    blocks = len(model.model.gated_cross_attn_layers)
    runtime = IdeficsRuntime(model)
    step = runtime.prefill(batch(extra=model.config.additional_vocab_size), max_length=30, taps=True)
    assert sorted(calls) == sorted({*calls}), "a projection of image features ran more than once in the prefill"
    assert len(calls) == 2 * blocks, "keys and values of every block"
    for _ in range(8):
        step = runtime.decode(step, step.logits.argmax(-1), taps=True)
    assert len(calls) == 2 * blocks, f"decode steps projected image features {len(calls) - 2 * blocks} times more"
    assert step.taps[COUNTER].tolist() == [1] * blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoding_step_by_step_equals_all_at_once(kind: str, implementation: str) -> None:
    model = ours(**KINDS[kind])
    model.model.implementation = implementation
    inputs = batch(extra=model.config.additional_vocab_size)
    runtime = IdeficsRuntime(model)
    features = runtime.encode(inputs)
    step = runtime.prefill(inputs, features, max_length=20)
    forced = torch.randint(3, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(1))
    logits = []
    for index in range(4):
        step = runtime.decode(step, forced[:, index])
        logits.append(step.logits)
    seen = inputs["image_attention_mask"]
    longer = {
        "input_ids": torch.cat((inputs["input_ids"], forced), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones((3, 4), dtype=torch.int64)), dim=1),
        "image_attention_mask": torch.cat((seen, seen[:, -1:].expand(-1, 4, -1)), dim=1),
    }
    whole = runtime.prefill(longer, features, max_length=20)
    assert_close(torch.stack(logits, dim=1), runtime.head(whole.hidden)[:, -4:], "logits of four steps", 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_two_pieces_is_the_prompt(kind: str) -> None:
    model = ours(**KINDS[kind])
    inputs = batch(extra=model.config.additional_vocab_size)
    runtime = IdeficsRuntime(model)
    wanted = runtime.prefill(inputs, max_length=20).hidden
    features = runtime.encode(inputs)
    x, mask = model.model.embed_tokens(inputs["input_ids"]), inputs["attention_mask"].bool()
    places, cache, parts = positions(inputs["attention_mask"]), runtime.new_cache(3, 20), []
    for start, stop in ((0, 9), (9, 14)):  # every piece brings all images, which replace those of the one before
        piece = x[:, start:stop]
        images = idefics.images_for(model.model, features, inputs["image_attention_mask"][:, start:stop], piece)
        parts.append(idefics.run(model.model, piece, places[:, start:stop], mask[:, :stop], cache, images))
    real = inputs["attention_mask"].bool()
    assert_close(torch.cat(parts, dim=1)[real], wanted[real], "states", 1e-11)
    assert cache.cross is not None
    assert set(cache.cross.computed.values()) == {2}
    assert cache.cross[0][0].shape[2] == features.shape[1] * features.shape[2], "later tokens read them once"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_and_without_padding_is_the_row_in_the_batch(kind: str) -> None:
    model = ours(**KINDS[kind])
    inputs = batch(extra=model.config.additional_vocab_size)
    runtime = IdeficsRuntime(model)
    together = runtime.head(runtime.prefill(inputs, max_length=20).hidden)
    for row, slots in enumerate((2, 1, 1)):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "pixel_values": inputs["pixel_values"][row : row + 1, :slots],
            "image_attention_mask": inputs["image_attention_mask"][row : row + 1, real, :slots],
        }
        found = runtime.head(runtime.prefill(alone, max_length=20).hidden)[0]
        assert_close(found, together[row, real], f"row {row}", 1e-11)


def test_a_token_that_sees_no_image_gets_the_feed_forward_branch_only() -> None:
    model = ours()
    block = model.model.gated_cross_attn_layers[0]
    x = torch.randn((1, 3, 32), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features = torch.randn((1, 2, 5, 24), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    seen = torch.tensor([[[0, 0], [0, 1], [1, 1]]])
    images = idefics.images_for(model.model, features, seen, x)
    shared = idefics.Pass(x, x, None, None, "eager")
    found = block(x, images, shared, 0)
    plain = x + block.alpha_dense.tanh() * block.mlp(block.post_attention_layernorm(x))
    assert_close(found[:, 0], plain[:, 0], "a token that sees nothing")
    assert float((found[:, 1:] - plain[:, 1:]).abs().min()) > 1e-6, "tokens that see an image change"
    moved = features.clone()
    moved[:, 0] += 1
    other = block(x, idefics.images_for(model.model, moved, seen, x), shared, 0)
    assert torch.equal(other[:, :2], found[:, :2]), "the second token does not see the first image"
    assert not torch.equal(other[:, 2], found[:, 2])


def test_a_mask_over_images_is_a_mask_over_their_features() -> None:
    bias, seeing = idefics.visible_features(torch.tensor([[[0, 0], [1, 0], [0, 3]]]), 2, torch.zeros(1))
    least = torch.finfo(torch.float32).min
    assert bias[0, 0].tolist() == [[least] * 4, [0, 0, least, least], [least, least, 0, 0]]
    assert seeing[0, :, 0].tolist() == [False, True, True]
    same, _ = idefics.visible_features(torch.tensor([[[False, False], [True, False]]]), 1, torch.zeros(1))
    assert same[0, 0].tolist() == [[least, least], [0, least]], "a mask of the kind that texts without images have"


def test_additional_ids_have_a_table_and_a_head_of_their_own() -> None:
    model = ours()
    table = model.model.embed_tokens
    assert table.additional_embedding is not None
    assert model.lm_head.additional_fc is not None
    found = table(torch.tensor([[0, 59, 60, 61]]))[0]
    assert torch.equal(found, torch.cat((table.weight[[0, 59]], table.additional_embedding.weight)))
    logits = model.lm_head(found)
    assert logits.shape == (4, 62)
    assert torch.equal(logits[:, 60:], found @ model.lm_head.additional_fc.weight.T)
    runtime = IdeficsRuntime(model)
    assert (runtime.vocabulary, runtime.ids) == (62, 62), "both kinds can be read and chosen"


def test_a_blind_model_is_what_closed_gates_make() -> None:
    model, inputs = ours(), batch()
    for name, parameter in model.named_parameters():
        if name.endswith("alpha_cross_attn"):
            parameter.zero_()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    runtime = IdeficsRuntime(model)
    seeing = runtime.prefill(inputs, max_length=20).logits
    assert torch.equal(runtime.prefill(other, max_length=20).logits, seeing), "closed gates have to hide the image"
    runtime = IdeficsRuntime(ours())
    moved = runtime.prefill(other, max_length=20).logits - runtime.prefill(inputs, max_length=20).logits
    assert float(moved[0].abs().max()) > 0.1, "open gates have to let the image through"
    assert float(moved[2].abs().max()) == 0, "a row that sees no image"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_float64(kind: str, dtype: torch.dtype) -> None:
    gold_model = ours(**KINDS[kind])
    inputs = batch(extra=gold_model.config.additional_vocab_size)
    gold = IdeficsRuntime(gold_model).prefill(inputs, max_length=20).logits
    found = IdeficsRuntime(ours(dtype, **KINDS[kind])).prefill(inputs, max_length=20).logits
    limit = {torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    assert_close(found.double(), gold, f"logits in {dtype}", limit)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixel_values": None}, "Idefics needs exactly one of pixel_values, image_encoder_embeddings and"),
        ({"image_attention_mask": None}, "image_attention_mask is missing; it says which tokens see which images"),
        ({"image_attention_mask": torch.ones((3, 13, 2))}, r"image_attention_mask is \(3, 13, 2\); it has to be"),
        ({"image_attention_mask": torch.ones((3, 14, 3))}, r"\(batch, tokens, images\), here \(3, 14, 2\)"),
        ({"pixel_values": torch.zeros((3, 3, 28, 28))}, r"pixel_values is \(3, 3, 28, 28\); it has to be \(batch"),
        ({"pixel_values": torch.zeros((3, 2, 4, 28, 28))}, r"\(batch, images, 3, height, width\)"),
        ({"pixel_values": torch.zeros((2, 2, 3, 28, 28))}, r"image features are \(2, 2, 17, 24\); they have to be"),
        ({"input_ids": torch.full((3, 14), 62)}, "input_ids holds 62; the vocabulary is 0 to 61"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Tensor | None], words: str) -> None:
    inputs = {name: value for name, value in {**batch(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        IdeficsRuntime(ours()).prefill(inputs, max_length=20)


def test_the_cache_shows_the_layers_of_the_decoder_only() -> None:
    model = ours()
    cache = IdeficsRuntime(model).prefill(batch(), max_length=20).cache
    assert [tuple(keys.shape) for keys, _ in cache] == [(3, 4, 14, 8)] * 4
    assert len(cache) == 4
    with pytest.raises(IndexError, match="layer 4 is not in the cache; layers are 0 to 3"):
        cache[4]
    assert cache.cross is not None
    assert [tuple(cache.cross[block][0].shape) for block in (0, 1)] == [(3, 4, 2 * 17, 8)] * 2
