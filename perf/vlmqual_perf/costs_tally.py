"""Counts what one rank does in a phase, module by module.

Conventions, the same everywhere:

- A multiply-add is 2 FLOPs. Matrix products alone are counted, as torch's FlopCounterMode counts them: linear modules,
  the patch embedding (a product over patches), scores and mixing of attention. Norms, activations, softmax, rotary
  positions, interpolation and look-ups are not.
- Causal attention is counted in full, queries times keys, as the products are that an implementation without a fused
  causal kernel computes and that FlopCounterMode sees. A kernel that skips hidden blocks does up to half of that part.
- Weights are bytes that have to be read once, whatever the number of rows: of tables the rows that are looked up, of a
  module that the phase does not run nothing.
- Keys and values are bytes that are written into a cache, and bytes that were in it before and have to be read. What a
  pass computes and uses itself is not read back. Activations are not counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

Cut = Literal["whole", "column", "row"]


class Tally:
    """Sums for one rank of `ranks`; elements, not bytes.

    A column module keeps its share of outputs, a row module its share of inputs and the whole of its bias; the latter's
    products are summed over the ranks. Everything else is whole on every rank.

    Attributes:
        flops: by component: vision, connector, attention, cross_attention, mlp, head.
        weights: elements of parameters that are read.
        stored: elements of parameters that the rank holds, read or not.
        kv_read: elements of self-attention's keys and values that are read from the cache.
        kv_written: elements of them that are written.
        cross_kv_read: the same of images' keys and values.
        cross_kv_written: the same of images' keys and values.
        sums: all-reduces; 0 with one rank.
        summed: elements of one rank's partial sums that they add up.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.flops: Counter[str] = Counter()
        self.weights = self.stored = 0
        self.kv_read = self.kv_written = self.cross_kv_read = self.cross_kv_written = 0
        self.sums = self.summed = 0

    def linear(
        self,
        component: str,
        vectors: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        cut: Cut = "whole",
        times: int = 1,
    ) -> None:
        """`times` linear modules, each over so many vectors; without vectors they are held, but neither run nor read.

        Args:
            component: to which their FLOPs are added.
            vectors: rows of the left matrix.
            inputs: of the whole module.
            outputs: of the whole module.
            bias: it has one.
            cut: how it is cut over the ranks.
            times: how many such modules.
        """
        share = 1 if cut == "whole" else self.ranks
        elements = times * (inputs * outputs // share + bias * (outputs // share if cut == "column" else outputs))
        self.stored += elements
        if not vectors:
            return
        self.weights += elements
        self.flops[component] += times * 2 * vectors * inputs * outputs // share
        if cut == "row" and self.ranks > 1:
            self.sums += times
            self.summed += times * vectors * outputs

    def attend(self, component: str, pairs: int, heads: int, head_width: int, times: int = 1) -> None:
        """Scores and mixing of `pairs` of a query and a key (over all rows) in so many query heads of the model."""
        self.flops[component] += times * 4 * pairs * heads * head_width // self.ranks

    def hold(self, elements: int, read: int | None = None) -> None:
        """Parameters that are whole on every rank and in no matrix product: norms, gates, tables.

        Args:
            elements: that there are.
            read: that are read; all when None.
        """
        self.stored += elements
        self.weights += elements if read is None else read

    def cache(self, written: int, read: int, heads: int, head_width: int, *, times: int, cross: bool = False) -> None:
        """Keys and values of positions (over all rows) that go into the cache, and that are read from it."""
        each = 2 * times * heads * head_width // self.ranks
        if cross:
            self.cross_kv_written += each * written
            self.cross_kv_read += each * read
        else:
            self.kv_written += each * written
            self.kv_read += each * read
