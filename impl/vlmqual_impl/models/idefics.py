"""Idefics: vision tower, resampler, and a Llama decoder with gated cross-attention between its layers; in data order.

Legend of shapes: B rows, S token positions, N image slots of a row, L features of an image, K = N * L features of a
row, D text width, E width of the vision tower, H heads, d head width, V vocabulary.

The rules are IDEFICS-CROSS-* and IDEFICS-DECODER-*; those of the image side are in `idefics_vision`. Taps name hidden
states by component: text.embeddings, text.cross_layers.{i}, text.layers.{i}, text.norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmqual_impl.cache import CrossCache, KeyValueCache
from vlmqual_impl.configs import IdeficsConfig
from vlmqual_impl.configs.idefics import ROTARY_BASE
from vlmqual_impl.layers import (
    GatedMLP,
    LlamaDecoderLayer,
    Pass,
    RMSNorm,
    Rotary,
    Taps,
    attend,
    causal_bias,
    hidden_bias,
    tap,
)
from vlmqual_impl.models.idefics_vision import IdeficsVision, Resampler
from vlmqual_impl.tp import COLUMN, ROW

# ------------------------------------------------------------------------------------------------- embedding and head


class DecoupledEmbedding(nn.Embedding):
    """Two tables: ids from `num_embeddings` on are rows of the additional one."""

    def __init__(self, rows: int, more: int, width: int) -> None:
        super().__init__(rows, width)
        self.num_additional_embeddings = more
        self.additional_embedding = nn.Embedding(more, width) if more else None

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) to (B, S, D)."""
        if self.additional_embedding is None:
            return super().forward(ids)
        extra = ids >= self.num_embeddings
        first = super().forward(ids.masked_fill(extra, 0))
        second = self.additional_embedding((ids - self.num_embeddings).clamp(min=0))
        return torch.where(extra[..., None], second, first)


class DecoupledLinear(nn.Linear):
    """Two heads without bias, whose logits stand behind each other."""

    def __init__(self, width: int, outputs: int, more: int) -> None:
        super().__init__(width, outputs, bias=False)
        self.out_additional_features = more
        self.additional_fc = nn.Linear(width, more, bias=False) if more else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        first = super().forward(x)
        return first if self.additional_fc is None else torch.cat((first, self.additional_fc(x)), dim=-1)


# ---------------------------------------------------------------------------------------------------- cross-attention


@dataclass(frozen=True, eq=False)
class Images:
    """What the gated cross-attention blocks of one pass see of images.

    Attributes:
        states: (B, K, E) features, None when their keys and values are in the cache.
        bias: what is added to scores, (B, 1, S or 1, K).
        seeing: (B, S or 1, 1) bool, False for tokens that see no image.
    """

    states: Tensor | None
    bias: Tensor
    seeing: Tensor


def visible_features(image_attention_mask: Tensor, features: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask over images means for their features.

    Args:
        image_attention_mask: (B, S, N), 0 for images that a token may not see.
        features: L, of one image.
        like: a tensor of the wanted device and dtype.

    Returns:
        What is added to scores (B, 1, S, N * L), and (B, S, 1) bool: whether the token sees an image at all.
    """
    seen = image_attention_mask.to(like.device) != 0
    tokens = seen.repeat_interleave(features, dim=-1)
    return hidden_bias(tokens[:, None], like), seen.any(-1, keepdim=True)


class CrossAttention(nn.Module):
    """Queries from text, keys and values from image features; no rotary positions."""

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__()
        width, source = config.hidden_size, config.vision_config.embed_dim
        self.head_dim, self.dropout = width // config.num_attention_heads, config.dropout
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source, width, bias=False)
        self.v_proj = nn.Linear(source, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        normed = config.qk_layer_norms  # IDEFICS-CFG-046
        self.q_layer_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None
        self.k_layer_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Image features (B, K, E) to keys, normalised where that is configured, and values, (B, H, K, d) each."""
        rows, features, _ = states.shape
        k, v = (
            projection(states).view(rows, features, -1, self.head_dim).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        return k if self.k_layer_norm is None else self.k_layer_norm(k), v

    def forward(self, x: Tensor, images: Images, shared: Pass, block: int) -> Tensor:
        """(B, S, D) to (B, S, D); keys and values of images are computed once and cached (IDEFICS-DEC-003)."""
        rows, tokens, _ = x.shape
        q = self.q_proj(x).view(rows, tokens, -1, self.head_dim).transpose(1, 2)
        q = q if self.q_layer_norm is None else self.q_layer_norm(q)
        cross = None if shared.cache is None else shared.cache.cross
        if images.states is not None:
            k, v = self.keys_values(images.states)
            if cross is not None:
                cross.replace(block, k, v)
        elif cross is not None and block in cross:
            k, v = cross[block]
        else:
            raise ValueError(f"gated_cross_attn_layers.{block}: there are neither image features nor cached keys")
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.o_proj(attend(q, k, v, images.bias, implementation=shared.implementation, dropout=dropout))
        return out


class CrossLayer(nn.Module):
    """Pre-norm block whose attention reads images; both branches are multiplied by the tanh of a gate.

    A token that sees no image gets nothing from the attention branch; its feed-forward branch stays
    (IDEFICS-CROSS-006).
    """

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.dropout
        self.alpha_cross_attn = nn.Parameter(initial_gate(config))
        self.alpha_dense = nn.Parameter(initial_gate(config))

    def forward(self, x: Tensor, images: Images, shared: Pass, block: int) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        read = self.cross_attn(self.input_layernorm(x), images, shared, block)
        read = F.dropout(read, self.dropout, self.training).masked_fill(~images.seeing, 0)
        x = x + self.alpha_cross_attn.tanh() * read
        fed = F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)
        out: Tensor = x + self.alpha_dense.tanh() * fed
        return out


def initial_gate(config: IdeficsConfig) -> Tensor:
    """A gate before training, (1,) or (1, 1, D) (IDEFICS-CFG-042); a scalar one can be random too (IDEFICS-CFG-044)."""
    shape = (1,) if config.alpha_type == "float" else (1, 1, config.hidden_size)
    if config.alpha_initializer in ("zeros", "ones"):  # IDEFICS-CFG-041
        return torch.full(shape, float(config.alpha_initializer == "ones"))
    return torch.empty(shape).normal_(0.0, config.alphas_initializer_range)  # IDEFICS-CFG-043


# -------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class DecoderSizes:
    """An Idefics configuration as the Llama decoder layer wants it: one key head for each query head, no biases."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_dropout: float
    attention_bias: bool = False
    mlp_bias: bool = False


def decoder_sizes(config: IdeficsConfig) -> DecoderSizes:
    """What a decoder layer has to know of the configuration."""
    return DecoderSizes(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        attention_dropout=config.dropout,
    )


class IdeficsDecoderLayer(LlamaDecoderLayer):  # IDEFICS-CFG-055
    """The Llama block, with dropout of both branches in training (IDEFICS-CFG-058)."""

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__(decoder_sizes(config))
        self.dropout = config.dropout

    def forward(self, x: Tensor, shared: Pass, layer: int) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        mixed = self.self_attn(self.input_layernorm(x), shared, layer)
        x = x + F.dropout(mixed, self.dropout, self.training)
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(fed, self.dropout, self.training)


class IdeficsTrunk(nn.Module):
    """Everything but the head."""

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = DecoupledEmbedding(config.vocab_size, config.additional_vocab_size, config.hidden_size)
        self.vision_model = IdeficsVision(config.vision_config)
        self.perceiver_resampler = (  # IDEFICS-CFG-053
            Resampler(config.perceiver_config, config.vision_config.embed_dim) if config.use_resampler else None
        )
        self.interval = config.cross_layer_interval
        self.layers = nn.ModuleList(IdeficsDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gated_cross_attn_layers = nn.ModuleList(
            CrossLayer(config) for _ in range(config.num_hidden_layers // self.interval)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads, ROTARY_BASE, {"rope_type": "default"})
        self.implementation = "sdpa"

    def blocks(self, x: Tensor, shared: Pass, images: Images, taps: Taps | None) -> Tensor:
        """Run the decoder and the final norm; (B, S, D) to (B, S, D).

        Before every `cross_layer_interval`-th decoder layer, the first included, stands a cross-attention block.
        """
        tap(taps, "text.embeddings", x)
        for index, layer in enumerate(self.layers):
            if index % self.interval == 0:  # IDEFICS-CFG-045
                block = index // self.interval
                x = self.gated_cross_attn_layers[block](x, images, shared, block)
                tap(taps, f"text.cross_layers.{index}", x)
            x = layer(x, shared, index)
            tap(taps, f"text.layers.{index}", x)
        if shared.cache is not None:
            shared.cache.advance(x.shape[1])
        x = self.norm(x)
        tap(taps, "text.norm", x)
        return x


class Idefics(nn.Module):
    """The whole model."""

    def __init__(self, config: IdeficsConfig, model: IdeficsTrunk | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = IdeficsTrunk(config) if model is None else model
        self.lm_head = DecoupledLinear(config.hidden_size, config.vocab_size, config.additional_vocab_size)
        self.tie()

    def tie(self) -> None:
        """Share both tables with both heads where the configuration says so."""
        if not self.config.tie_word_embeddings:
            return
        table = self.model.embed_tokens
        self.lm_head.weight = table.weight
        if self.lm_head.additional_fc is not None and table.additional_embedding is not None:
            self.lm_head.additional_fc.weight = table.additional_embedding.weight


# ------------------------------------------------------------------------------------------------------------ phases


def features_name(config: IdeficsConfig) -> str:
    """Documented name of what the vision side gives the text model."""
    return "perceiver_embeddings" if config.use_resampler else "image_encoder_embeddings"


def check_pixels(config: IdeficsConfig, pixel_values: Tensor) -> None:
    """Refuse pictures of another shape than documented.

    Raises:
        ValueError: names the shape and what would be valid.
    """
    if pixel_values.ndim != 5 or pixel_values.shape[2] != config.vision_config.num_channels:
        raise ValueError(
            f"pixel_values is {tuple(pixel_values.shape)}; it has to be "
            f"(batch, images, {config.vision_config.num_channels}, height, width)"
        )


def encode_images(
    trunk: IdeficsTrunk, pixel_values: Tensor, *, interpolate: bool = False, taps: Taps | None = None
) -> Tensor:
    """Pictures to features (B, N, L, E); slots without a picture have theirs too, which no token may see.

    Args:
        trunk: the model.
        pixel_values: (B, N, C, height, width).
        interpolate: pictures of another size than the configuration's are wanted.
        taps: receives hidden states by name.

    Raises:
        ValueError: the shape is not the documented one.
    """
    check_pixels(trunk.config, pixel_values)
    rows, slots = pixel_values.shape[:2]
    weight = trunk.vision_model.embeddings.patch_embedding.weight
    x = trunk.vision_model.encode(
        pixel_values.to(weight).flatten(0, 1), interpolate=interpolate, implementation=trunk.implementation, taps=taps
    )
    return resampled(trunk, x.view(rows, slots, *x.shape[1:]), taps)


def resampled(trunk: IdeficsTrunk, states: Tensor, taps: Taps | None = None) -> Tensor:
    """The tower's output (B, N, L, E) through the resampler, where the model has one."""
    if trunk.perceiver_resampler is None:
        return states
    rows, slots = states.shape[:2]
    x = trunk.perceiver_resampler.resample(states.flatten(0, 1), implementation=trunk.implementation, taps=taps)
    return x.view(rows, slots, *x.shape[1:])


def images_for(trunk: IdeficsTrunk, features: Tensor, mask: Tensor | None, x: Tensor) -> Images:
    """What the cross-attention blocks see, from features and the documented mask.

    Args:
        trunk: the model.
        features: (B, N, L, E).
        mask: `image_attention_mask` (B, S, N).
        x: embeddings (B, S, D).

    Raises:
        ValueError: the mask is missing, or shapes do not fit each other.
    """
    width = trunk.config.vision_config.embed_dim
    if features.ndim != 4 or features.shape[0] != x.shape[0] or features.shape[-1] != width:
        raise ValueError(
            f"image features are {tuple(features.shape)}; they have to be (batch, images, features, width), "
            f"here ({x.shape[0]}, images, features, {width})"
        )
    if mask is None:  # IDEFICS-MODEL-019
        raise ValueError("image_attention_mask is missing; it says which tokens see which images")
    if tuple(mask.shape) != (x.shape[0], x.shape[1], features.shape[1]):
        raise ValueError(
            f"image_attention_mask is {tuple(mask.shape)}; it has to be (batch, tokens, images), "
            f"here ({x.shape[0]}, {x.shape[1]}, {features.shape[1]})"
        )
    bias, seeing = visible_features(mask, features.shape[2], x)
    return Images(features.flatten(1, 2), bias, seeing)


def new_cache(trunk: IdeficsTrunk, batch: int, max_length: int) -> KeyValueCache:
    """An empty cache for this model, as wide as the key projections are here."""
    weight = trunk.get_parameter("layers.0.self_attn.k_proj.weight")
    head_dim = trunk.config.hidden_size // trunk.config.num_attention_heads
    return KeyValueCache(
        layers=len(trunk.layers),
        batch=batch,
        heads=weight.shape[0] // head_dim,
        max_length=max_length,
        head_dim=head_dim,
        dtype=weight.dtype,
        device=weight.device,
        cross=CrossCache(range(len(trunk.gated_cross_attn_layers)), apart=True),
    )


def run(
    trunk: IdeficsTrunk,
    embeddings: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    cache: KeyValueCache | None,
    images: Images,
    *,
    taps: Taps | None = None,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """Tokens through the text model: a prompt, a further piece of one, or one token for each row.

    Args:
        trunk: the model.
        embeddings: (B, S, D).
        positions: (B, S) int64 rotary positions.
        valid: (B, keys) bool over all slots up to the last of these tokens, False for padding; None when all are real.
        cache: receives keys and values.
        images: what the cross-attention blocks see.
        taps: receives hidden states by name.
        attentions: receives the weights (B, H, S, keys) of each decoder layer; makes the explicit attention run.

    Returns:
        (B, S, D) after the final norm.

    Raises:
        ValueError: the cache is full, or there are no keys of images.
    """
    tokens = embeddings.shape[1]
    start = 0 if cache is None else cache.length
    if cache is not None:
        cache.require(tokens)
    cos, sin = trunk.rotary(positions, embeddings.dtype)
    bias = causal_bias(valid, start, tokens, start + tokens, embeddings)
    implementation = trunk.implementation if attentions is None else "eager"
    shared = Pass(cos, sin, bias, cache, implementation, attentions)
    return trunk.blocks(embeddings, shared, images, taps)


# ------------------------------------------------------------------------------------------------- tables, for weights

#: Checkpoint names that differ from attribute names: pattern and replacement, None for tensors that are not weights.
RENAME: tuple[tuple[str, str | None], ...] = (
    (r"^.*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$", None),
    (r"^.*\.embeddings\.position_ids$", None),
)

_BLOCKS = r"(layers|gated_cross_attn_layers)\.\d+"
#: How tensor parallelism cuts modules (see `tp`): name pattern and kind. What is not listed is whole: all embeddings,
#: norms (those of single heads too), gates, latents and both heads.
PLAN: tuple[tuple[str, str], ...] = (
    (r"encoder\.layers\.\d+\.self_attn\.[qkv]_proj", COLUMN),
    (r"encoder\.layers\.\d+\.self_attn\.out_proj", ROW),
    (r"encoder\.layers\.\d+\.mlp\.fc1", COLUMN),
    (r"encoder\.layers\.\d+\.mlp\.fc2", ROW),
    (r"perceiver_resampler\.blocks\.\d+\.0\.[qkv]_proj", COLUMN),
    (r"perceiver_resampler\.blocks\.\d+\.0\.output_proj", ROW),
    (r"perceiver_resampler\.blocks\.\d+\.1\.fc", COLUMN),
    (r"perceiver_resampler\.blocks\.\d+\.1\.c_proj", ROW),
    (rf"{_BLOCKS}\.(self|cross)_attn\.[qkv]_proj", COLUMN),
    (rf"{_BLOCKS}\.(self|cross)_attn\.o_proj", ROW),
    (rf"{_BLOCKS}\.mlp\.(gate|up)_proj", COLUMN),
    (rf"{_BLOCKS}\.mlp\.down_proj", ROW),
)


def divisible(config: IdeficsConfig) -> Iterator[tuple[str, str, int, str]]:
    """Counts that tensor parallelism has to divide: configuration, what is counted, the count, one module it cuts."""
    vision, first = config.vision_config, "vision_model.encoder.layers.0"
    yield "config", "attention heads", config.num_attention_heads, "model.layers.0.self_attn.q_proj"
    yield "config", "feed-forward columns", config.intermediate_size, "model.layers.0.mlp.gate_proj"
    yield "vision_config", "attention heads", vision.num_attention_heads, f"model.{first}.self_attn.q_proj"
    yield "vision_config", "feed-forward columns", vision.intermediate_size, f"model.{first}.mlp.fc1"
    if config.use_resampler:
        heads, block = config.perceiver_config.resampler_n_heads, "model.perceiver_resampler.blocks.0"
        yield "perceiver_config", "attention heads", heads, f"{block}.0.q_proj"
        yield "vision_config", "resampler columns", 4 * vision.embed_dim, f"{block}.1.fc"
