"""What at least two families share: norms, rotary embedding, attention, feed-forward blocks, the Llama decoder.

Legend of shapes: B rows, S query positions, K key positions, D width, H heads, G queries of one key head, d head width.
Head counts are -1 in views, so that a model whose projections were cut for one rank runs unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import LlamaConfig

Activation = Callable[[Tensor], Tensor]
Taps = dict[str, Tensor]  # hidden states by component

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "selu": F.selu,
    "silu": F.silu,
}


def activation(name: str) -> Activation:
    """The activation that config.json calls by this name."""
    return _ACTIVATIONS[name]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and softmax: float32, or the input's where that is wider."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in at least float32, then times the weight (IDEFICS3-TEXT-002)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.to(at_least_float32(x.dtype))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = self.weight * wide.to(x.dtype)
        return out


def rotary_frequencies(head_dim: int, theta: float, rope: Mapping[str, Any]) -> Tensor:
    """Angles per position in float32, (head_dim / 2,).

    Args:
        head_dim: width of a head.
        theta: base.
        rope: `rope_type` "default", "linear" (all angles divided by `factor`) or "llama3": wavelengths longer than
            `original_max_position_embeddings / low_freq_factor` are divided by `factor`, those shorter than
            `original_max_position_embeddings / high_freq_factor` stay, those between are blended linearly in
            1 / wavelength.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim
    frequencies: Tensor = 1.0 / (theta**exponents)
    if rope["rope_type"] == "linear":
        return frequencies / float(rope["factor"])
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        trained = rope["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / frequencies
        slowed = frequencies / rope["factor"]
        keep = (trained / wavelengths - low) / (high - low)
        blended = (1 - keep) * slowed + keep * frequencies
        frequencies = torch.where(wavelengths > trained / low, slowed, frequencies)
        between = (wavelengths <= trained / low) & (wavelengths >= trained / high)
        return torch.where(between, blended, frequencies)
    return frequencies


class Rotary:
    """Cosines and sines of positions, made in float32. Holds no parameter, so no change of dtype reaches it."""

    def __init__(self, head_dim: int, theta: float, rope: Mapping[str, Any]) -> None:
        self._frequencies = {torch.device("cpu"): rotary_frequencies(head_dim, theta, rope)}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, S, d) in `dtype` for positions (B, S)."""
        device = positions.device
        if device not in self._frequencies:
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        angles = positions[:, None, :, None].to(torch.float32) * self._frequencies[device]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (j, j + d/2) of (B, H, S, d) by their angle (half-split form)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_bias(valid: Tensor | None, start: int, queries: int, keys: int, like: Tensor) -> Tensor | None:
    """What is added to attention scores so that a query sees the valid keys up to its own slot.

    Args:
        valid: (B, K) bool, True for slots that hold a real token; None when all do.
        start: slot of the first query.
        queries: number of queries S.
        keys: number of key slots K.
        like: a tensor of the wanted device and dtype.

    Returns:
        (B or 1, 1, S, K) with 0 or the dtype's most negative number, or None when nothing is hidden. The number is
        finite, so that a row that sees nothing stays free of NaN.
    """
    if valid is None and queries == 1:
        return None
    slots = torch.arange(keys, device=like.device)
    seen = slots[None, :] <= slots[start : start + queries, None]
    seen = seen[None, None] if valid is None else seen[None, None] & valid[:, None, None, :keys]
    return hidden_bias(seen, like)


def hidden_bias(seen: Tensor, like: Tensor) -> Tensor:
    """0 where `seen`, the most negative number of `like`'s dtype elsewhere."""
    bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill(~seen, torch.finfo(like.dtype).min)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    implementation: str,
    dropout: float = 0.0,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention; query head h reads key head h // G (IDEFICS3-TEXT-005, IDEFICS3-TEXT-007).

    Args:
        q: (B, H, S, d).
        k: (B, H / G, K, d).
        v: like k.
        bias: None, or (B or 1, 1, S or 1, K), added to the scores.
        implementation: "eager" spells the products out, "sdpa" leaves them to torch.
        dropout: probability of dropping a weight; 0 outside training.
        weights: where given, the attention weights (B, H, S, K) are appended; needs "eager".

    Returns:
        (B, S, H * d).
    """
    batch, heads, queries, width = q.shape
    groups = heads // k.shape[1]
    if implementation == "sdpa":
        if groups > 1 and queries > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        elif groups > 1:  # one query: the queries of a key head stand in its rows, nothing is copied
            q = q.reshape(batch, k.shape[1], groups, width)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        wide = at_least_float32(q.dtype)
        folded = q.reshape(batch, k.shape[1], groups * queries, width)
        scores = (folded @ k.transpose(-1, -2)).view(batch, k.shape[1], groups, queries, -1)
        scores = scores.to(wide) * width**-0.5
        if bias is not None:
            scores = scores + bias.to(wide)[:, :, None]
        shares = F.dropout(scores.softmax(-1).to(q.dtype), dropout)
        if weights is not None:
            weights.append(shares.reshape(batch, heads, queries, -1))
        mixed = shares.reshape(batch, k.shape[1], groups * queries, -1) @ v
    return mixed.reshape(batch, heads, queries, width).transpose(1, 2).reshape(batch, queries, heads * width)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (IDEFICS3-TEXT-006)."""

    def __init__(self, width: int, inner: int, act: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class MLP(nn.Module):
    """fc2(act(fc1(x))), with biases."""

    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


# ------------------------------------------------------------------------------------------------- Llama decoder


@dataclass(frozen=True, eq=False)
class Pass:
    """What every layer of one pass shares.

    Attributes:
        cos: (B, 1, S, d) rotary cosines.
        sin: (B, 1, S, d) rotary sines.
        bias: what is added to scores, or None.
        cache: where keys and values go, or None.
        implementation: "eager" or "sdpa".
        attentions: where given, receives the attention weights of every layer.
        whole: where given, a device's own operation: of a layer's queries (B, H, S, d), keys and values, it writes the
            latter into the cache and attends over all that is there; gives (B, S, H * d).
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor | None
    cache: KeyValueCache | None
    implementation: str
    attentions: list[Tensor] | None = None
    whole: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None


class LlamaSizes(Protocol):
    """What a decoder layer asks of a text configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def attention_dropout(self) -> float: ...


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaSizes) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        inner, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, shared: Pass, layer: int) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        rows, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(rows, tokens, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)
        if shared.whole is not None:
            whole: Tensor = self.o_proj(shared.whole(layer, q, k, v))
            return whole
        if shared.cache is not None:
            k, v = shared.cache.write(layer, k, v)
        mixed = attend(
            q,
            k,
            v,
            shared.bias,
            implementation=shared.implementation,
            dropout=self.dropout if self.training else 0.0,
            weights=shared.attentions,
        )
        out: Tensor = self.o_proj(mixed)
        return out


class LlamaDecoderLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: LlamaSizes) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, shared: Pass, layer: int) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), shared, layer)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LlamaModel(nn.Module):  # IDEFICS3-CFG-023
    """Embedding, decoder blocks, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope())

    def blocks(self, x: Tensor, shared: Pass, taps: Taps | None) -> Tensor:
        """Run the decoder blocks and the final norm; (B, S, D) to (B, S, D)."""
        tap(taps, "text.embeddings", x)
        for index, layer in enumerate(self.layers):
            x = layer(x, shared, index)
            tap(taps, f"text.layers.{index}", x)
        if shared.cache is not None:
            shared.cache.advance(x.shape[1])
        x = self.norm(x)
        tap(taps, "text.norm", x)
        return x


def tap(taps: Taps | None, name: str, value: Tensor) -> None:
    """Keep a hidden state under its component's name where that was asked for."""
    if taps is not None:
        taps[name] = value
