"""Mllama (Llama 3.2 Vision): vision model, projector, Llama decoder with cross-attention layers; in data order.

Legend of shapes: B rows, N image slots of a row, T tiles of an image, L positions of a tile, K = N * T * L image tokens
of a row, S token positions, D width, H heads, d head width, V vocabulary.

The rules are MLLAMA-DECODER-*; those of the vision model are in `mllama_vision`. Taps name hidden states by component:
connector, text.embeddings, text.layers.{i}, text.norm.

Where the sources disagree, transformers 4.45.2 is followed: what rows that may see no image do stands in
`visible_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmqual_impl.cache import CrossCache, KeyValueCache
from vlmqual_impl.configs import MllamaConfig, MllamaTextConfig
from vlmqual_impl.configs.mllama import EXTRA_EMBEDDINGS
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
from vlmqual_impl.models.mllama_vision import MllamaVision, check_pixels
from vlmqual_impl.tp import COLUMN, ROW

# -------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, eq=False)
class Images:
    """What the cross-attention layers of one pass see of images.

    Attributes:
        states: (B, K, D of text) features of new images, None when all are in the cache.
        bias: what is added to scores, (B, 1, S or 1, K), or None.
        rows: (B, S or 1, 1), 0 for tokens whose feed-forward branch is suppressed, or None.
    """

    states: Tensor | None = None
    bias: Tensor | None = None
    rows: Tensor | None = None


def visible_tokens(cross_attention_mask: Tensor, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask over tiles means for image tokens.

    A token that may see no tile at all, such as text before the first image, attends to every image token alike, and
    only its feed-forward branch is multiplied by 0: the rule of transformers 4.45.2 and later. Meta's original
    suppresses its attention branch too (MLLAMA-DECODER-009).

    Args:
        cross_attention_mask: (B, S, N, T), 0 for tiles that a token may not see.
        positions: L, image tokens of a tile.
        like: a tensor of the wanted device and dtype.

    Returns:
        What is added to scores (B, 1, S, N * T * L), and (B, S, 1), 1 or 0 for the feed-forward branch.
    """
    seen = (cross_attention_mask.to(like.device) != 0).flatten(2)
    some = seen.any(-1, keepdim=True)
    tokens = (seen | ~some).repeat_interleave(positions, dim=-1)
    return hidden_bias(tokens[:, None], like), some.to(like.dtype)


class CrossAttention(nn.Module):
    """Queries from text, keys and values from image features; norms on each head, no rotary positions."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        width, shared = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Image features (B, K, D) to keys, normalised, and values, (B, kv heads, K, d) each."""
        rows, tokens, _ = states.shape
        k = self.k_norm(self.k_proj(states).view(rows, tokens, -1, self.head_dim)).transpose(1, 2)
        return k, self.v_proj(states).view(rows, tokens, -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, images: Images, shared: Pass, layer: int) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        rows, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(rows, tokens, -1, self.head_dim)).transpose(1, 2)
        cross = None if shared.cache is None else shared.cache.cross
        if images.states is not None:
            k, v = self.keys_values(images.states)
            if cross is not None:
                k, v = cross.keep(layer, k, v)
        elif cross is not None and layer in cross:
            k, v = cross[layer]
        else:
            raise ValueError(f"layers.{layer}.cross_attn: there are neither image features nor cached keys and values")
        mixed = attend(
            q,
            k,
            v,
            images.bias,
            implementation=shared.implementation,
            dropout=self.dropout if self.training else 0.0,
            weights=shared.attentions,
        )
        out: Tensor = self.o_proj(mixed)
        return out


class CrossLayer(nn.Module):
    """Pre-norm block whose attention reads images; both branches are multiplied by the tanh of a gate."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=False)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, images: Images, shared: Pass, layer: int) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x = x + self.cross_attn_attn_gate.tanh() * self.cross_attn(self.input_layernorm(x), images, shared, layer)
        fed = self.mlp(self.post_attention_layernorm(x))
        if images.rows is not None:
            fed = images.rows * fed
        out: Tensor = x + self.cross_attn_mlp_gate.tanh() * fed
        return out


class MllamaText(nn.Module):
    """Embedding, decoder blocks, final norm."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        self.sizes = config
        # MLLAMA-CFG-012: the image token is the first id above the vocabulary
        self.embed_tokens = nn.Embedding(config.vocab_size + EXTRA_EMBEDDINGS, config.hidden_size)
        self.crossing = frozenset(config.cross_attention_layers)
        self.layers = nn.ModuleList(  # MLLAMA-TEXT-005
            CrossLayer(config) if index in self.crossing else LlamaDecoderLayer(config)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope())

    def blocks(self, x: Tensor, shared: Pass, images: Images, taps: Taps | None) -> Tensor:
        """Run the decoder blocks and the final norm; (B, S, D) to (B, S, D).

        Cross-attention layers are skipped while no image is known (MLLAMA-CGEN-019).
        """
        tap(taps, "text.embeddings", x)
        cached = shared.cache.cross if shared.cache is not None else None
        for index, layer in enumerate(self.layers):
            if index not in self.crossing:
                x = layer(x, shared, index)
            elif images.states is not None or (cached is not None and index in cached):
                x = layer(x, images, shared, index)
            else:
                continue
            tap(taps, f"text.layers.{index}", x)
        if shared.cache is not None:
            shared.cache.advance(x.shape[1])
        x = self.norm(x)
        tap(taps, "text.norm", x)
        return x


class MllamaLanguage(nn.Module):
    """The text model and its head (no bias, vocabulary without the image token), under checkpoint names."""

    def __init__(self, config: MllamaTextConfig, model: MllamaText | None = None) -> None:
        super().__init__()
        self.model = MllamaText(config) if model is None else model
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class Mllama(nn.Module):
    """The whole model."""

    def __init__(
        self, config: MllamaConfig, vision: MllamaVision | None = None, language: MllamaLanguage | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_model = MllamaVision(config.vision_config) if vision is None else vision
        self.language_model = MllamaLanguage(config.text_config) if language is None else language
        self.multi_modal_projector = nn.Linear(config.vision_config.vision_output_dim, config.text_config.hidden_size)
        self.implementation = "sdpa"


# ------------------------------------------------------------------------------------------------------------ phases


def encode_images(
    network: Mllama,
    pixel_values: Tensor,
    aspect_ratio_ids: Tensor,
    aspect_ratio_mask: Tensor,
    taps: Taps | None = None,
) -> Tensor:
    """Tiles to image features in the text width, (B, K, D); padding images and tiles have theirs too.

    Args:
        network: the model.
        pixel_values: (B, N, T, 3, t, t).
        aspect_ratio_ids: (B, N) int64.
        aspect_ratio_mask: (B, N, T).
        taps: receives hidden states by name.

    Raises:
        ValueError: a shape is not the documented one, or an id is unknown.
    """
    weight = network.multi_modal_projector.weight
    check_pixels(network.config.vision_config, pixel_values, aspect_ratio_ids, aspect_ratio_mask)
    x = network.vision_model.encode(
        pixel_values.to(weight),
        aspect_ratio_ids.to(weight.device),
        aspect_ratio_mask.to(weight.device),
        implementation=network.implementation,
        taps=taps,
    )
    features: Tensor = network.multi_modal_projector(x).flatten(1, 3)
    tap(taps, "connector", features)
    return features


def row_features(features: Tensor, rows: int) -> Tensor:
    """Image features of a batch as (B, K, D), from that or from the projector's own shape (B * N * T, L, D).

    Raises:
        ValueError: they do not divide by the rows.
    """
    if features.ndim < 2 or features.shape[:-1].numel() % rows:
        raise ValueError(
            f"cross_attention_states is {tuple(features.shape)}; it has to be (batch, image tokens, width) "
            f"for {rows} rows"
        )
    return features.reshape(rows, -1, features.shape[-1])


def images_for(config: MllamaConfig, features: Tensor | None, mask: Tensor | None, x: Tensor) -> Images:
    """What the cross-attention layers see, from features and the documented mask.

    Args:
        config: tells how many image tokens a tile has.
        features: (B, K, D), None for no images.
        mask: (B, S, N, T), 0 for tiles that a token may not see; None when every token sees everything
            (MLLAMA-CGEN-016, MLLAMA-CGEN-036).
        x: embeddings (B, S, D).

    Raises:
        ValueError: the shapes do not fit each other, or there is a mask without images.
    """
    if features is None:
        if mask is not None:
            raise ValueError("cross_attention_mask is given, but there are no images for it")
        return Images()
    width, per_tile = config.text_config.hidden_size, config.vision_config.patches_per_tile
    if features.shape[-1] != width:
        raise ValueError(f"image features are {features.shape[-1]} wide; the text model is {width} wide")
    if mask is None:
        return Images(states=features)
    if mask.ndim != 4 or tuple(mask.shape[:2]) != tuple(x.shape[:2]):
        raise ValueError(
            f"cross_attention_mask is {tuple(mask.shape)}; it has to be (batch, tokens, images, tiles), "
            f"here ({x.shape[0]}, {x.shape[1]}, images, tiles)"
        )
    if mask.shape[2] * mask.shape[3] * per_tile != features.shape[1]:
        raise ValueError(
            f"cross_attention_mask is over {mask.shape[2]} images of {mask.shape[3]} tiles, {per_tile} image tokens "
            f"each; a row has {features.shape[1]} image tokens"
        )
    bias, some = visible_tokens(mask, per_tile, x)
    return Images(features, bias, some)


def new_cache(text: MllamaText, batch: int, max_length: int) -> KeyValueCache:
    """An empty cache for this model, as wide as the key projections are here."""
    sizes = text.sizes
    own = [index for index in range(sizes.num_hidden_layers) if index not in text.crossing]
    crossing = [index for index in range(sizes.num_hidden_layers) if index in text.crossing]
    if not own:
        raise ValueError("text_config.cross_attention_layers names every layer; at least one has to be self-attention")
    weight = text.get_parameter(f"layers.{own[0]}.self_attn.k_proj.weight")
    return KeyValueCache(
        layers=own,
        batch=batch,
        heads=weight.shape[0] // sizes.head_dim,
        max_length=max_length,
        head_dim=sizes.head_dim,
        dtype=weight.dtype,
        device=weight.device,
        cross=CrossCache(crossing),
    )


def run(
    text: MllamaText,
    embeddings: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    cache: KeyValueCache | None,
    images: Images,
    *,
    implementation: str,
    taps: Taps | None = None,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """Tokens through the text model: a prompt, a further piece of one, or one token for each row.

    Args:
        text: the text model.
        embeddings: (B, S, D).
        positions: (B, S) int64 rotary positions.
        valid: (B, keys) bool over all slots up to the last of these tokens, False for padding; None when all are real.
        cache: receives keys and values.
        images: what the cross-attention layers see.
        implementation: "eager" or "sdpa".
        taps: receives hidden states by name.
        attentions: receives one tensor for each layer that runs; makes the explicit attention run.

    Returns:
        (B, S, D) after the final norm.

    Raises:
        ValueError: the cache is full, or `images` does not fit the keys that there are.
    """
    tokens = embeddings.shape[1]
    start = 0 if cache is None else cache.length
    if cache is not None:
        cache.require(tokens)
    cos, sin = text.rotary(positions, embeddings.dtype)
    bias = causal_bias(valid, start, tokens, start + tokens, embeddings)
    shared = Pass(cos, sin, bias, cache, implementation if attentions is None else "eager", attentions)
    return text.blocks(embeddings, shared, images, taps)


# ------------------------------------------------------------------------------------------------- tables, for weights

#: Checkpoint names that differ from attribute names: pattern and replacement, None for tensors that are not weights.
#: The second to fourth are the module names of transformers 5.x.
RENAME: tuple[tuple[str, str | None], ...] = (
    (r"^.*\.rotary_emb\.inv_freq$", None),
    (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", r"language_model.model."),
    (r"^lm_head\.", r"language_model.lm_head."),
)

#: How tensor parallelism cuts modules (see `tp`): name pattern and kind. What is not listed is whole: all embeddings,
#: norms (those of single heads too), gates, the projector and the head.
PLAN: tuple[tuple[str, str], ...] = (
    (r"(global_)?transformer\.layers\.\d+\.self_attn\.[qkv]_proj", COLUMN),
    (r"(global_)?transformer\.layers\.\d+\.self_attn\.o_proj", ROW),
    (r"(global_)?transformer\.layers\.\d+\.mlp\.fc1", COLUMN),
    (r"(global_)?transformer\.layers\.\d+\.mlp\.fc2", ROW),
    (r"language_model\.model\.layers\.\d+\.(self|cross)_attn\.[qkv]_proj", COLUMN),
    (r"language_model\.model\.layers\.\d+\.(self|cross)_attn\.o_proj", ROW),
    (r"language_model\.model\.layers\.\d+\.mlp\.(gate|up)_proj", COLUMN),
    (r"language_model\.model\.layers\.\d+\.mlp\.down_proj", ROW),
)


def divisible(config: MllamaConfig) -> Iterator[tuple[str, str, int, str]]:
    """Counts that tensor parallelism has to divide: configuration, what is counted, the count, one module it cuts."""
    vision, text = config.vision_config, config.text_config
    own = next((i for i in range(text.num_hidden_layers) if i not in text.cross_attention_layers), 0)
    layer, first = f"language_model.model.layers.{own}", "vision_model.transformer.layers.0"
    yield "text_config", "attention heads", text.num_attention_heads, f"{layer}.self_attn.q_proj"
    yield "text_config", "key/value heads", text.num_key_value_heads, f"{layer}.self_attn.k_proj"
    yield "text_config", "feed-forward columns", text.intermediate_size, f"{layer}.mlp.gate_proj"
    yield "vision_config", "attention heads", vision.num_attention_heads, f"{first}.self_attn.q_proj"
    yield "vision_config", "feed-forward columns", vision.intermediate_size, f"{first}.mlp.fc1"
