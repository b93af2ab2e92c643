"""What the text models of all families share: Llama's decoder layers, the embedding and the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmqual_perf.costs_request import Passage, number
from vlmqual_perf.costs_tally import Tally


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes of a Llama decoder.

    Attributes:
        width: of hidden states.
        inner: of the gated feed-forward block.
        layers: decoder layers, those with cross-attention instead of self-attention included.
        heads: query heads.
        kv_heads: key and value heads.
        head_width: of each.
        vocabulary: rows of the head.
        attention_bias: of the four projections.
        mlp_bias: of the three.
    """

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def read(cls, text: Mapping[str, object], defaults: Mapping[str, int]) -> LlamaSizes:
        """From a text configuration and the documented defaults of its family.

        Raises:
            UsageError: a size is no positive number.
        """
        sizes = {name: number(text, name, value) for name, value in defaults.items()}
        heads = sizes["num_attention_heads"]
        shared = text.get("num_key_value_heads") or defaults.get("num_key_value_heads", heads)
        width = text.get("head_dim") or sizes["hidden_size"] // heads
        return cls(
            width=sizes["hidden_size"],
            inner=sizes["intermediate_size"],
            layers=sizes["num_hidden_layers"],
            heads=heads,
            kv_heads=number({"num_key_value_heads": shared}, "num_key_value_heads", heads),
            head_width=number({"head_dim": width}, "head_dim", 1),
            vocabulary=sizes["vocab_size"],
            attention_bias=bool(text.get("attention_bias", False)),
            mlp_bias=bool(text.get("mlp_bias", False)),
        )


def self_attention_layers(tally: Tally, sizes: LlamaSizes, passage: Passage, layers: int) -> None:
    """So many decoder layers: grouped-query attention over the cache, gated feed-forward block, two norms."""
    inner, shared = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
    for outputs in (inner, shared, shared):
        tally.linear(
            "attention",
            passage.vectors,
            sizes.width,
            outputs,
            bias=sizes.attention_bias,
            cut="column",
            times=layers,
        )
    tally.attend("attention", passage.pairs, sizes.heads, sizes.head_width, layers)
    tally.cache(passage.vectors, sum(passage.cached), sizes.kv_heads, sizes.head_width, times=layers)
    tally.linear("attention", passage.vectors, inner, sizes.width, bias=sizes.attention_bias, cut="row", times=layers)
    gated_mlp(tally, sizes, passage.vectors, layers)
    tally.hold(layers * 2 * sizes.width)


def gated_mlp(tally: Tally, sizes: LlamaSizes, vectors: int, layers: int) -> None:
    """The feed-forward block of so many layers."""
    for _ in ("gate", "up"):
        tally.linear("mlp", vectors, sizes.width, sizes.inner, bias=sizes.mlp_bias, cut="column", times=layers)
    tally.linear("mlp", vectors, sizes.inner, sizes.width, bias=sizes.mlp_bias, cut="row", times=layers)


def mlp(tally: Tally, component: str, vectors: int, width: int, inner: int, layers: int, *, bias: bool = True) -> None:
    """The two-layer feed-forward block of vision towers."""
    tally.linear(component, vectors, width, inner, bias=bias, cut="column", times=layers)
    tally.linear(component, vectors, inner, width, bias=bias, cut="row", times=layers)


def multi_head(
    tally: Tally, component: str, vectors: int, pairs: int, width: int, heads: int, layers: int, *, bias: bool
) -> None:
    """Self-attention of vision towers: as many key heads as query heads, nothing cached."""
    for _ in "qkv":
        tally.linear(component, vectors, width, width, bias=bias, cut="column", times=layers)
    tally.attend(component, pairs, heads, width // heads, layers)
    tally.linear(component, vectors, width, width, bias=bias, cut="row", times=layers)


def embedding_and_head(tally: Tally, sizes: LlamaSizes, passage: Passage, *, rows: int, tied: bool) -> None:
    """The look-up, the final norm and the head, all whole on every rank.

    Args:
        tally: where it is added.
        sizes: of the model.
        passage: of the text.
        rows: of the embedding.
        tied: embedding and head are one tensor, held once.
    """
    tally.hold(rows * sizes.width, read=min(rows, passage.vectors) * sizes.width)
    tally.hold(sizes.width)
    tally.linear("head", passage.logits, sizes.width, sizes.vocabulary)
    if tied:
        tally.stored -= sizes.vocabulary * sizes.width
