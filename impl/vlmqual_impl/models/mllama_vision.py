"""The vision model of Mllama: tiles to features, in data order.

Legend of shapes: B rows, N image slots of a row, T tiles of an image, I = B * N images, P patches of a tile, L = P + 1
positions of a tile (class embedding first), M = L padded to a multiple of 8, D width, H heads, d head width.

The rules are MLLAMA-TOWER-*. Taps name hidden states by component: vision.embeddings, vision.layers.{i},
vision.layernorm_post, vision.global_layers.{i}, vision.intermediate_states, each (I, T, L, width).

Where the sources disagree, transformers 4.45.2 is followed: which state an intermediate index selects stands in
`selected_states`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmqual_impl.configs import MllamaVisionConfig
from vlmqual_impl.layers import MLP, Taps, attend, hidden_bias, tap

_MULTIPLE = 8  # a tile's positions are padded to a multiple of this


class TileEmbedding(nn.Module):
    """One vector for each tile of an image, chosen by its aspect ratio, times tanh(gate)."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.tiles, self.width = config.max_num_tiles, config.hidden_size
        self.embedding = nn.Embedding(config.max_aspect_ratio_id + 1, self.tiles * self.width)  # MLLAMA-VIS-007
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """(I, T, positions, D) and (I,) to (I, T, positions, D)."""
        vectors = self.embedding(ids).view(-1, self.tiles, 1, self.width)
        out: Tensor = x + vectors * self.gate.tanh()
        return out


class PositionEmbedding(nn.Module):
    """Position in the tile times 1 - tanh(gate), and position in the tile of this aspect ratio times tanh(gate)."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.shape = (config.max_num_tiles, config.patches_per_tile, config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.empty(self.shape[1:]).normal_(0.0, config.hidden_size**-0.5))
        self.tile_embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, self.shape[0] * self.shape[1] * self.shape[2]
        )

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """(I, T, L, D) and (I,) to (I, T, L, D)."""
        x = x + (1 - self.gate.tanh()) * self.embedding
        out: Tensor = x + self.gate.tanh() * self.tile_embedding(ids).view(-1, *self.shape)
        return out


class VisionAttention(nn.Module):
    """Self-attention without biases over all tiles of an image."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, implementation: str, weights: list[Tensor] | None) -> Tensor:
        """(I, T * M, D) to (I, T * M, D)."""
        images, positions, _ = x.shape
        q, k, v = (
            projection(x).view(images, positions, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.o_proj(attend(q, k, v, bias, implementation=implementation, weights=weights))
        return out


class VisionLayer(nn.Module):
    """Pre-norm block; in the global encoder both branches are multiplied by the tanh of a gate."""

    def __init__(self, config: MllamaVisionConfig, *, gated: bool) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gate_attn = nn.Parameter(torch.empty(1).normal_(0.0, config.initializer_range)) if gated else None
        self.gate_ffn = nn.Parameter(torch.empty(1).normal_(0.0, config.initializer_range)) if gated else None

    def forward(self, x: Tensor, bias: Tensor, implementation: str, weights: list[Tensor] | None) -> Tensor:
        """(I, T * M, D) to (I, T * M, D)."""
        mixed = self.self_attn(self.input_layernorm(x), bias, implementation, weights)
        x = x + (mixed if self.gate_attn is None else self.gate_attn.tanh() * mixed)
        fed = self.mlp(self.post_attention_layernorm(x))
        out: Tensor = x + (fed if self.gate_ffn is None else self.gate_ffn.tanh() * fed)
        return out


class VisionEncoder(nn.Module):
    """The blocks, under the name that checkpoints give them."""

    def __init__(self, config: MllamaVisionConfig, layers: int, *, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, gated=gated) for _ in range(layers))


@dataclass(frozen=True)
class VisionRecord:
    """What a caller wants to see of the vision model besides its output.

    Attributes:
        states: receives (I, T * M, D): what enters each layer of an encoder and what leaves its last, local one first.
        attentions: receives (I, H, T * M, T * M) for each layer; makes the explicit attention run.
    """

    states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None

    def keep(self, state: Tensor) -> None:
        """Take a state where states were asked for."""
        if self.states is not None:
            self.states.append(state)


def unwanted_pairs(tile_mask: Tensor, positions: int, padded: int) -> Tensor:
    """Pairs of positions of an image that do not attend to each other, (I, T * M, T * M) bool.

    Only padding does not see padding: positions of real tiles attend to padding positions and masked tiles as well
    (MLLAMA-VIS-008).

    Args:
        tile_mask: (I, T), 0 for masked tiles.
        positions: L.
        padded: M.
    """
    bad = (tile_mask == 0)[:, :, None].expand(-1, -1, padded).clone()
    bad[:, :, positions:] = True
    bad = bad.flatten(1)
    return bad[:, :, None] & bad[:, None, :]


def selected_states(states: Mapping[int, Tensor], indices: Sequence[int]) -> Tensor:
    """The intermediate states of the local encoder, interleaved: channel c of the k-th is channel c * count + k.

    Index i is the state that enters layer i, and the number of layers the state that leaves the last: the rule of the
    original implementation and of transformers 4.45.2. From 5.0 on transformers takes the state that leaves layer i,
    with which released weights give other answers (MLLAMA-TOWER-011).

    Args:
        states: by number (I, T * M, D), what enters layer 0, 1, ... and what leaves the last; at least the wanted ones.
        indices: as in the configuration.

    Returns:
        (I, T * M, D * count).
    """
    return torch.stack([states[index] for index in indices], dim=-1).flatten(-2)


class MllamaVision(nn.Module):
    """Patches, tile and position embeddings, local and global encoder."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        config.require_fitting()
        self.sizes = config
        width = config.hidden_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(width).normal_(0.0, width**-0.5))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(width)
        self.layernorm_post = nn.LayerNorm(width)
        self.transformer = VisionEncoder(config, config.num_hidden_layers, gated=False)
        self.global_transformer = VisionEncoder(config, config.num_global_layers, gated=True)

    def patches(self, pixels: Tensor) -> Tensor:
        """(I, T, 3, t, t) to (I, T, P, D), patches row by row."""
        images, tiles, channels, height, width = pixels.shape
        size = self.sizes.patch_size
        rows, columns = height // size, width // size
        # The convolution's stride is its kernel, so it is one product over patches laid out as (channel, y, x).
        cut = pixels[..., : rows * size, : columns * size].reshape(images, tiles, channels, rows, size, columns, size)
        cut = cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(images, tiles, rows * columns, -1)
        return F.linear(cut, self.patch_embedding.weight.flatten(1))

    def embeddings(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """(I, T, 3, t, t) and (I,) to (I, T, L, D)."""
        x = self.pre_tile_positional_embedding(self.patches(pixels), ids)
        first = self.class_embedding.expand(*x.shape[:2], 1, -1)
        x = self.gated_positional_embedding(torch.cat((first, x), dim=2), ids)
        out: Tensor = self.layernorm_pre(x)
        return out

    def encode(
        self,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor,
        aspect_ratio_mask: Tensor,
        *,
        implementation: str = "eager",
        taps: Taps | None = None,
        record: VisionRecord | None = None,
    ) -> Tensor:
        """Tiles to features.

        Args:
            pixel_values: (B, N, T, 3, t, t).
            aspect_ratio_ids: (B, N) int64, 0 for padding images.
            aspect_ratio_mask: (B, N, T), 0 for tiles that are not there.
            implementation: "eager" or "sdpa".
            taps: receives hidden states by name.
            record: receives what its lists ask for.

        Returns:
            (B, N, T, L, vision_output_dim) (MLLAMA-VIS-003).
        """
        record = record or VisionRecord()
        rows, slots, tiles = pixel_values.shape[:3]
        ids, tile_mask = aspect_ratio_ids.reshape(-1), aspect_ratio_mask.reshape(-1, tiles)
        x = self.embeddings(pixel_values.flatten(0, 1), ids)
        tap(taps, "vision.embeddings", x)
        images, _, positions, width = x.shape
        padded = -(-positions // _MULTIPLE) * _MULTIPLE
        x = F.pad(x, (0, 0, 0, padded - positions)).flatten(1, 2)
        bias = hidden_bias(~unwanted_pairs(tile_mask, positions, padded)[:, None], x)
        implementation = implementation if record.attentions is None else "eager"

        def unpadded(state: Tensor) -> Tensor:
            return state.view(images, tiles, padded, -1)[:, :, :positions]

        wanted = self.sizes.intermediate_layers_indices
        local: dict[int, Tensor] = {}
        for index, layer in enumerate(self.transformer.layers):
            if index in wanted:
                local[index] = x
            record.keep(x)
            x = layer(x, bias, implementation, record.attentions)
            tap(taps, f"vision.layers.{index}", unpadded(x))
        local[len(self.transformer.layers)] = x
        record.keep(x)
        x = self.layernorm_post(x)
        tap(taps, "vision.layernorm_post", unpadded(x))
        x = self.post_tile_positional_embedding(x.view(images, tiles, padded, width), ids).flatten(1, 2)
        for index, layer in enumerate(self.global_transformer.layers):
            record.keep(x)
            x = layer(x, bias, implementation, record.attentions)
            tap(taps, f"vision.global_layers.{index}", unpadded(x))
        record.keep(x)
        between = unpadded(selected_states(local, wanted))
        tap(taps, "vision.intermediate_states", between)
        return torch.cat((unpadded(x), between), dim=-1).view(rows, slots, tiles, positions, -1)


def check_pixels(
    config: MllamaVisionConfig, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor
) -> None:
    """Refuse tensors of another shape than documented, and ids that the tables do not have.

    Raises:
        ValueError: names tensor, shape and what would be valid.
    """
    side = config.image_size
    wanted = (config.max_num_tiles, config.num_channels, side, side)
    if pixel_values.ndim != 6 or tuple(pixel_values.shape[2:]) != wanted:
        raise ValueError(
            f"pixel_values is {tuple(pixel_values.shape)}; "
            f"it has to be (batch, images, tiles, channels, height, width), here (batch, images, *{wanted})"
        )
    for name, given, shape in (
        ("aspect_ratio_ids", aspect_ratio_ids, pixel_values.shape[:2]),
        ("aspect_ratio_mask", aspect_ratio_mask, pixel_values.shape[:3]),
    ):
        if tuple(given.shape) != tuple(shape):
            raise ValueError(f"{name} is {tuple(given.shape)}; with these pixel_values it has to be {tuple(shape)}")
    low, high = int(aspect_ratio_ids.min()), int(aspect_ratio_ids.max())
    if low < 0 or high > config.max_aspect_ratio_id:
        raise ValueError(
            f"aspect_ratio_ids holds {low if low < 0 else high}; valid are 0 to {config.max_aspect_ratio_id}"
        )
