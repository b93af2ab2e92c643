"""The recipe of Idefics's fixture checkpoints: configurations, files of the processor, sizes and scales of weights.

Two tiny ones, since a model has a resampler or not: the one without it has scalar gates before every second layer, the
other vector gates before every layer, and norms of queries and keys in cross-attention and resampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmqual_adapters import vocabulary_idefics as vocabulary
from vlmqual_adapters.drawing import SEED, Draws, json_bytes
from vlmqual_contract.target import Array

TINY = "idefics-tiny"
RESAMPLER_TINY = "idefics-resampler-tiny"
RELEASED_GEOMETRY = "idefics-9b-processor"
_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]


def tiny_config() -> dict[str, Any]:
    """`config.json` of the checkpoint without resampler: 16 patches an image; every head count is a multiple of 4."""
    ids = vocabulary.token_ids()
    return {
        "additional_vocab_size": len(vocabulary.ADDITIONAL),
        "alpha_initializer": "zeros",
        "alpha_type": "float",
        "alphas_initializer_range": 0.0,
        "architectures": ["IdeficsForVisionText2Text"],
        "bos_token_id": ids[vocabulary.BOS],
        "cross_layer_activation_function": "swiglu",
        "cross_layer_interval": 2,
        "dropout": 0.0,
        "eos_token_id": ids[vocabulary.EOS],
        "freeze_lm_head": False,
        "freeze_text_layers": False,
        "freeze_text_module_exceptions": [],
        "freeze_vision_layers": False,
        "freeze_vision_module_exceptions": [],
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "model_type": "idefics",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "pad_token_id": ids[vocabulary.UNKNOWN],
        "perceiver_config": {
            "model_type": "idefics_perciever",
            "qk_layer_norms_perceiver": False,
            "resampler_depth": 2,
            "resampler_head_dim": 12,
            "resampler_n_heads": 4,
            "resampler_n_latents": 6,
            "use_resampler": False,
        },
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        "use_resampler": False,
        "vision_config": {
            "attention_dropout": 0.0,
            "embed_dim": 32,
            "hidden_act": "gelu",
            "image_size": 56,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": 64,
            "layer_norm_eps": 1e-05,
            "model_type": "idefics_vision",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 3,
            "patch_size": 14,
        },
        "vocab_size": vocabulary.VOCABULARY,
    }


def resampler_config() -> dict[str, Any]:
    """`config.json` of the checkpoint with resampler."""
    tiny = tiny_config()
    return tiny | {
        "alpha_type": "vector",
        "cross_layer_interval": 1,
        "num_hidden_layers": 4,
        "perceiver_config": tiny["perceiver_config"] | {"qk_layer_norms_perceiver": True, "use_resampler": True},
        "qk_layer_norms": True,
        "use_resampler": True,
    }


def released_config() -> dict[str, Any]:
    """`config.json` with the geometry of the released 9B model: images of 224 pixels, 64 latents each."""
    resampler = resampler_config()
    return resampler | {
        "alpha_type": "float",
        "cross_layer_interval": 4,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "perceiver_config": resampler["perceiver_config"]
        | {"resampler_depth": 6, "resampler_head_dim": 96, "resampler_n_heads": 16, "resampler_n_latents": 64},
        "vision_config": resampler["vision_config"]
        | {
            "embed_dim": 1280,
            "image_size": 224,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
        },
    }


#: Checkpoints by name; those without weights at the end.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    TINY: tiny_config(),
    RESAMPLER_TINY: resampler_config(),
    RELEASED_GEOMETRY: released_config(),
}


def processor_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """File names to contents of everything but the weights.

    The tokenizers of the tiny checkpoints list `<end_of_utterance>` as that of the released instruct model does; with
    the released geometry comes that of the base model, which the documentation's example is written for.
    """
    ids = vocabulary.token_ids()
    utterances = config["vision_config"]["image_size"] != released_config()["vision_config"]["image_size"]
    generation = {
        "_from_model_config": True,
        "bos_token_id": ids[vocabulary.BOS],
        "eos_token_id": ids[vocabulary.EOS],
        "pad_token_id": ids[vocabulary.UNKNOWN],
        "transformers_version": "4.46.3",
    }
    pixels = {
        "image_mean": _MEAN,
        "image_num_channels": config["vision_config"]["num_channels"],
        "image_processor_type": "IdeficsImageProcessor",
        "image_size": config["vision_config"]["image_size"],
        "image_std": _STD,
        "processor_class": "IdeficsProcessor",
    }
    return {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation),
        "preprocessor_config.json": json_bytes(pixels),
        "tokenizer.json": json_bytes(vocabulary.tokenizer_json(), ascii_only=False),
        "tokenizer_config.json": json_bytes(vocabulary.tokenizer_config(utterances)),
        "special_tokens_map.json": json_bytes(vocabulary.special_tokens_map(utterances)),
    }


def tiny_weights(config: Mapping[str, Any], seed: int = SEED) -> dict[str, Array]:
    """Parameter names of a checkpoint to bfloat16 bit patterns (uint16), in the order in which they are drawn."""
    draws = Draws(seed)
    return {name: draws.normal(shape, scale, mean) for name, shape, scale, mean in _parameters(config)}


Sizes = tuple[str, tuple[int, ...], float, float]


def _parameters(config: Mapping[str, Any]) -> Iterator[Sizes]:
    """Name, shape, standard deviation, mean.

    Every gate is open: tanh of it lies between about 0.4 and 0.8. Scores of attention vary by about two (far from
    uniform), logits by about two, and every layer changes its residual stream by a good part, so that a wrong rule
    anywhere is seen at the end.
    """
    yield from _vision_parameters(config["vision_config"])
    if config["use_resampler"]:
        yield from _resampler_parameters(config["perceiver_config"], config["vision_config"]["embed_dim"])
    width, words, more = config["hidden_size"], config["vocab_size"], config["additional_vocab_size"]
    yield "model.embed_tokens.weight", (words, width), 1.0, 0.0
    yield "model.embed_tokens.additional_embedding.weight", (more, width), 1.0, 0.0
    for block in range(config["num_hidden_layers"] // config["cross_layer_interval"]):
        yield from _cross_layer(f"model.gated_cross_attn_layers.{block}", config, block)
    for index in range(config["num_hidden_layers"]):
        yield from _layer(f"model.layers.{index}", "self_attn", config, width)
    yield "model.norm.weight", (width,), 0.2, 1.0
    yield "lm_head.weight", (words, width), 2.0 / width**0.5, 0.0
    yield "lm_head.additional_fc.weight", (more, width), 2.0 / width**0.5, 0.0


def _vision_parameters(vision: Mapping[str, Any]) -> Iterator[Sizes]:
    base, wide, patch, inner = (
        "model.vision_model",
        vision["embed_dim"],
        vision["patch_size"],
        vision["intermediate_size"],
    )
    positions = (vision["image_size"] // patch) ** 2 + 1
    yield f"{base}.embeddings.class_embedding", (wide,), 0.8, 0.0
    yield f"{base}.embeddings.patch_embedding.weight", (wide, vision["num_channels"], patch, patch), 0.06, 0.0
    yield f"{base}.embeddings.position_embedding.weight", (positions, wide), 0.8, 0.0
    for name in ("pre_layrnorm", "post_layernorm"):
        yield from _norm(f"{base}.{name}", wide)
    for index in range(vision["num_hidden_layers"]):
        layer = f"{base}.encoder.layers.{index}"
        yield from _norm(f"{layer}.layer_norm1", wide)
        for name, gain in (("q_proj", 1.4), ("k_proj", 1.4), ("v_proj", 1.0), ("out_proj", 0.8)):
            yield f"{layer}.self_attn.{name}.weight", (wide, wide), gain / wide**0.5, 0.0
            yield f"{layer}.self_attn.{name}.bias", (wide,), 0.3, 0.0
        yield from _norm(f"{layer}.layer_norm2", wide)
        yield f"{layer}.mlp.fc1.weight", (inner, wide), 1.5 / wide**0.5, 0.0
        yield f"{layer}.mlp.fc1.bias", (inner,), 0.3, 0.0
        yield f"{layer}.mlp.fc2.weight", (wide, inner), 1.0 / inner**0.5, 0.0
        yield f"{layer}.mlp.fc2.bias", (wide,), 0.1, 0.0


def _resampler_parameters(perceiver: Mapping[str, Any], wide: int) -> Iterator[Sizes]:
    base, head = "model.perceiver_resampler", perceiver["resampler_head_dim"]
    inner = perceiver["resampler_n_heads"] * head
    yield f"{base}.latents", (perceiver["resampler_n_latents"], wide), 1.0, 0.0
    for index in range(perceiver["resampler_depth"]):
        attention, feed = f"{base}.blocks.{index}.0", f"{base}.blocks.{index}.1"
        for name in ("context_layer_norm", "latents_layer_norm"):
            yield from _norm(f"{attention}.{name}", wide)
        if perceiver["qk_layer_norms_perceiver"]:
            for name in ("q_layer_norm", "k_layer_norm"):
                yield from _norm(f"{attention}.{name}", head, 1.5)
        for name, gain in (("q_proj", 1.5), ("k_proj", 1.5), ("v_proj", 1.2)):
            yield f"{attention}.{name}.weight", (inner, wide), gain / wide**0.5, 0.0
        yield f"{attention}.output_proj.weight", (wide, inner), 1.2 / inner**0.5, 0.0
        yield from _norm(f"{feed}.ln", wide)
        yield f"{feed}.fc.weight", (4 * wide, wide), 1.5 / wide**0.5, 0.0
        yield f"{feed}.c_proj.weight", (wide, 4 * wide), 1.0 / (4 * wide) ** 0.5, 0.0
    yield from _norm(f"{base}.layer_norm", wide)


def _norm(name: str, width: int, mean: float = 1.0) -> Iterator[Sizes]:
    yield f"{name}.weight", (width,), 0.2, mean
    yield f"{name}.bias", (width,), 0.1, 0.0


def _cross_layer(layer: str, config: Mapping[str, Any], block: int) -> Iterator[Sizes]:
    width = config["hidden_size"]
    gate = (1,) if config["alpha_type"] == "float" else (1, 1, width)
    # Every gate has a mean of its own, so that an exchange of two is seen.
    yield f"{layer}.alpha_cross_attn", gate, 0.08, 1.0 - 0.06 * block
    yield f"{layer}.alpha_dense", gate, 0.08, 0.6 + 0.05 * block
    if config["qk_layer_norms"]:  # far from 1, so that scores vary although both sides are normalised
        for name in ("q_layer_norm", "k_layer_norm"):
            yield f"{layer}.cross_attn.{name}.weight", (width // config["num_attention_heads"],), 0.3, 1.5
    yield from _layer(layer, "cross_attn", config, config["vision_config"]["embed_dim"])


def _layer(layer: str, attention: str, config: Mapping[str, Any], source: int) -> Iterator[Sizes]:
    width, gated = config["hidden_size"], config["intermediate_size"]
    yield f"{layer}.input_layernorm.weight", (width,), 0.2, 1.0
    yield f"{layer}.{attention}.q_proj.weight", (width, width), 1.5 / width**0.5, 0.0
    yield f"{layer}.{attention}.k_proj.weight", (width, source), 1.5 / source**0.5, 0.0
    yield f"{layer}.{attention}.v_proj.weight", (width, source), 1.2 / source**0.5, 0.0
    yield f"{layer}.{attention}.o_proj.weight", (width, width), 1.2 / width**0.5, 0.0
    yield f"{layer}.post_attention_layernorm.weight", (width,), 0.2, 1.0
    yield f"{layer}.mlp.gate_proj.weight", (gated, width), 1.5 / width**0.5, 0.0
    yield f"{layer}.mlp.up_proj.weight", (gated, width), 1.2 / width**0.5, 0.0
    yield f"{layer}.mlp.down_proj.weight", (width, gated), 1.0 / gated**0.5, 0.0
