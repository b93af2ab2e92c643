"""The image side of Idefics: pictures to features of the vision tower, and the resampler; in data order.

Legend of shapes: I pictures, P patches of a picture, L = P + 1 positions (class embedding first) or latents of the
resampler, D width of the tower, H heads, d head width.

The rules are IDEFICS-TOWER-* and IDEFICS-RESAMPLER-*. Taps name hidden states by component: vision.embeddings,
vision.layers.{i}, resampler.blocks.{i}.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmqual_impl.configs import IdeficsPerceiverConfig, IdeficsVisionConfig
from vlmqual_impl.layers import MLP, Taps, at_least_float32, attend, tap

# ------------------------------------------------------------------------------------------------------------- tower


class VisionEmbeddings(nn.Module):
    """Patches, class embedding and learned positions."""

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        width = config.embed_dim
        self.class_embedding = nn.Parameter(torch.empty(width).normal_())
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)

    def patches(self, pixels: Tensor) -> Tensor:
        """(I, C, height, width) to (I, P, D), patches row by row; a rest that fills no patch is left out."""
        pictures, channels, height, width = pixels.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        # The convolution's stride is its kernel, so it is one product over patches laid out as (channel, y, x).
        cut = pixels[..., : rows * size, : columns * size].reshape(pictures, channels, rows, size, columns, size)
        cut = cut.permute(0, 2, 4, 1, 3, 5).reshape(pictures, rows * columns, -1)
        return F.linear(cut, self.patch_embedding.weight.flatten(1))

    def positions(self, height: int, width: int) -> Tensor:
        """Position vectors (L, D) of a picture of this size.

        The grid of the patches' positions is resized bicubically; a tenth of a patch is added to the wanted number of
        rows and columns, so that rounding cannot make them one less. The class position stays.
        """
        table = self.position_embedding.weight
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == len(table) - 1 and height == width:
            return table
        side = math.isqrt(len(table) - 1)
        grid = table[1:].to(at_least_float32(table.dtype)).T.reshape(1, -1, side, side)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
        if tuple(grid.shape[-2:]) != (rows, columns):
            raise ValueError(f"positions of {side} x {side} patches cannot be interpolated to {rows} x {columns}")
        return torch.cat((table[:1], grid.flatten(2)[0].T.to(table.dtype)))

    def forward(self, pixels: Tensor, interpolate: bool) -> Tensor:
        """(I, C, height, width) to (I, L, D).

        Raises:
            ValueError: the pictures have another size than the configuration's, and positions may not be interpolated.
        """
        height, width = pixels.shape[-2:]
        self.check_size(height, width, interpolate)
        x = self.patches(pixels)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        return x + (self.positions(height, width) if interpolate else self.position_embedding.weight)

    def check_size(self, height: int, width: int, interpolate: bool) -> None:
        """Refuse pictures that there are no positions for.

        Raises:
            ValueError: they have another size than the configuration's, and positions may not be interpolated.
        """
        if not interpolate and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values hold pictures of {height} x {width}; the model is for {self.image_size} x "
                f"{self.image_size}, other sizes need interpolate_pos_encoding=True"
            )
        if min(height, width) < self.patch_size:
            raise ValueError(f"pixel_values hold pictures of {height} x {width}; a patch is {self.patch_size} wide")


class VisionAttention(nn.Module):
    """Self-attention over the positions of a picture, with biases."""

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.head_dim, self.dropout = width // config.num_attention_heads, config.attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, implementation: str) -> Tensor:
        """(I, L, D) to (I, L, D)."""
        pictures, positions, _ = x.shape
        q, k, v = (
            projection(x).view(pictures, positions, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.out_proj(attend(q, k, v, None, implementation=implementation, dropout=dropout))
        return out


class VisionLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config.embed_dim, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, implementation: str) -> Tensor:
        """(I, L, D) to (I, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x), implementation)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionEncoder(nn.Module):
    """The blocks, under the name that checkpoints give them."""

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class IdeficsVision(nn.Module):
    """The tower. Its output is what leaves the last block.

    `post_layernorm` belongs to checkpoints; it is for a pooled vector that nothing here uses (IDEFICS-TOWER-007).
    """

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)  # so spelled in checkpoints
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def encode(self, pixels: Tensor, *, interpolate: bool, implementation: str, taps: Taps | None = None) -> Tensor:
        """(I, C, height, width) to (I, L, D)."""
        x = self.pre_layrnorm(self.embeddings(pixels, interpolate))
        tap(taps, "vision.embeddings", x)
        for index, layer in enumerate(self.encoder.layers):
            x = layer(x, implementation)
            tap(taps, f"vision.layers.{index}", x)
        out: Tensor = x
        return out


# --------------------------------------------------------------------------------------------------------- resampler


class ResamplerAttention(nn.Module):
    """Queries from the latents, keys and values from context and latents."""

    def __init__(self, config: IdeficsPerceiverConfig, width: int) -> None:
        super().__init__()
        self.head_dim = config.resampler_head_dim
        inner = config.resampler_n_heads * config.resampler_head_dim
        self.context_layer_norm = nn.LayerNorm(width)
        self.latents_layer_norm = nn.LayerNorm(width)
        normed = config.qk_layer_norms_perceiver
        self.q_layer_norm = nn.LayerNorm(self.head_dim) if normed else None
        self.k_layer_norm = nn.LayerNorm(self.head_dim) if normed else None
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.output_proj = nn.Linear(inner, width, bias=False)

    def forward(self, context: Tensor, latents: Tensor, implementation: str) -> Tensor:
        """(I, positions, D) and (I, L, D) to (I, L, D)."""
        latents = self.latents_layer_norm(latents)
        both = torch.cat((self.context_layer_norm(context), latents), dim=1)
        q, k, v = (
            projection(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for projection, x in ((self.q_proj, latents), (self.k_proj, both), (self.v_proj, both))
        )
        if self.q_layer_norm is not None and self.k_layer_norm is not None:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        out: Tensor = self.output_proj(attend(q, k, v, None, implementation=implementation))
        return out


class ResamplerMLP(nn.Module):
    """c_proj(relu(fc(norm(x)))), without biases, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(I, L, D) to (I, L, D)."""
        out: Tensor = self.c_proj(F.relu(self.fc(self.ln(x))))
        return out


class Resampler(nn.Module):
    """A fixed number of latents that read a picture's positions, however many these are."""

    def __init__(self, config: IdeficsPerceiverConfig, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.resampler_n_latents, width).normal_())
        self.blocks = nn.ModuleList(
            nn.ModuleList((ResamplerAttention(config, width), ResamplerMLP(width)))
            for _ in range(config.resampler_depth)
        )
        self.layer_norm = nn.LayerNorm(width)

    def resample(self, context: Tensor, *, implementation: str, taps: Taps | None = None) -> Tensor:
        """(I, positions, D) to (I, L, D)."""
        x = self.latents.expand(len(context), -1, -1)
        for index, block in enumerate(self.blocks):
            attention, feed = block.children()
            x = x + attention(context, x, implementation)
            x = x + feed(x)
            tap(taps, f"resampler.blocks.{index}", x)
        out: Tensor = self.layer_norm(x)
        return out
