"""What Idefics costs: CLIP-like tower, resampler, Llama with gated cross-attention blocks; in data order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlmqual_perf.costs_llama import LlamaSizes, embedding_and_head, gated_mlp, mlp, multi_head, self_attention_layers
from vlmqual_perf.costs_request import Passage, Request, number, part, patch_size
from vlmqual_perf.costs_tally import Tally

#: Documented defaults of the parts.
VISION = {
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
}
WIDTH = 768
RESAMPLER = {"resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96}
TEXT = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def text_sizes(config: Mapping[str, object]) -> LlamaSizes:
    """Sizes of the text model: one key head for each query head, no biases; the head has both vocabularies."""
    own = {name: config[name] for name in TEXT if name in config}
    sizes = LlamaSizes.read(own, TEXT)
    return LlamaSizes(**{**vars(sizes), "vocabulary": sizes.vocabulary + _additional(config)})


def vision(config: Mapping[str, object], request: Request, tally: Tally) -> None:
    """Pictures to features of the tower, through the resampler where the model has one."""
    tower = part(config, "vision_config")
    inner, layers, heads, channels, side = (number(tower, name, value) for name, value in VISION.items())
    width, patch = _tower_width(tower), patch_size(config)
    table = (side // patch) ** 2 + 1
    pictures, patches = request.total_pictures, request.patches or table - 1
    positions = patches + 1
    vectors = pictures * positions
    tally.linear("vision", pictures * patches, channels * patch**2, width)
    tally.hold(width + table * width + 2 * width)  # class embedding, positions, norm before the blocks
    multi_head(tally, "vision", vectors, pictures * positions**2, width, heads, layers, bias=True)
    mlp(tally, "vision", vectors, width, inner, layers)
    tally.hold(layers * 4 * width)
    tally.hold(2 * width, read=0)  # the norm behind the blocks is for a pooled vector that nothing uses
    if config.get("use_resampler"):
        _resampler(tally, part(config, "perceiver_config"), pictures, positions, width)


def _resampler(tally: Tally, config: Mapping[str, object], pictures: int, positions: int, width: int) -> None:
    latents, depth, heads, head_width = (number(config, name, value) for name, value in RESAMPLER.items())
    inner, queries, keys = heads * head_width, pictures * latents, pictures * (positions + latents)
    tally.linear("connector", queries, width, inner, cut="column", times=depth)
    for _ in "kv":
        tally.linear("connector", keys, width, inner, cut="column", times=depth)
    tally.attend("connector", queries * (positions + latents), heads, head_width, depth)
    tally.linear("connector", queries, inner, width, cut="row", times=depth)
    mlp(tally, "connector", queries, width, 4 * width, depth, bias=False)
    normed = 4 * head_width if config.get("qk_layer_norms_perceiver") else 0
    tally.hold(depth * (6 * width + normed))  # of context, latents and feed-forward block, and of heads
    tally.hold(latents * width + 2 * width)


def text(config: Mapping[str, object], passage: Passage, tally: Tally) -> None:
    """Positions to logits; before every `cross_layer_interval`-th decoder layer stands a cross-attention block."""
    sizes = text_sizes(config)
    self_attention_layers(tally, sizes, passage, sizes.layers)
    _cross_blocks(tally, config, sizes, passage, sizes.layers // number(config, "cross_layer_interval", 1))
    tied = bool(config.get("tie_word_embeddings"))
    embedding_and_head(tally, sizes, passage, rows=sizes.vocabulary, tied=tied)


def _cross_blocks(tally: Tally, config: Mapping[str, object], sizes: LlamaSizes, passage: Passage, blocks: int) -> None:
    """Gated blocks, as wide as the text and with its heads; they run for text that sees no image too."""
    images, source = sum(passage.images), _tower_width(part(config, "vision_config"))
    tally.linear("cross_attention", passage.vectors, sizes.width, sizes.width, cut="column", times=blocks)
    for _ in "kv":
        made = images if passage.fresh else 0
        tally.linear("cross_attention", made, source, sizes.width, cut="column", times=blocks)
    tally.attend("cross_attention", passage.cross_pairs, sizes.heads, sizes.head_width, blocks)
    written, read = (images, 0) if passage.fresh else (0, images)
    tally.cache(written, read, sizes.heads, sizes.head_width, times=blocks, cross=True)
    tally.linear("cross_attention", passage.vectors, sizes.width, sizes.width, cut="row", times=blocks)
    gated_mlp(tally, sizes, passage.vectors, blocks)
    gates = 2 * (sizes.width if config.get("alpha_type") == "vector" else 1)
    norm = blocks * (sizes.head_width if config.get("qk_layer_norms") else 0)  # of query heads, and of key heads
    tally.hold(blocks * (2 * sizes.width + gates) + norm)
    tally.hold(norm, read=norm if images and passage.fresh else 0)


def image_positions(config: Mapping[str, object], request: Request) -> tuple[int, ...]:
    """Of every row, that cross-attention reads: the features of all its image slots."""
    if not request.pictures:
        return (0,) * request.rows
    if config.get("use_resampler"):
        name = "resampler_n_latents"
        features = number(part(config, "perceiver_config"), name, RESAMPLER[name])
    else:
        side = number(part(config, "vision_config"), "image_size", VISION["image_size"])
        features = (request.patches or (side // patch_size(config)) ** 2) + 1
    return tuple(sum(row) * features for row in request.pictures)


def picture_tokens(config: Mapping[str, object]) -> int:
    """Positions of the prompt that a picture takes besides its marker: none."""
    return 0


def divisible(config: Mapping[str, object]) -> Iterator[tuple[str, str, int]]:
    """Counts that tensor parallelism has to divide."""
    sizes, tower = text_sizes(config), part(config, "vision_config")
    yield "config", "attention heads", sizes.heads
    yield "config", "feed-forward columns", sizes.inner
    for what, name in (("attention heads", "num_attention_heads"), ("feed-forward columns", "intermediate_size")):
        yield "vision_config", what, number(tower, name, VISION[name])
    if config.get("use_resampler"):
        name = "resampler_n_heads"
        yield "perceiver_config", "attention heads", number(part(config, "perceiver_config"), name, RESAMPLER[name])
        yield "vision_config", "resampler columns", 4 * _tower_width(tower)


def _tower_width(tower: Mapping[str, object]) -> int:
    """`embed_dim`, or its documented synonym."""
    return number(tower, "hidden_size" if "hidden_size" in tower else "embed_dim", WIDTH)


def _additional(config: Mapping[str, object]) -> int:
    """Ids of the additional vocabulary; may be 0."""
    return number(config, "additional_vocab_size", 1) if config.get("additional_vocab_size") else 0
