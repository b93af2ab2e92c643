"""Idefics in float64 numpy from its written rules: shapes of all parameters, and logits, for any settings.

Legend of shapes: I pictures, L positions or latents of a picture, B rows, S token positions, N image slots, H heads.
The rules are those of the documentation and of the documented version's source (4.46.3); nothing here comes from a
library under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import erf
from typing import Any

import numpy as np

from vlmqual_contract.target import Array

Shapes = dict[str, tuple[int, ...]]
LEAST = np.finfo(np.float32).min
ROTARY_BASE, RESAMPLER_EPS = 10000.0, 1e-5

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


# shapes -----------------------------------------------------------------------------------------------------------


def parameter_shapes(settings: Mapping[str, Any]) -> Shapes:
    """Name and shape of every parameter of the model with head."""
    width, more = settings["hidden_size"], settings["additional_vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (settings["vocab_size"], width), "model.norm.weight": (width,)}
    found["lm_head.weight"] = (settings["vocab_size"], width)
    if more:
        found["model.embed_tokens.additional_embedding.weight"] = (more, width)
        found["lm_head.additional_fc.weight"] = (more, width)
    found |= _under("model.vision_model.", _vision(settings["vision_config"]))
    if settings["use_resampler"]:
        resampler = _resampler(settings["perceiver_config"], settings["vision_config"]["embed_dim"])
        found |= _under("model.perceiver_resampler.", resampler)
    for index in range(settings["num_hidden_layers"]):
        found |= _under(f"model.layers.{index}.", _block(settings, "self_attn", width))
    source = settings["vision_config"]["embed_dim"]
    for index in range(settings["num_hidden_layers"] // settings["cross_layer_interval"]):
        block = _block(settings, "cross_attn", source)
        gate = (1,) if settings["alpha_type"] == "float" else (1, 1, width)
        block |= {"alpha_cross_attn": gate, "alpha_dense": gate}
        if settings["qk_layer_norms"]:
            head = (width // settings["num_attention_heads"],)
            block |= {"cross_attn.q_layer_norm.weight": head, "cross_attn.k_layer_norm.weight": head}
        found |= _under(f"model.gated_cross_attn_layers.{index}.", block)
    return found


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _vision(vision: Mapping[str, Any]) -> Shapes:
    width, patch = vision["embed_dim"], vision["patch_size"]
    found: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, vision["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2 + 1, width),
    }
    found |= _norm("pre_layrnorm", width) | _norm("post_layernorm", width)
    for index in range(vision["num_hidden_layers"]):
        layer = _norm("layer_norm1", width) | _norm("layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer |= _linear(f"self_attn.{name}", width, width)
        layer |= _linear("mlp.fc1", vision["intermediate_size"], width)
        layer |= _linear("mlp.fc2", width, vision["intermediate_size"])
        found |= _under(f"encoder.layers.{index}.", layer)
    return found


def _resampler(perceiver: Mapping[str, Any], width: int) -> Shapes:
    inner = perceiver["resampler_n_heads"] * perceiver["resampler_head_dim"]
    found: Shapes = {"latents": (perceiver["resampler_n_latents"], width), **_norm("layer_norm", width)}
    for index in range(perceiver["resampler_depth"]):
        block: Shapes = {f"0.{name}_proj.weight": (inner, width) for name in "qkv"}
        block |= {"0.output_proj.weight": (width, inner)}
        block |= _norm("0.context_layer_norm", width) | _norm("0.latents_layer_norm", width)
        if perceiver["qk_layer_norms_perceiver"]:
            for name in "qk":
                block |= _norm(f"0.{name}_layer_norm", perceiver["resampler_head_dim"])
        block |= {"1.fc.weight": (4 * width, width), "1.c_proj.weight": (width, 4 * width), **_norm("1.ln", width)}
        found |= _under(f"blocks.{index}.", block)
    return found


def _block(settings: Mapping[str, Any], attention: str, source: int) -> Shapes:
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    return {
        f"{attention}.q_proj.weight": (width, width),
        f"{attention}.k_proj.weight": (width, source),
        f"{attention}.v_proj.weight": (width, source),
        f"{attention}.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }


# values -----------------------------------------------------------------------------------------------------------


class Reference:
    """A model with head.

    Args:
        settings: every documented field.
        weights: parameters by name.
    """

    def __init__(self, settings: Mapping[str, Any], weights: Mapping[str, Array]) -> None:
        self.settings = settings
        self._weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def run(self, pixel_values: Array, **text: Array) -> tuple[Array, Array]:
        """Image features and logits of the documented inputs."""
        features = self.image_features(pixel_values)
        return features, self.logits(**text, features=features)

    def image_features(self, pixels: Array) -> Array:
        """(B, N, C, side, side) to (B, N, L, E): what the cross-attention blocks read."""
        x = self._tower(pixels.astype(np.float64).reshape(-1, *pixels.shape[2:]))
        if self.settings["use_resampler"]:
            x = self._resample(x)
        return x.reshape(*pixels.shape[:2], *x.shape[1:])

    def logits(self, input_ids: Array, attention_mask: Array, image_attention_mask: Array, features: Array) -> Array:
        """(B, S, V); positions of padding hold nothing that can be compared."""
        s = self.settings
        table = self._weights["model.embed_tokens.weight"]
        if s["additional_vocab_size"]:
            table = np.concatenate([table, self._weights["model.embed_tokens.additional_embedding.weight"]])
        x = table[input_ids]
        tokens = input_ids.shape[1]
        causal = np.tril(np.ones((tokens, tokens), bool)) & (attention_mask[:, None] != 0)
        seen = np.repeat(image_attention_mask != 0, features.shape[2], axis=-1)
        positions = np.where(attention_mask != 0, attention_mask.cumsum(-1) - 1, 1)
        states = features.reshape(len(x), -1, features.shape[-1])
        for index in range(s["num_hidden_layers"]):
            if index % s["cross_layer_interval"] == 0:
                x = self._cross(x, states, seen, f"model.gated_cross_attn_layers.{index // s['cross_layer_interval']}")
            x = self._decode(x, causal, positions, f"model.layers.{index}")
        x = self._rms(x, "model.norm")
        made = self._linear(x, "lm_head")
        if s["additional_vocab_size"]:
            made = np.concatenate([made, self._linear(x, "lm_head.additional_fc")], axis=-1)
        return made

    def _tower(self, pixels: Array) -> Array:
        vision, prefix = self.settings["vision_config"], "model.vision_model"
        patch, eps = vision["patch_size"], vision["layer_norm_eps"]
        kernel = self._weights[f"{prefix}.embeddings.patch_embedding.weight"]
        grid = range(0, pixels.shape[-1] - patch + 1, patch)
        cut = [pixels[:, :, y : y + patch, x : x + patch] for y in grid for x in grid]
        patches = np.stack([np.einsum("icyx,dcyx->id", each, kernel) for each in cut], axis=1)
        first = np.broadcast_to(self._weights[f"{prefix}.embeddings.class_embedding"], (len(pixels), 1, len(kernel)))
        x = np.concatenate([first, patches], axis=1) + self._weights[f"{prefix}.embeddings.position_embedding.weight"]
        x = self._norm(x, f"{prefix}.pre_layrnorm", eps)
        for index in range(vision["num_hidden_layers"]):
            name = f"{prefix}.encoder.layers.{index}"
            y = self._norm(x, f"{name}.layer_norm1", eps)
            q, k, v = (self._linear(y, f"{name}.self_attn.{each}_proj") for each in "qkv")
            x = x + self._linear(_attend(q, k, v, vision["num_attention_heads"]), f"{name}.self_attn.out_proj")
            y = self._linear(self._norm(x, f"{name}.layer_norm2", eps), f"{name}.mlp.fc1")
            x = x + self._linear(ACTIVATIONS[vision["hidden_act"]](y), f"{name}.mlp.fc2")
        return x

    def _resample(self, context: Array) -> Array:
        perceiver, prefix, eps = self.settings["perceiver_config"], "model.perceiver_resampler", RESAMPLER_EPS
        latents = self._weights[f"{prefix}.latents"]
        x = np.broadcast_to(latents, (len(context), *latents.shape))
        for index in range(perceiver["resampler_depth"]):
            name = f"{prefix}.blocks.{index}"
            own = self._norm(x, f"{name}.0.latents_layer_norm", eps)
            both = np.concatenate([self._norm(context, f"{name}.0.context_layer_norm", eps), own], axis=1)
            q, k, v = (
                self._linear(y, f"{name}.0.{each}_proj") for each, y in zip("qkv", (own, both, both), strict=True)
            )
            heads = perceiver["resampler_n_heads"]
            norm = None
            if perceiver["qk_layer_norms_perceiver"]:
                norm = partial(self._head_norm, name=f"{name}.0", eps=eps)
            x = x + self._linear(_attend(q, k, v, heads, norm=norm), f"{name}.0.output_proj")
            y = np.maximum(self._linear(self._norm(x, f"{name}.1.ln", eps), f"{name}.1.fc"), 0)
            x = x + self._linear(y, f"{name}.1.c_proj")
        return self._norm(x, f"{prefix}.layer_norm", eps)

    def _cross(self, x: Array, states: Array, seen: Array, name: str) -> Array:
        y = self._rms(x, f"{name}.input_layernorm")
        q, k, v = (
            self._linear(part, f"{name}.cross_attn.{each}_proj")
            for each, part in zip("qkv", (y, states, states), strict=True)
        )
        norm = partial(self._head_rms, name=f"{name}.cross_attn") if self.settings["qk_layer_norms"] else None
        read = _attend(q, k, v, self.settings["num_attention_heads"], seen, norm=norm)
        read = self._linear(read, f"{name}.cross_attn.o_proj") * seen.any(-1, keepdims=True)
        x = x + np.tanh(self._weights[f"{name}.alpha_cross_attn"]) * read
        fed = self._feed(self._rms(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        return np.asarray(x + np.tanh(self._weights[f"{name}.alpha_dense"]) * fed)

    def _decode(self, x: Array, causal: Array, positions: Array, name: str) -> Array:
        heads = self.settings["num_attention_heads"]
        y = self._rms(x, f"{name}.input_layernorm")
        q, k, v = (self._linear(y, f"{name}.self_attn.{each}_proj") for each in "qkv")
        turned = partial(_rotated, positions=positions)
        x = x + self._linear(_attend(q, k, v, heads, causal, norm=turned), f"{name}.self_attn.o_proj")
        return x + self._feed(self._rms(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")

    def _feed(self, x: Array, name: str) -> Array:
        gate = ACTIVATIONS[self.settings["hidden_act"]](self._linear(x, f"{name}.gate_proj"))
        return self._linear(gate * self._linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def _linear(self, x: Array, name: str) -> Array:
        made = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return np.asarray(made if bias is None else made + bias)

    def _rms(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.settings["rms_norm_eps"])
        return np.asarray(x / scale * self._weights[f"{name}.weight"])

    def _head_rms(self, x: Array, each: str, name: str) -> Array:
        return self._rms(x, f"{name}.{each}_layer_norm")

    def _head_norm(self, x: Array, each: str, name: str, eps: float) -> Array:
        return self._norm(x, f"{name}.{each}_layer_norm", eps)

    def _norm(self, x: Array, name: str, eps: float) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return np.asarray(centred / scale * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"])


def _attend(
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    seen: Array | None = None,
    norm: Callable[[Array, str], Array] | None = None,
) -> Array:
    """Attention over heads, (B, S, width) each; `norm` changes queries and keys of the heads, (B, H, S, d)."""
    q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(0, 2, 1, 3) for part in (q, k, v))
    if norm is not None:
        q, k = norm(q, "q"), norm(k, "k")
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    if seen is not None:
        scores = np.where(seen[:, None], scores, LEAST)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1))


def _rotated(x: Array, _: str, positions: Array) -> Array:
    """(B, H, S, d), the two halves of a head turned by the position's angles."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * ROTARY_BASE ** (-2 * np.arange(half) / x.shape[-1])
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
