"""Text entries over a cache in pages, with the attention operators of RBLN's SDK.

The SDK's compiler is known to take this form: optimum-rbln 0.12.0 compiles decoder-only models so, with one page of
`max_seq_len` slots for each row. Prefill runs one row at a time, decode all rows of a bucket; both over the same
buffers, which the operators change in place.

Legend of shapes: B rows of a call, R pages, which are rows of the cache, S tokens of a call, K slots of a page, H key
heads, G queries of a key head, D text width, d head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmqual_impl.cache import CrossCache, KeyValueCache
from vlmqual_impl.entries import Given, TextStep
from vlmqual_impl.layers import Pass, at_least_float32


class Pages(KeyValueCache):
    """A cache whose attention is the device's.

    Args:
        keys: of each layer by its number, (R, H, K, d).
        values: like keys.
        start: (B, 1) int32, slot of the first token.
        table: (B, 1) int16 of decode, (1,) of prefill: the page of each row.
        mask: (B, K), 1 for slots that may be seen, 0 for padding.
        cross: keys and values of images.
    """

    def __init__(
        self,
        keys: dict[int, Tensor],
        values: dict[int, Tensor],
        start: Tensor,
        table: Tensor,
        mask: Tensor,
        cross: CrossCache | None,
    ) -> None:
        self._keys = keys
        self._values = values
        self._start, self._table, self._mask = start, table, mask
        self.cross = cross
        self.length = 0

    def advance(self, tokens: int) -> None:
        """Nothing: the caller counts."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values (B, H, S, d), and attend with queries (B, H * G, S, d); see `Pass.whole`."""
        rows, heads, tokens, width = q.shape
        kept = k.shape[1]
        operators: Any = torch.ops.rbln_custom_ops
        one = tokens == 1
        operator = operators.paged_causal_attn_decode if one else operators.paged_causal_attn_prefill
        mixed: Tensor = operator(
            q=q.reshape(rows, kept, heads // kept, tokens, width),
            k=k.unsqueeze(2),
            v=v.unsqueeze(2),
            kcache=self._keys[layer].unsqueeze(2),
            vcache=self._values[layer].unsqueeze(2),
            seq=self._start,
            scale=torch.tensor(width**-0.5, dtype=at_least_float32(q.dtype)),
            block_table=self._table,
            block_size=self.max_length,
            mask=self._mask,
            **({} if one else {"is_bidirectional": False}),
        )
        return mixed.reshape(rows, heads, tokens, width).transpose(1, 2).reshape(rows, tokens, heads * width)


class PagedStep(TextStep):
    """Some tokens of every row through the decoder, over pages.

    Call: embeddings (B, S, D), cos and sin (B, 1, S, d), mask (B, K), start (B, 1), table (B, 1) or (1,), last (B,);
    the rest as in `TextStep`.

    Result: logits (B, V), states after the final norm (B, S, D).
    """

    def forward(
        self,
        embeddings: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        start: Tensor,
        table: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """See the class."""
        given = Given.of(self.decoder, self.images, rest[1:])
        pages = Pages(given.keys, given.values, start, table, mask, given.cross)
        return self.run(
            embeddings, Pass(cos, sin, None, pages, self.attention, whole=pages.attend), given.seen, rest[0]
        )
