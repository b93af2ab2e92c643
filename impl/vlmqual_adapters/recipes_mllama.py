"""The recipe of Mllama's fixture checkpoints: configurations, files of the processor, sizes and scales of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmqual_adapters import vocabulary_mllama as vocabulary
from vlmqual_adapters.drawing import SEED, Draws, json_bytes
from vlmqual_contract.target import Array

TINY = "mllama-tiny"
RELEASED_GEOMETRY = "mllama-11b-processor"
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
EXTRA_EMBEDDINGS = 8
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def tiny_config() -> dict[str, Any]:
    """`config.json` of the tiny checkpoint: 16 patches a tile; 8 heads share 4 key/value heads; every head count is a
    multiple of 4.

    Rotary scaling as in Llama 3 with so short an original context that each of its three branches holds for one of the
    four frequencies within a few hundred positions.
    """
    ids = vocabulary.token_ids()
    text = {
        "architectures": ["MllamaForCausalLM"],
        "bos_token_id": ids[vocabulary.BOS],
        "cross_attention_layers": [1, 4],
        "dropout": 0,
        "eos_token_id": ids[vocabulary.EOS],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "model_type": "mllama_text_model",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "pad_token_id": ids[vocabulary.PAD],
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary.VOCABULARY,
    }
    vision = {
        "attention_heads": 4,
        "hidden_act": "gelu",
        "hidden_size": 48,
        "image_size": 56,
        "initializer_range": 0.02,
        "intermediate_layers_indices": [1, 2, 4],
        "intermediate_size": 96,
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 2,
        "num_hidden_layers": 5,
        "patch_size": 14,
        "supported_aspect_ratios": RATIOS,
        "torch_dtype": "bfloat16",
        "vision_output_dim": 192,
    }
    return _config(text, vision)


def released_config() -> dict[str, Any]:
    """`config.json` with the geometry of the released 11B model: tiles of 560 pixels, 1601 positions each."""
    text = tiny_config()["text_config"] | {
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
    }
    vision = tiny_config()["vision_config"] | {
        "attention_heads": 16,
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "vision_output_dim": 7680,
    }
    return _config(text, vision)


def _config(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": vocabulary.token_ids()[vocabulary.IMAGE],
        "model_type": "mllama",
        "text_config": dict(text),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.2",
        "vision_config": dict(vision),
    }


def processor_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """File names to contents of everything but the weights. The released processor has the means of CLIP."""
    ids = vocabulary.token_ids()
    side = config["vision_config"]["image_size"]
    released = side == released_config()["vision_config"]["image_size"]
    generation = {
        "_from_model_config": True,
        "bos_token_id": ids[vocabulary.BOS],
        "eos_token_id": [ids[vocabulary.EOS], ids[vocabulary.END_OF_TURN]],
        "pad_token_id": ids[vocabulary.PAD],
        "transformers_version": "4.45.2",
    }
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _CLIP_MEAN if released else [0.5, 0.5, 0.5],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": _CLIP_STD if released else [0.5, 0.5, 0.5],
        "max_image_tiles": config["vision_config"]["max_num_tiles"],
        "processor_class": "MllamaProcessor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    return {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation),
        "preprocessor_config.json": json_bytes(pixels),
        "chat_template.json": json_bytes({"chat_template": vocabulary.chat_template()}),
        "tokenizer.json": json_bytes(vocabulary.tokenizer_json(), ascii_only=False),
        "tokenizer_config.json": json_bytes(vocabulary.tokenizer_config()),
        "special_tokens_map.json": json_bytes(vocabulary.special_tokens_map()),
    }


def tiny_weights(config: Mapping[str, Any], seed: int = SEED) -> dict[str, Array]:
    """Parameter names of the checkpoint to bfloat16 bit patterns (uint16), in the order in which they are drawn."""
    draws = Draws(seed)
    return {name: draws.normal(shape, scale, mean) for name, shape, scale, mean in _parameters(config)}


Sizes = tuple[str, tuple[int, ...], float, float]


def _parameters(config: Mapping[str, Any]) -> Iterator[Sizes]:
    """Name, shape, standard deviation, mean.

    Every gate is open: tanh of it lies between about 0.4 and 0.8. Scores of attention vary by about two (far from
    uniform), logits by about two, and every layer changes its residual stream by a good part, so that a wrong rule
    anywhere is seen at the end.
    """
    vision, text = config["vision_config"], config["text_config"]
    yield from _vision_parameters(vision)
    width = text["hidden_size"]
    yield (
        "multi_modal_projector.weight",
        (width, vision["vision_output_dim"]),
        1.2 / vision["vision_output_dim"] ** 0.5,
        0.0,
    )
    yield "multi_modal_projector.bias", (width,), 0.2, 0.0
    yield from _text_parameters(text)


def _vision_parameters(vision: Mapping[str, Any]) -> Iterator[Sizes]:
    wide, patch, tiles = vision["hidden_size"], vision["patch_size"], vision["max_num_tiles"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    ratios = len(vision["supported_aspect_ratios"]) + 1
    yield "vision_model.patch_embedding.weight", (wide, vision["num_channels"], patch, patch), 0.06, 0.0
    yield "vision_model.class_embedding", (wide,), 0.8, 0.0
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        yield f"vision_model.{name}.gate", (1,), 0.1, 0.7
        yield f"vision_model.{name}.embedding.weight", (ratios, tiles * wide), 0.6, 0.0
    yield "vision_model.gated_positional_embedding.gate", (1,), 0.1, 0.9
    yield "vision_model.gated_positional_embedding.embedding", (positions, wide), 0.8, 0.0
    table = (ratios, tiles * positions * wide)
    yield "vision_model.gated_positional_embedding.tile_embedding.weight", table, 0.6, 0.0
    for name in ("layernorm_pre", "layernorm_post"):
        yield f"vision_model.{name}.weight", (wide,), 0.2, 1.0
        yield f"vision_model.{name}.bias", (wide,), 0.1, 0.0
    for encoder, count in (("transformer", "num_hidden_layers"), ("global_transformer", "num_global_layers")):
        for index in range(vision[count]):
            yield from _vision_layer(
                f"vision_model.{encoder}.layers.{index}", vision, gated=count == "num_global_layers"
            )


def _vision_layer(layer: str, vision: Mapping[str, Any], *, gated: bool) -> Iterator[Sizes]:
    wide, inner = vision["hidden_size"], vision["intermediate_size"]
    if gated:
        yield f"{layer}.gate_attn", (1,), 0.1, 0.8
        yield f"{layer}.gate_ffn", (1,), 0.1, 0.6
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{layer}.{name}.weight", (wide,), 0.2, 1.0
        yield f"{layer}.{name}.bias", (wide,), 0.1, 0.0
    for name, gain in (("q_proj", 1.4), ("k_proj", 1.4), ("v_proj", 1.0), ("o_proj", 0.8)):
        yield f"{layer}.self_attn.{name}.weight", (wide, wide), gain / wide**0.5, 0.0
    yield f"{layer}.mlp.fc1.weight", (inner, wide), 1.5 / wide**0.5, 0.0
    yield f"{layer}.mlp.fc1.bias", (inner,), 0.3, 0.0
    yield f"{layer}.mlp.fc2.weight", (wide, inner), 1.0 / inner**0.5, 0.0
    yield f"{layer}.mlp.fc2.bias", (wide,), 0.1, 0.0


def _text_parameters(text: Mapping[str, Any]) -> Iterator[Sizes]:
    width, gated, words = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    head = width // text["num_attention_heads"]
    shared = text["num_key_value_heads"] * head
    base = "language_model.model"
    yield f"{base}.embed_tokens.weight", (words + EXTRA_EMBEDDINGS, width), 1.0, 0.0
    for index in range(text["num_hidden_layers"]):
        layer = f"{base}.layers.{index}"
        crossing = index in text["cross_attention_layers"]
        attention = "cross_attn" if crossing else "self_attn"
        yield f"{layer}.input_layernorm.weight", (width,), 0.2, 1.0
        yield f"{layer}.{attention}.q_proj.weight", (width, width), 1.5 / width**0.5, 0.0
        yield f"{layer}.{attention}.k_proj.weight", (shared, width), 1.5 / width**0.5, 0.0
        yield f"{layer}.{attention}.v_proj.weight", (shared, width), 1.2 / width**0.5, 0.0
        yield f"{layer}.{attention}.o_proj.weight", (width, width), 1.2 / width**0.5, 0.0
        if crossing:  # norms of heads far from 1, so that scores vary although both sides are normalised
            yield f"{layer}.cross_attn.q_norm.weight", (head,), 0.3, 1.5
            yield f"{layer}.cross_attn.k_norm.weight", (head,), 0.3, 1.5
            yield f"{layer}.cross_attn_attn_gate", (1,), 0.1, 0.9
            yield f"{layer}.cross_attn_mlp_gate", (1,), 0.1, 0.7
        yield f"{layer}.post_attention_layernorm.weight", (width,), 0.2, 1.0
        yield f"{layer}.mlp.gate_proj.weight", (gated, width), 1.5 / width**0.5, 0.0
        yield f"{layer}.mlp.up_proj.weight", (gated, width), 1.2 / width**0.5, 0.0
        yield f"{layer}.mlp.down_proj.weight", (width, gated), 1.0 / gated**0.5, 0.0
    yield f"{base}.norm.weight", (width,), 0.2, 1.0
    yield "language_model.lm_head.weight", (words, width), 2.0 / width**0.5, 0.0
