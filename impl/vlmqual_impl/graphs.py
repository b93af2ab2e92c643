"""What each family gives a compiler: its entries, and the tensors that it feeds to them.

Legend of shapes: B rows, S tokens of a call, K cache slots, D text width, d head width, H key heads, V vocabulary,
N image slots of a row, T tiles, L features of a frame, tile or image, KI image features of a row, E their width,
F frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmqual_impl.entries import Decoder, Entry, Spec, TextStep
from vlmqual_impl.layers import Rotary
from vlmqual_impl.models import idefics, idefics3, mllama
from vlmqual_impl.models.idefics_vision import IdeficsVision, Resampler
from vlmqual_impl.models.mllama_vision import MllamaVision, check_pixels
from vlmqual_impl.paged import PagedStep
from vlmqual_impl.runtime.eager import EagerRuntime
from vlmqual_impl.runtime.eager_idefics import IdeficsRuntime
from vlmqual_impl.runtime.eager_idefics3 import Idefics3Runtime
from vlmqual_impl.runtime.eager_mllama import MllamaRuntime


class Graphs(ABC):
    """Entries of one loaded model, and the tensors around them.

    Attributes:
        eager: the same model for what stays on the host: the embedding, and checks of what is given.
        decoder: what a text entry needs.
        rotary: makes cosines and sines.
        width: D.
        head_dim: d.
        key_heads: H.
        paged: text entries are those of `vlmqual_impl.paged`.
    """

    eager: EagerRuntime
    decoder: Decoder
    rotary: Rotary
    width: int
    head_dim: int
    key_heads: int

    def __init__(self, attention: str, paged: bool = False) -> None:
        self.attention = attention
        self.paged = paged

    # vision ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def pictures(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """What the vision entry takes for each frame or image, in order.

        Raises:
            ValueError: a shape is not the documented one.
        """

    @abstractmethod
    def vision(self, picture: Sequence[Tensor]) -> Entry:
        """The vision entry for tensors of these shapes: the tower."""

    @abstractmethod
    def connector(self, states: int) -> Entry | None:
        """What follows the tower, for one frame or image of so many states; None in a model where nothing does."""

    @abstractmethod
    def features(self, made: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Outputs of the connector entry, or of the vision entry, as the documented features."""

    # text ------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def by_image(self, features: Tensor, rows: int) -> Tensor | None:
        """Features as (B, N, L, E) for the cross entry; None in a family that merges them."""

    @abstractmethod
    def cross(self, features: int) -> Entry | None:
        """Keys and values of one image of so many features, of every crossing layer."""

    @abstractmethod
    def seen(self, features: Tensor | None, inputs: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What tokens see of images: added to scores (B, 1, S, KI); (B, S, 1), 0 for tokens that see none.

        Raises:
            ValueError: features and mask do not fit each other.
        """

    def text(self, rows: int, tokens: int, slots: int, images: int, pages: int = 0) -> Entry:
        """Some tokens of every row.

        Args:
            rows: B.
            tokens: S.
            slots: K.
            images: KI, 0 for no images.
            pages: rows of the cache where text entries are paged; otherwise they are those of the call.
        """
        kind, decoder = self.eager.dtype, self.decoder
        pages = max(rows, pages) if self.paged else rows
        inputs = [
            Spec("embeddings", (rows, tokens, self.width), kind),
            Spec("cos", (rows, 1, tokens, self.head_dim), kind),
            Spec("sin", (rows, 1, tokens, self.head_dim), kind),
        ]
        if self.paged:
            inputs += [
                Spec("mask", (rows, slots), kind),
                Spec("start", (rows, 1), torch.int32),
                Spec("table", (rows, 1) if tokens == 1 else (1,), torch.int16),
            ]
        else:
            inputs += [Spec("bias", (rows, 1, tokens, slots), kind), Spec("slots", (tokens,), torch.int64)]
        inputs.append(Spec("last", (rows,), torch.int64))
        if images:
            inputs += [
                Spec("image_bias", (rows, 1, tokens, images), kind),
                Spec("image_rows", (rows, tokens, 1), kind),
            ]
            shape = (rows, self.key_heads, images, self.head_dim)
            inputs += [Spec(f"cross_{what}.{n}", shape, kind) for what in _PAIR for n in decoder.crossing]
        cache = (pages, self.key_heads, slots, self.head_dim)
        vocabulary = self.eager.vocabulary
        step = PagedStep if self.paged else TextStep
        return Entry(
            f"text-b{rows}-s{tokens}-k{slots}"
            + (f"-i{images}" if images else "")
            + (f"-of{pages}" if self.paged else ""),
            step(self._layers(bool(images)), decoder, self.attention, bool(images)),
            tuple(inputs),
            (Spec("logits", (rows, vocabulary), kind), Spec("hidden", (rows, tokens, self.width), kind)),
            tuple(Spec(f"{what}.{n}", cache, kind) for what in _PAIR for n in decoder.layers),
            idle=tuple(weight for module in self._crossing() for weight in _image_weights(module)),
        )

    def head(self, rows: int, tokens: int) -> Entry:
        """Logits of every position."""
        kind = self.eager.dtype
        return Entry(
            f"head-b{rows}-s{tokens}",
            _Outputs(self.decoder.head),
            (Spec("hidden", (rows, tokens, self.width), kind),),
            (Spec("logits", (rows, tokens, self.eager.vocabulary), kind),),
        )

    @abstractmethod
    def _layers(self, images: bool) -> list[nn.Module]:
        """What a text entry runs before the head."""

    def _crossing(self) -> list[Any]:
        """The attentions over image features."""
        return []


_PAIR = ("keys", "values")


def _image_weights(attention: nn.Module, others: bool = False) -> list[nn.Parameter]:
    """What `keys_values` of an attention reads, or its other weights."""
    names = ("k_proj", "v_proj", "k_norm", "k_layer_norm")
    return [weight for name, weight in attention.named_parameters() if (name.partition(".")[0] in names) != others]


class _Outputs(nn.Module):
    """A module whose result is a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


class CrossKeys(nn.Module):
    """Image features (1, L, E) to keys of every crossing layer, then values, (1, H, L, d) each."""

    def __init__(self, attentions: Sequence[Any]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        pairs = [attention.keys_values(features) for attention in self.attentions]  # type: ignore[operator]
        return *(keys for keys, _ in pairs), *(values for _, values in pairs)


def _cross_entry(graphs: Graphs, attentions: Sequence[Any], features: int, width: int) -> Entry:
    kind = graphs.eager.dtype
    shape = (1, graphs.key_heads, features, graphs.head_dim)
    return Entry(
        f"cross-l{features}",
        CrossKeys(attentions),
        (Spec("features", (1, features, width), kind),),
        tuple(Spec(f"cross_{what}.{n}", shape, kind) for what in _PAIR for n in graphs.decoder.crossing),
        idle=tuple(weight for each in attentions for weight in _image_weights(each, others=True)),
    )


def _specs(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Spec, ...]:
    return tuple(Spec(name, tuple(t.shape), t.dtype) for name, t in zip(names, tensors, strict=True))


# Idefics3 ------------------------------------------------------------------------------------------------------------


class Idefics3Vision(nn.Module):
    """One frame: pixels (1, 3, h, w), rows of the position table (1, P), bias (1, 1, 1, P); to (1, P, D of vision)."""

    def __init__(self, tower: idefics3.Idefics3VisionTransformer, attention: str) -> None:
        super().__init__()
        self.vision_model = tower
        self.attention = attention

    def forward(self, pixels: Tensor, ids: Tensor, bias: Tensor) -> tuple[Tensor]:
        """See the class."""
        return (self.vision_model.placed(pixels, ids, bias, self.attention),)


class Idefics3Graphs(Graphs):
    """Features become part of the embeddings."""

    def __init__(self, network: idefics3.Idefics3, attention: str, paged: bool = False) -> None:
        super().__init__(attention, paged)
        self.model = network
        text, sizes = network.model.text_model, network.config.text_config
        self.eager, self.rotary = Idefics3Runtime(network), text.rotary
        self.width, self.head_dim, self.key_heads = sizes.hidden_size, sizes.head_dim, sizes.num_key_value_heads
        layers = tuple(range(len(text.layers)))
        self.decoder = Decoder(lambda x, shared, seen: text.blocks(x, shared, None), network.lm_head, layers)

    def _layers(self, images: bool) -> list[nn.Module]:
        text = self.model.model.text_model
        return [*text.layers, text.norm]

    def pictures(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """Pixels, rows of the position table and what hides masked patches, of each real frame."""
        trunk, kind = self.model.model, self.eager.dtype
        frames, mask = idefics3.checked_frames(trunk, inputs["pixel_values"], inputs.get("pixel_attention_mask"))
        frames = frames.to(kind)
        ids, bias = trunk.vision_model.places(frames, mask)
        hidden = frames.new_zeros(len(frames), 1, 1, ids.shape[1]) if bias is None else bias
        return [tuple(tensor[i : i + 1] for tensor in (frames, ids, hidden)) for i in range(len(frames))]

    def vision(self, picture: Sequence[Tensor]) -> Entry:
        """See `Graphs.vision`."""
        size = "x".join(str(side) for side in picture[0].shape[2:])
        width = self.model.config.vision_config.hidden_size
        out = Spec("states", (1, picture[1].shape[1], width), self.eager.dtype)
        module = Idefics3Vision(self.model.model.vision_model, self.attention)
        return Entry(f"vision-{size}", module, _specs(("pixels", "ids", "bias"), picture), (out,))

    def connector(self, states: int) -> Entry:
        """See `Graphs.connector`: pixel shuffle and projection, (1, P, D of vision) to (1, L, D)."""
        config, kind = self.model.config, self.eager.dtype
        given = Spec("states", (1, states, config.vision_config.hidden_size), kind)
        out = Spec("features", (1, states // config.scale_factor**2, self.width), kind)
        return Entry(f"connector-p{states}", _Outputs(self.model.model.connector), (given,), (out,))

    def features(self, made: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """(F, L, D)."""
        return torch.cat(list(made))

    def by_image(self, features: Tensor, rows: int) -> None:
        """Nothing."""

    def cross(self, features: int) -> None:
        """Nothing."""

    def seen(self, features: Tensor | None, inputs: Mapping[str, Tensor], x: Tensor) -> None:
        """Nothing."""


# Mllama --------------------------------------------------------------------------------------------------------------


class MllamaImage(nn.Module):
    """One image: pixels (1, 1, T, 3, t, t), arrangement (1, 1), real tiles (1, 1, T); to (1, T * L, D of vision)."""

    def __init__(self, tower: MllamaVision, attention: str) -> None:
        super().__init__()
        self.vision_model = tower
        self.attention = attention

    def forward(self, pixels: Tensor, ids: Tensor, tiles: Tensor) -> tuple[Tensor]:
        """See the class."""
        return (self.vision_model.encode(pixels, ids, tiles, implementation=self.attention).flatten(1, 3),)


class MllamaGraphs(Graphs):
    """Features stay beside the text."""

    def __init__(self, network: mllama.Mllama, attention: str, paged: bool = False) -> None:
        super().__init__(attention, paged)
        self.model = network
        text, sizes = network.language_model.model, network.config.text_config
        self.eager, self.rotary = MllamaRuntime(network), text.rotary
        self.width, self.head_dim, self.key_heads = sizes.hidden_size, sizes.head_dim, sizes.num_key_value_heads
        numbers = range(sizes.num_hidden_layers)

        def blocks(x: Tensor, shared: Any, seen: tuple[Tensor, Tensor] | None) -> Tensor:
            images = mllama.Images() if seen is None else mllama.Images(bias=seen[0], rows=seen[1])
            return text.blocks(x, shared, images, None)

        self.decoder = Decoder(
            blocks,
            network.language_model.lm_head,
            tuple(n for n in numbers if n not in text.crossing),
            tuple(n for n in numbers if n in text.crossing),
        )

    def _layers(self, images: bool) -> list[nn.Module]:
        text = self.model.language_model.model
        return [*(each for n, each in enumerate(text.layers) if images or n not in text.crossing), text.norm]

    def _crossing(self) -> list[Any]:
        layers: Any = self.model.language_model.model.layers
        return [layers[n].cross_attn for n in self.decoder.crossing]

    def pictures(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """Pixels, number of the arrangement and real tiles, of each image slot."""
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        missing = [name for name in names if name not in inputs]
        if missing:
            raise ValueError(f"{' and '.join(missing)} is missing; vision needs {', '.join(names)}")
        pixels, ids, mask = (inputs[name] for name in names)
        check_pixels(self.model.config.vision_config, pixels, ids, mask)
        flat = (pixels.to(self.eager.dtype).flatten(0, 1), ids.flatten(0, 1), mask.flatten(0, 1))
        return [tuple(t[i][None, None] for t in flat) for i in range(len(flat[1]))]

    def vision(self, picture: Sequence[Tensor]) -> Entry:
        """See `Graphs.vision`."""
        sizes = self.model.config.vision_config
        states = picture[0].shape[2] * sizes.patches_per_tile
        out = Spec("states", (1, states, sizes.vision_output_dim), self.eager.dtype)
        inputs = _specs(("pixels", "ids", "tiles"), picture)
        module = MllamaImage(self.model.vision_model, self.attention)
        return Entry(f"vision-{sizes.image_size}", module, inputs, (out,))

    def connector(self, states: int) -> Entry:
        """See `Graphs.connector`: the projection, (1, T * L, D of vision) to (1, T * L, D)."""
        kind, width = self.eager.dtype, self.model.config.vision_config.vision_output_dim
        given, out = Spec("states", (1, states, width), kind), Spec("features", (1, states, self.width), kind)
        return Entry(f"connector-l{states}", _Outputs(self.model.multi_modal_projector), (given,), (out,))

    def features(self, made: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, KI, D)."""
        rows = inputs["pixel_values"].shape[0]
        return torch.cat(list(made)).reshape(rows, -1, self.width)

    def by_image(self, features: Tensor, rows: int) -> Tensor:
        """(B, N, T * L, D)."""
        sizes = self.model.config.vision_config
        each = sizes.max_num_tiles * sizes.patches_per_tile
        whole = mllama.row_features(features, rows).to(self.eager.dtype)
        if whole.shape[1] % each:
            raise ValueError(f"a row has {whole.shape[1]} image features; an image has {each}")
        return whole.view(rows, -1, each, self.width)

    def cross(self, features: int) -> Entry:
        """See `Graphs.cross`."""
        return _cross_entry(self, self._crossing(), features, self.width)

    def seen(self, features: Tensor | None, inputs: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Graphs.seen`; without a mask every token sees everything."""
        whole = None if features is None else mllama.row_features(features, x.shape[0]).to(x)
        images = mllama.images_for(self.model.config, whole, inputs.get("cross_attention_mask"), x)
        if images.states is None:
            return None
        bias, rows = images.bias, images.rows
        if bias is None or rows is None:
            return x.new_zeros(x.shape[0], 1, x.shape[1], images.states.shape[1]), x.new_ones(*x.shape[:2], 1)
        return bias, rows


# Idefics -------------------------------------------------------------------------------------------------------------


class IdeficsImage(nn.Module):
    """One picture (1, 3, h, w) to (1, P + 1, E)."""

    def __init__(self, tower: IdeficsVision, attention: str, interpolate: bool) -> None:
        super().__init__()
        self.vision_model = tower
        self.attention, self.interpolate = attention, interpolate

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        """See the class."""
        return (self.vision_model.encode(pixels, interpolate=self.interpolate, implementation=self.attention),)


class IdeficsLatents(nn.Module):
    """States of one picture (1, P + 1, E) to latents (1, L, E)."""

    def __init__(self, resampler: Resampler, attention: str) -> None:
        super().__init__()
        self.resampler = resampler
        self.attention = attention

    def forward(self, states: Tensor) -> tuple[Tensor]:
        """See the class."""
        return (self.resampler.resample(states, implementation=self.attention),)


class IdeficsGraphs(Graphs):
    """Features stay beside the text; cross-attention blocks stand between decoder layers."""

    def __init__(self, network: idefics.Idefics, attention: str, paged: bool = False) -> None:
        super().__init__(attention, paged)
        self.model = network
        trunk, sizes = network.model, network.config
        self.eager, self.rotary = IdeficsRuntime(network), trunk.rotary
        self.width, self.key_heads = sizes.hidden_size, sizes.num_attention_heads
        self.head_dim = sizes.hidden_size // sizes.num_attention_heads
        self._interpolate = False

        def blocks(x: Tensor, shared: Any, seen: tuple[Tensor, Tensor] | None) -> Tensor:
            if seen is None:
                raise ValueError("this family has no text without an image slot")
            return trunk.blocks(x, shared, idefics.Images(None, seen[0], seen[1] > 0.5), None)

        numbers = tuple(range(len(trunk.layers)))
        crossing = tuple(range(len(trunk.gated_cross_attn_layers)))
        self.decoder = Decoder(blocks, network.lm_head, numbers, crossing, apart=True)

    def _layers(self, images: bool) -> list[nn.Module]:
        trunk = self.model.model
        return [*trunk.layers, *trunk.gated_cross_attn_layers, trunk.norm]

    def _crossing(self) -> list[Any]:
        blocks: Any = self.model.model.gated_cross_attn_layers
        return [block.cross_attn for block in blocks]

    def pictures(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """Pixels of each image slot."""
        pixels = inputs["pixel_values"]
        idefics.check_pixels(self.model.config, pixels)
        asked = inputs.get("interpolate_pos_encoding")
        self._interpolate = asked is not None and bool(asked.any())
        embeddings = self.model.model.vision_model.embeddings
        embeddings.check_size(int(pixels.shape[-2]), int(pixels.shape[-1]), self._interpolate)
        return [(picture[None].to(self.eager.dtype),) for picture in pixels.flatten(0, 1)]

    def vision(self, picture: Sequence[Tensor]) -> Entry:
        """See `Graphs.vision`."""
        height, width = picture[0].shape[2:]
        config, patch = self.model.config, self.model.config.vision_config.patch_size
        places = (height // patch) * (width // patch) + 1
        out = Spec("states", (1, places, config.vision_config.embed_dim), self.eager.dtype)
        module = IdeficsImage(self.model.model.vision_model, self.attention, self._interpolate)
        name = f"vision-{height}x{width}{'-interpolated' if self._interpolate else ''}"
        return Entry(name, module, _specs(("pixels",), picture), (out,))

    def connector(self, states: int) -> Entry | None:
        """See `Graphs.connector`: the resampler, (1, P + 1, E) to (1, L, E)."""
        resampler, config, kind = self.model.model.perceiver_resampler, self.model.config, self.eager.dtype
        if resampler is None:
            return None
        width = config.vision_config.embed_dim
        out = Spec("features", (1, config.perceiver_config.resampler_n_latents, width), kind)
        given = Spec("states", (1, states, width), kind)
        return Entry(f"connector-l{states}", IdeficsLatents(resampler, self.attention), (given,), (out,))

    def features(self, made: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, N, L, E)."""
        whole = torch.cat(list(made))
        return whole.view(*inputs["pixel_values"].shape[:2], *whole.shape[1:])

    def by_image(self, features: Tensor, rows: int) -> Tensor:
        """(B, N, L, E)."""
        return features.to(self.eager.dtype)

    def cross(self, features: int) -> Entry:
        """See `Graphs.cross`."""
        return _cross_entry(self, self._crossing(), features, self.model.config.vision_config.embed_dim)

    def seen(self, features: Tensor | None, inputs: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Graphs.seen`.

        Raises:
            ValueError: there are no features, or features and mask do not fit each other.
        """
        if features is None:
            raise ValueError("Idefics needs image features; a text without images has one slot that no token sees")
        images = idefics.images_for(self.model.model, features.to(x), inputs.get("image_attention_mask"), x)
        return images.bias, images.seeing.to(x.dtype)


GRAPHS: Mapping[str, Any] = {"idefics": IdeficsGraphs, "idefics3": Idefics3Graphs, "mllama": MllamaGraphs}
