"""Idefics3: SigLIP tower, pixel-shuffle connector, Llama decoder; told in the order of the data.

Legend of shapes: B rows, N image slots of a row, F real frames of the batch, n patches of a side, P = n * n patches,
L image tokens of a frame, S token positions, K key slots, D width, H heads, d head width, V vocabulary.

The rules are IDEFICS3-VIS-* and IDEFICS3-TEXT-*. Taps name hidden states by component: vision.embeddings,
vision.layers.{i}, vision.post_layernorm, connector, text.embeddings (after the merge), text.layers.{i}, text.norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import Idefics3Config, Idefics3VisionConfig
from vlmqual_impl.layers import MLP, LlamaModel, Pass, Taps, attend, causal_bias, hidden_bias, tap
from vlmqual_impl.tp import COLUMN, ROW

# ------------------------------------------------------------------------------------------------------------ vision


@lru_cache(maxsize=32)
def position_buckets(side: int, grid: int) -> Tensor:
    """Position of patch k when v patches of a side are valid, (grid + 1, grid) int64 at [v, k].

    The position is the number of boundaries 1/side ... (side-1)/side that are at most k/v, in float32 with the steps of
    the documented version. That is floor(k * side / v), or one less for some k where k * side / v is whole and rounding
    puts k/v below its boundary. Of the sides up to 32, with v <= side, these are 19, 25, 29, 30 and 31 (side 25, v 25
    gives 4 at k = 5); the released checkpoint's side, 26, has no such k.
    """
    cpu = torch.device("cpu")
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device=cpu, dtype=torch.float32)
    table = torch.full((grid + 1, grid), side - 1, dtype=torch.int64, device=cpu)
    for valid in range(1, grid + 1):
        step = float(torch.tensor(1.0, dtype=torch.float32) / valid)
        fractions = torch.arange(0, 1 - 1e-6, step, device=cpu, dtype=torch.float32)[:valid]
        table[valid, : len(fractions)] = torch.bucketize(fractions, boundaries, right=True)
    return table


def position_ids(patch_mask: Tensor, side: int) -> Tensor:
    """Row of the position table for every patch, (F, P) int64; 0 for invalid patches.

    Args:
        patch_mask: (F, rows, columns) bool.
        side: patches of a side that the position table was made for.
    """
    rows, columns = patch_mask.shape[1:]
    buckets = position_buckets(side, max(rows, columns)).to(patch_mask.device)
    down = buckets[patch_mask[:, :, 0].sum(1)][:, :rows]
    across = buckets[patch_mask[:, 0, :].sum(1)][:, :columns]
    ids = down[:, :, None] * side + across[:, None, :]
    return torch.where(patch_mask, ids, 0).flatten(1)


class VisionEmbeddings(nn.Module):
    """Patches to vectors, plus their position. No class token (IDEFICS3-CFG-025)."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, ids: Tensor) -> Tensor:
        """(F, 3, h, w) and rows of the position table (F, P) to (F, P, D)."""
        frames, channels, height, width = pixel_values.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        # The convolution's stride is its kernel, so it is one product over patches laid out as (channel, y, x).
        patches = pixel_values[:, :, : rows * size, : columns * size]
        patches = patches.reshape(frames, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        kernel = self.patch_embedding.weight.flatten(1)
        vectors = F.linear(patches.reshape(frames, rows * columns, -1), kernel, self.patch_embedding.bias)
        placed: Tensor = vectors + self.position_embedding(ids)
        return placed


class VisionAttention(nn.Module):
    """Self-attention with biases, every patch sees every valid patch."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
        """(F, P, D) to (F, P, D)."""
        frames, patches, _ = x.shape
        q, k, v = (
            projection(x).view(frames, patches, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.out_proj(attend(q, k, v, bias, implementation=implementation, dropout=dropout))
        return out


class VisionLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
        """(F, P, D) to (F, P, D)."""
        x = x + self.self_attn(self.layer_norm1(x), bias, implementation)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionEncoder(nn.Module):
    """The blocks, under the name that checkpoints give them."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class Idefics3VisionTransformer(nn.Module):
    """SigLIP tower."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        patch_attention_mask: Tensor | None = None,
        *,
        implementation: str = "eager",
        taps: Taps | None = None,
    ) -> Tensor:
        """Frames to patch features.

        Args:
            pixel_values: (F, 3, h, w).
            patch_attention_mask: (F, h // patch, w // patch) bool, None for all valid.
            implementation: "eager" or "sdpa".
            taps: receives hidden states by name.

        Returns:
            (F, P, D); masked patches are computed too, but no patch attends to them (IDEFICS3-MODEL-019).
        """
        ids, bias = self.places(pixel_values, patch_attention_mask)
        return self.placed(pixel_values, ids, bias, implementation, taps)

    def places(self, pixel_values: Tensor, patch_attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of the position table (F, P), and what hides masked patches (F, 1, 1, P), None where there are none."""
        if patch_attention_mask is None:
            size = self.embeddings.patch_size
            shape = (pixel_values.shape[0], pixel_values.shape[2] // size, pixel_values.shape[3] // size)
            patch_attention_mask = torch.ones(shape, dtype=torch.bool, device=pixel_values.device)
        bias = None
        if not bool(patch_attention_mask.all()):
            bias = hidden_bias(patch_attention_mask.flatten(1)[:, None, None, :], pixel_values)
        return position_ids(patch_attention_mask, self.embeddings.side), bias

    def placed(
        self, pixel_values: Tensor, ids: Tensor, bias: Tensor | None, implementation: str, taps: Taps | None = None
    ) -> Tensor:
        """Frames (F, 3, h, w) whose patches have known places to patch features (F, P, D); see `places`."""
        x = self.embeddings(pixel_values, ids)
        tap(taps, "vision.embeddings", x)
        for index, layer in enumerate(self.encoder.layers):
            x = layer(x, bias, implementation)
            tap(taps, f"vision.layers.{index}", x)
        out: Tensor = self.post_layernorm(x)
        tap(taps, "vision.post_layernorm", out)
        return out


class ModalityProjection(nn.Module):
    """The connector's one product, under the name that checkpoints give it."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        inner = config.vision_config.hidden_size * config.scale_factor**2
        self.proj = nn.Linear(inner, config.text_config.hidden_size, bias=False)


class Idefics3Connector(nn.Module):
    """Folds scale_factor^2 neighbouring patches into one vector and projects it to the text width."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        self.factor = config.scale_factor
        self.modality_projection = ModalityProjection(config)

    def forward(self, x: Tensor) -> Tensor:
        """(F, P, D of vision) to (F, L, D of text)."""
        frames, patches, width = x.shape
        side, s = int(patches**0.5), self.factor
        blocks = x.view(frames, side // s, s, side // s, s, width).permute(0, 1, 3, 2, 4, 5)
        folded = blocks.reshape(frames, (side // s) ** 2, s * s * width)  # IDEFICS3-CFG-021
        out: Tensor = self.modality_projection.proj(folded)
        return out


# -------------------------------------------------------------------------------------------------------------- text


class Idefics3Trunk(nn.Module):
    """Everything but the language model head."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        self.config = config
        self.vision_model = Idefics3VisionTransformer(config.vision_config)
        self.connector = Idefics3Connector(config)
        self.text_model = LlamaModel(config.text_config)
        self.implementation = "sdpa"


class Idefics3(nn.Module):
    """The trunk and its language model head (no bias)."""

    def __init__(self, config: Idefics3Config, trunk: Idefics3Trunk | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Idefics3Trunk(config) if trunk is None else trunk
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.tie_word_embeddings:  # IDEFICS3-CFG-020
            self.lm_head.weight = self.model.text_model.embed_tokens.weight


# ------------------------------------------------------------------------------------------------------------ phases


def real_frames(
    pixel_values: Tensor, pixel_attention_mask: Tensor | None, patch_size: int
) -> tuple[Tensor, Tensor | None]:
    """Drop padding frames and reduce pixel masks to patch masks.

    Args:
        pixel_values: (B, N, 3, h, w); frames that are 0 everywhere are padding (IDEFICS3-MODEL-022).
        pixel_attention_mask: (B, N, h, w), non-zero on real pixels; None for all.
        patch_size: side of a patch.

    Returns:
        (F, 3, h, w) and None or (F, h // patch, w // patch) bool.

    Raises:
        ValueError: a shape is not the documented one.
    """
    if pixel_values.ndim != 5:  # IDEFICS3-MODEL-015, IDEFICS3-MODEL-016
        raise ValueError(
            f"pixel_values has {pixel_values.ndim} dimensions {tuple(pixel_values.shape)}; "
            "it has to be (batch, images, channels, height, width)"
        )
    frames = pixel_values.flatten(0, 1)
    real = (frames != 0).flatten(1).any(1)
    if pixel_attention_mask is None:
        return frames[real], None
    wanted = (*pixel_values.shape[:2], *pixel_values.shape[3:])
    if tuple(pixel_attention_mask.shape) != wanted:  # IDEFICS3-MODEL-017, IDEFICS3-MODEL-018
        raise ValueError(
            f"pixel_attention_mask is {tuple(pixel_attention_mask.shape)}; "
            f"it has to be (batch, images, height, width), here {wanted}"
        )
    mask = pixel_attention_mask.flatten(0, 1)[real] != 0
    rows, columns = mask.shape[1] // patch_size, mask.shape[2] // patch_size
    blocks = mask[:, : rows * patch_size, : columns * patch_size]
    return frames[real], blocks.reshape(-1, rows, patch_size, columns, patch_size).any(4).any(2)


def encode_images(
    trunk: Idefics3Trunk, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, taps: Taps | None = None
) -> Tensor:
    """Pixels to image features in the text width, (F, L, D), real frames only, in their order.

    Raises:
        ValueError: a shape is not the documented one, or the patches of a frame do not fold by the scale factor.
    """
    weight = trunk.connector.modality_projection.proj.weight
    frames, patch_mask = checked_frames(trunk, pixel_values.to(weight.device), _on(pixel_attention_mask, weight))
    x = trunk.vision_model(frames.to(weight.dtype), patch_mask, implementation=trunk.implementation, taps=taps)
    features: Tensor = trunk.connector(x)
    tap(taps, "connector", features)
    return features


def checked_frames(
    trunk: Idefics3Trunk, pixel_values: Tensor, pixel_attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`real_frames` for this model.

    Raises:
        ValueError: a shape is not the documented one, or the patches of a frame do not fold by the scale factor.
    """
    vision = trunk.config.vision_config
    frames, patch_mask = real_frames(pixel_values, pixel_attention_mask, vision.patch_size)
    rows, columns = frames.shape[2] // vision.patch_size, frames.shape[3] // vision.patch_size
    if frames.shape[1] != vision.num_channels:
        raise ValueError(f"pixel_values has {frames.shape[1]} channels; the vision tower takes {vision.num_channels}")
    if rows != columns or rows % trunk.config.scale_factor or not rows:
        raise ValueError(
            f"frames of {frames.shape[2]}x{frames.shape[3]} pixels give {rows}x{columns} patches; "
            f"pixel shuffle needs a square grid that divides by scale_factor {trunk.config.scale_factor}"
        )
    if not len(frames):
        raise ValueError("pixel_values holds padding frames only: every value is 0")
    return frames, patch_mask


def merge(embeddings: Tensor, image_positions: Tensor, features: Tensor) -> Tensor:
    """Put image features in place of the image tokens' embeddings, row by row (IDEFICS3-TEXT-001).

    Args:
        embeddings: (B, S, D).
        image_positions: (B, S) bool.
        features: (F, L, D), or any shape whose last dimension is D.

    Raises:
        ValueError: there are not as many image tokens as feature vectors (IDEFICS3-MODEL-032).
    """
    vectors = features.reshape(-1, features.shape[-1]).to(embeddings)
    tokens = int(image_positions.sum())
    if vectors.shape[-1] != embeddings.shape[-1]:
        raise ValueError(f"image features are {vectors.shape[-1]} wide; the text model is {embeddings.shape[-1]} wide")
    if tokens != len(vectors):
        raise ValueError(f"the prompt has {tokens} image tokens, but there are {len(vectors)} image feature vectors")
    merged = embeddings.clone()
    merged[image_positions] = vectors
    return merged


def new_cache(trunk: Idefics3Trunk, batch: int, max_length: int) -> KeyValueCache:
    """An empty cache for this model, as wide as the key projections are here."""
    weight = trunk.text_model.get_parameter("layers.0.self_attn.k_proj.weight")
    return KeyValueCache(
        layers=len(trunk.text_model.layers),
        batch=batch,
        heads=weight.shape[0] // trunk.config.text_config.head_dim,
        max_length=max_length,
        head_dim=trunk.config.text_config.head_dim,
        dtype=weight.dtype,
        device=weight.device,
    )


def prefill(
    trunk: Idefics3Trunk,
    embeddings: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    cache: KeyValueCache | None,
    *,
    taps: Taps | None = None,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """Many tokens at once: a prompt, or a further piece of one when the cache holds something already.

    Args:
        trunk: the model.
        embeddings: (B, S, D), image features merged in.
        positions: (B, S) int64 rotary positions.
        valid: (B, K) bool over all slots up to the last of these tokens, False for padding; None when all are real.
        cache: receives keys and values.
        taps: receives hidden states by name.
        attentions: receives one (B, H, S, K) tensor for each layer; makes the explicit attention run.

    Returns:
        (B, S, D) after the final norm.
    """
    tokens = embeddings.shape[1]
    start = 0 if cache is None else cache.length
    if cache is not None:
        cache.require(tokens)
    cos, sin = trunk.text_model.rotary(positions, embeddings.dtype)
    bias = causal_bias(valid, start, tokens, start + tokens, embeddings)
    implementation = trunk.implementation if attentions is None else "eager"
    shared = Pass(cos, sin, bias, cache, implementation, attentions)
    return trunk.text_model.blocks(embeddings, shared, taps)


def decode(
    trunk: Idefics3Trunk,
    tokens: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    cache: KeyValueCache,
    *,
    taps: Taps | None = None,
) -> Tensor:
    """One token for every row.

    Args:
        trunk: the model.
        tokens: (B, 1) int64 ids.
        positions: (B, 1) int64, every row's own next position.
        valid: (B, K) bool over all slots including the new one; None when all are real.
        cache: keys and values so far; receives the new ones.
        taps: receives hidden states by name.

    Returns:
        (B, 1, D) after the final norm.
    """
    cache.require(1)
    x = trunk.text_model.embed_tokens(tokens)
    cos, sin = trunk.text_model.rotary(positions, x.dtype)
    bias = None if valid is None else hidden_bias(valid[:, None, None, : cache.length + 1], x)
    shared = Pass(cos, sin, bias, cache, trunk.implementation)
    return trunk.text_model.blocks(x, shared, taps)


def _on(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.device)


# ------------------------------------------------------------------------------------------------- tables, for weights

#: Checkpoint names that differ from attribute names: pattern and replacement, None for tensors that are not weights.
#: Old Llama exports carry the rotary frequencies, which are computed here.
RENAME: tuple[tuple[str, str | None], ...] = ((r"^.*\.rotary_emb\.inv_freq$", None),)

#: How tensor parallelism cuts modules (see `tp`): name pattern and kind. What is not listed is whole.
PLAN: tuple[tuple[str, str], ...] = (
    (r"vision_model\.encoder\.layers\.\d+\.self_attn\.[qkv]_proj", COLUMN),
    (r"vision_model\.encoder\.layers\.\d+\.self_attn\.out_proj", ROW),
    (r"vision_model\.encoder\.layers\.\d+\.mlp\.fc1", COLUMN),
    (r"vision_model\.encoder\.layers\.\d+\.mlp\.fc2", ROW),
    (r"text_model\.layers\.\d+\.self_attn\.[qkv]_proj", COLUMN),
    (r"text_model\.layers\.\d+\.self_attn\.o_proj", ROW),
    (r"text_model\.layers\.\d+\.mlp\.(gate|up)_proj", COLUMN),
    (r"text_model\.layers\.\d+\.mlp\.down_proj", ROW),
)


def divisible(config: Idefics3Config) -> Iterator[tuple[str, str, int, str]]:
    """Counts that tensor parallelism has to divide: configuration, what is counted, the count, one module it cuts."""
    vision, text = config.vision_config, config.text_config
    first = "model.vision_model.encoder.layers.0"
    yield "text_config", "attention heads", text.num_attention_heads, "model.text_model.layers.0.self_attn.q_proj"
    yield "text_config", "key/value heads", text.num_key_value_heads, "model.text_model.layers.0.self_attn.k_proj"
    yield "text_config", "feed-forward columns", text.intermediate_size, "model.text_model.layers.0.mlp.gate_proj"
    yield "vision_config", "attention heads", vision.num_attention_heads, f"{first}.self_attn.q_proj"
    yield "vision_config", "feed-forward columns", vision.intermediate_size, f"{first}.mlp.fc1"
