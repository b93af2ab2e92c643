"""The recipe of Idefics3's fixture checkpoints: configurations, files of the processor, sizes and scales of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmqual_adapters import vocabulary
from vlmqual_adapters.drawing import SEED, Draws, json_bytes
from vlmqual_contract.target import Array

TINY = "idefics3-tiny"
RELEASED_GEOMETRY = "idefics3-8b-processor"


def tiny_config() -> dict[str, Any]:
    """`config.json` of the tiny checkpoint: 64 patches and 16 image tokens a frame; 8 heads share 4 key/value heads.

    Rotary scaling as in Llama 3 with so short an original context that each of its three branches holds for one of the
    four frequencies within a few hundred positions.
    """
    ids = vocabulary.token_ids()
    text = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids[vocabulary.BOS],
        "eos_token_id": ids[vocabulary.EOS],
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
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
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "image_size": 112,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-06,
        "model_type": "idefics3",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 14,
    }
    return _config(text, vision)


def released_config() -> dict[str, Any]:
    """`config.json` with the geometry of the released 8B model: 364-pixel frames, 169 image tokens each. No weights."""
    text = tiny_config()["text_config"] | {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    }
    vision = tiny_config()["vision_config"] | {
        "hidden_size": 1152,
        "image_size": 364,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    }
    return _config(text, vision)


def _config(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": vocabulary.token_ids()[vocabulary.IMAGE],
        "model_type": "idefics3",
        "scale_factor": 2,
        "text_config": dict(text),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        "vision_config": dict(vision),
    }


def image_tokens(config: Mapping[str, Any]) -> int:
    """Image tokens of a frame: patches divided by the square of the scale factor. IDEFICS3-MODEL-029."""
    vision = config["vision_config"]
    return int((vision["image_size"] // vision["patch_size"]) ** 2 // config["scale_factor"] ** 2)


def processor_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """File names to contents of everything but the weights; images are enlarged to four frames on the longer side."""
    ids = vocabulary.token_ids()
    side = config["vision_config"]["image_size"]
    generation = {
        "_from_model_config": True,
        "bos_token_id": ids[vocabulary.BOS],
        "eos_token_id": [ids[vocabulary.EOS], ids[vocabulary.END_OF_UTTERANCE]],
        "pad_token_id": ids[vocabulary.PAD],
        "transformers_version": "4.46.3",
    }
    pixels = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": side},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 4 * side},
    }
    about = {"image_seq_len": image_tokens(config), "processor_class": "Idefics3Processor"}
    return {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation),
        "preprocessor_config.json": json_bytes(pixels),
        "processor_config.json": json_bytes(about),
        "chat_template.json": json_bytes({"chat_template": vocabulary.chat_template()}),
        "tokenizer.json": json_bytes(vocabulary.tokenizer_json(), ascii_only=False),
        "tokenizer_config.json": json_bytes(vocabulary.tokenizer_config()),
        "special_tokens_map.json": json_bytes(vocabulary.special_tokens_map()),
    }


def tiny_weights(config: Mapping[str, Any], seed: int = SEED) -> dict[str, Array]:
    """Parameter names of the checkpoint to bfloat16 bit patterns (uint16), in the order in which they are drawn."""
    draws = Draws(seed)
    return {name: draws.normal(shape, scale, mean) for name, shape, scale, mean in _parameters(config)}


def _parameters(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, standard deviation, mean.

    The scales make scores of attention vary by about two (far from uniform), logits by about two, and let every layer
    change its residual stream by a good part, so that a wrong rule anywhere is seen at the end.
    """
    vision, text = config["vision_config"], config["text_config"]
    wide, patch, inner = vision["hidden_size"], vision["patch_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // patch) ** 2
    tower = "model.vision_model"
    yield f"{tower}.embeddings.patch_embedding.weight", (wide, vision["num_channels"], patch, patch), 0.06, 0.0
    yield f"{tower}.embeddings.patch_embedding.bias", (wide,), 0.2, 0.0
    yield f"{tower}.embeddings.position_embedding.weight", (patches, wide), 0.5, 0.0
    for index in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{index}"
        yield f"{layer}.layer_norm1.weight", (wide,), 0.2, 1.0
        yield f"{layer}.layer_norm1.bias", (wide,), 0.1, 0.0
        for name, gain in (("q_proj", 1.3), ("k_proj", 1.3), ("v_proj", 1.0), ("out_proj", 0.7)):
            yield f"{layer}.self_attn.{name}.weight", (wide, wide), gain / wide**0.5, 0.0
            yield f"{layer}.self_attn.{name}.bias", (wide,), 0.2, 0.0
        yield f"{layer}.layer_norm2.weight", (wide,), 0.2, 1.0
        yield f"{layer}.layer_norm2.bias", (wide,), 0.1, 0.0
        yield f"{layer}.mlp.fc1.weight", (inner, wide), 1.5 / wide**0.5, 0.0
        yield f"{layer}.mlp.fc1.bias", (inner,), 0.3, 0.0
        yield f"{layer}.mlp.fc2.weight", (wide, inner), 1.0 / inner**0.5, 0.0
        yield f"{layer}.mlp.fc2.bias", (wide,), 0.1, 0.0
    yield f"{tower}.post_layernorm.weight", (wide,), 0.2, 1.0
    yield f"{tower}.post_layernorm.bias", (wide,), 0.1, 0.0

    width, gated, words = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    shuffled = wide * config["scale_factor"] ** 2
    yield "model.connector.modality_projection.proj.weight", (width, shuffled), 1.2 / shuffled**0.5, 0.0
    heads = text["num_attention_heads"] * text["head_dim"]
    shared = text["num_key_value_heads"] * text["head_dim"]
    yield "model.text_model.embed_tokens.weight", (words, width), 1.0, 0.0
    for index in range(text["num_hidden_layers"]):
        layer = f"model.text_model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (width,), 0.2, 1.0
        yield f"{layer}.self_attn.q_proj.weight", (heads, width), 1.5 / width**0.5, 0.0
        yield f"{layer}.self_attn.k_proj.weight", (shared, width), 1.5 / width**0.5, 0.0
        yield f"{layer}.self_attn.v_proj.weight", (shared, width), 1.2 / width**0.5, 0.0
        yield f"{layer}.self_attn.o_proj.weight", (width, heads), 1.2 / heads**0.5, 0.0
        yield f"{layer}.post_attention_layernorm.weight", (width,), 0.2, 1.0
        yield f"{layer}.mlp.gate_proj.weight", (gated, width), 1.5 / width**0.5, 0.0
        yield f"{layer}.mlp.up_proj.weight", (gated, width), 1.2 / width**0.5, 0.0
        yield f"{layer}.mlp.down_proj.weight", (width, gated), 1.0 / gated**0.5, 0.0
    yield "model.text_model.norm.weight", (width,), 0.2, 1.0
    yield "lm_head.weight", (words, width), 2.0 / width**0.5, 0.0
