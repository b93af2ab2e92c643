"""What Idefics3 costs: SigLIP tower over frames, pixel-shuffle connector, Llama text model; in data order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlmqual_perf.costs_llama import LlamaSizes, embedding_and_head, mlp, multi_head, self_attention_layers
from vlmqual_perf.costs_request import Passage, Request, number, part, patch_size
from vlmqual_perf.costs_tally import Tally

#: Documented defaults of the parts.
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
}
TEXT = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def text_sizes(config: Mapping[str, object]) -> LlamaSizes:
    """Sizes of the text model; the default of its key heads is one for each query head."""
    return LlamaSizes.read(part(config, "text_config"), TEXT)


def vision(config: Mapping[str, object], request: Request, tally: Tally) -> None:
    """Frames to image features in the text width; every patch attends to every patch of its frame."""
    tower = part(config, "vision_config")
    width, inner, layers, heads, channels, side = (number(tower, name, value) for name, value in VISION.items())
    patch = patch_size(config)
    table = (side // patch) ** 2
    frames, patches = request.total_pictures, request.patches or table
    vectors = frames * patches
    tally.linear("vision", vectors, channels * patch**2, width, bias=True)
    tally.hold(table * width, read=min(table, vectors) * width)
    multi_head(tally, "vision", vectors, frames * patches**2, width, heads, layers, bias=True)
    mlp(tally, "vision", vectors, width, inner, layers)
    tally.hold(layers * 4 * width + 2 * width)
    fold = number(config, "scale_factor", 2) ** 2
    tally.linear("connector", vectors // fold, width * fold, text_sizes(config).width)


def text(config: Mapping[str, object], passage: Passage, tally: Tally) -> None:
    """Positions, image tokens among them, to logits."""
    sizes = text_sizes(config)
    self_attention_layers(tally, sizes, passage, sizes.layers)
    embedding_and_head(tally, sizes, passage, rows=sizes.vocabulary, tied=bool(config.get("tie_word_embeddings")))


def image_positions(config: Mapping[str, object], request: Request) -> tuple[int, ...]:
    """Of every row, for cross-attention: none, since image features take the places of tokens."""
    return (0,) * request.rows


def picture_tokens(config: Mapping[str, object]) -> int:
    """Positions of the prompt that a frame of the configured size takes."""
    side = number(part(config, "vision_config"), "image_size", VISION["image_size"])
    return int((side // patch_size(config)) ** 2 // number(config, "scale_factor", 2) ** 2)


def divisible(config: Mapping[str, object]) -> Iterator[tuple[str, str, int]]:
    """Counts that tensor parallelism has to divide."""
    sizes, tower = text_sizes(config), part(config, "vision_config")
    yield "text_config", "attention heads", sizes.heads
    yield "text_config", "key/value heads", sizes.kv_heads
    yield "text_config", "feed-forward columns", sizes.inner
    for what, name in (("attention heads", "num_attention_heads"), ("feed-forward columns", "intermediate_size")):
        yield "vision_config", what, number(tower, name, VISION[name])
