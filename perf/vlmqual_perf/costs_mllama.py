"""What Mllama costs: tiles through a local and a global encoder, projector, Llama with cross-attention layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlmqual_contract.errors import UsageError
from vlmqual_perf.costs_llama import LlamaSizes, embedding_and_head, gated_mlp, mlp, multi_head, self_attention_layers
from vlmqual_perf.costs_request import Passage, Request, number, part, patch_size
from vlmqual_perf.costs_tally import Tally

#: Documented defaults of the parts.
VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_channels": 3,
    "image_size": 448,
    "max_num_tiles": 4,
    "vision_output_dim": 7680,
}
TEXT = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
CROSSING = (3, 8, 13, 18, 23, 28, 33, 38)
EXTRA_EMBEDDINGS = 8  # rows of the embedding above the vocabulary
_MULTIPLE = 8  # a tile's positions are padded to a multiple of this inside the encoders


def text_sizes(config: Mapping[str, object]) -> LlamaSizes:
    """Sizes of the text model."""
    return LlamaSizes.read(part(config, "text_config"), TEXT)


def crossing_layers(config: Mapping[str, object]) -> int:
    """How many layers of the text model read images.

    Raises:
        UsageError: `cross_attention_layers` is no list of layers of this model.
    """
    text = part(config, "text_config")
    found, layers = text.get("cross_attention_layers", CROSSING), text_sizes(config).layers
    if not isinstance(found, list | tuple) or any(not isinstance(index, int) or index < 0 for index in found):
        raise UsageError(f"config.json: cross_attention_layers is {found!r}; it has to be a list of layer numbers")
    return len({index for index in found if index < layers})


def vision(config: Mapping[str, object], request: Request, tally: Tally) -> None:
    """Tiles to cross-attention states; in both encoders a position attends to all positions of its image's tiles."""
    tower = part(config, "vision_config")
    sizes = {name: number(tower, name, value) for name, value in VISION.items()}
    width, tiles_most = sizes["hidden_size"], sizes["max_num_tiles"]
    patch, heads = patch_size(config), _heads(tower)
    patches = request.patches or (sizes["image_size"] // patch) ** 2
    positions = patches + 1
    padded = -(-positions // _MULTIPLE) * _MULTIPLE
    images = [tiles for row in request.pictures for tiles in row if tiles]
    tiles = sum(images)

    tally.linear("vision", tiles * patches, sizes["num_channels"] * patch**2, width)
    ratios = tower.get("supported_aspect_ratios")
    ids = 1 + (len(ratios) if isinstance(ratios, list) else _ratios(tiles_most))
    seen = min(len(images), ids)
    by_tile, by_position = tiles_most * width, tiles_most * positions * width
    tally.hold(width + positions * width + 1)  # class embedding, positions and their gate
    tally.hold(ids * by_position, read=seen * by_position)
    tally.hold(2 * (ids * by_tile + 1), read=2 * (seen * by_tile + 1))  # before and after the local encoder
    tally.hold(4 * width)  # the norms around it

    pairs = sum((count * padded) ** 2 for count in images)
    local, whole = sizes["num_hidden_layers"], _global_layers(tower)
    multi_head(tally, "vision", tiles * padded, pairs, width, heads, local + whole, bias=False)
    mlp(tally, "vision", tiles * padded, width, sizes["intermediate_size"], local + whole)
    tally.hold((local + whole) * 4 * width + whole * 2)  # norms, and the gates of the global encoder
    tally.linear("connector", tiles * positions, sizes["vision_output_dim"], text_sizes(config).width, bias=True)


def text(config: Mapping[str, object], passage: Passage, tally: Tally) -> None:
    """Positions to logits; without images the cross-attention layers are skipped."""
    sizes, crossing = text_sizes(config), crossing_layers(config)
    self_attention_layers(tally, sizes, passage, sizes.layers - crossing)
    _cross_layers(tally, sizes, passage, crossing)
    embedding_and_head(tally, sizes, passage, rows=sizes.vocabulary + EXTRA_EMBEDDINGS, tied=False)


def _cross_layers(tally: Tally, sizes: LlamaSizes, passage: Passage, layers: int) -> None:
    images = sum(passage.images)
    vectors = passage.vectors if images else 0
    inner, shared = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
    tally.linear("cross_attention", vectors, sizes.width, inner, cut="column", times=layers)
    for _ in "kv":
        made = images if passage.fresh else 0
        tally.linear("cross_attention", made, sizes.width, shared, cut="column", times=layers)
    tally.attend("cross_attention", passage.cross_pairs, sizes.heads, sizes.head_width, layers)
    written, read = (images, 0) if passage.fresh else (0, images)
    tally.cache(written, read, sizes.kv_heads, sizes.head_width, times=layers, cross=True)
    tally.linear("cross_attention", vectors, inner, sizes.width, cut="row", times=layers)
    gated_mlp(tally, sizes, vectors, layers)
    small = layers * (2 * sizes.width + sizes.head_width + 2)  # norms, norm of query heads, gates
    tally.hold(small, read=small if images else 0)
    norm = layers * sizes.head_width  # of key heads
    tally.hold(norm, read=norm if images and passage.fresh else 0)


def image_positions(config: Mapping[str, object], request: Request) -> tuple[int, ...]:
    """Of every row, that cross-attention reads: all positions of all its tiles."""
    if not request.pictures:
        return (0,) * request.rows
    side = number(part(config, "vision_config"), "image_size", VISION["image_size"])
    positions = (request.patches or (side // patch_size(config)) ** 2) + 1
    return tuple(sum(row) * positions for row in request.pictures)


def picture_tokens(config: Mapping[str, object]) -> int:
    """Positions of the prompt that a tile takes: none; an image has one token, whatever its tiles."""
    return 0


def divisible(config: Mapping[str, object]) -> Iterator[tuple[str, str, int]]:
    """Counts that tensor parallelism has to divide."""
    sizes, tower = text_sizes(config), part(config, "vision_config")
    yield "text_config", "attention heads", sizes.heads
    yield "text_config", "key/value heads", sizes.kv_heads
    yield "text_config", "feed-forward columns", sizes.inner
    yield "vision_config", "attention heads", _heads(tower)
    yield (
        "vision_config",
        "feed-forward columns",
        number(tower, "intermediate_size", VISION["intermediate_size"]),
    )


def _heads(tower: Mapping[str, object]) -> int:
    """The stored name is `attention_heads`, in every version."""
    return number(tower, "attention_heads", number(tower, "num_attention_heads", 16))


def _global_layers(tower: Mapping[str, object]) -> int:
    """May be 0."""
    return 0 if tower.get("num_global_layers") == 0 else number(tower, "num_global_layers", 8)


def _ratios(tiles: int) -> int:
    """How many ways there are to lay out at most so many tiles."""
    return sum(tiles // high for high in range(1, tiles + 1))
