"""A model as compiled functions of fixed shapes: what the caller of such functions does with sequences of any shape.

Rows are padded to a bucket, prompts run in chunks of a fixed size whose last is padded, and image slots are padded to a
bucket. Padded tokens write keys and values behind the real ones, where nothing reads them before the next tokens have
overwritten them.

Legend of shapes: B rows of the caller, R rows of the bucket, S tokens, C tokens of a chunk, K cache slots, KI image
features of a row, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmqual_impl.cache import Slots
from vlmqual_impl.entries import Entry
from vlmqual_impl.graphs import Graphs
from vlmqual_impl.layers import hidden_bias
from vlmqual_impl.runtime.base import Sequences, default_positions, last_real
from vlmqual_impl.runtime.engines import Engine, Program, States


@dataclass(frozen=True)
class Waste:
    """What padding to fixed shapes cost in one call.

    Attributes:
        bucket: rows, tokens of a chunk, number of chunks, image features of a row: "b1 c128 x 2 i34"; of vision the
            number of pictures.
        tokens: tokens that were asked for, all rows together; of vision pictures.
        computed: tokens, or pictures, that were computed.
        programs: names of the entries that were run.
    """

    bucket: str
    tokens: int
    computed: int
    programs: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Part of the computed tokens that nobody asked for."""
        return 1 - self.tokens / self.computed


class GraphCache(Slots):
    """States of an engine, and what tokens need of a prompt's images."""

    def __init__(self, full: int, rows: int, slots: int, states: States, images: tuple[Tensor, ...]) -> None:
        self.full = full
        self.states = states
        self.images = images
        self.length = 0
        self._rows = rows
        self._slots = slots

    @property
    def max_length(self) -> int:
        """Slots that there are for real tokens."""
        return self._slots

    @property
    def batch(self) -> int:
        """Rows of the caller."""
        return self._rows


@dataclass(frozen=True)
class Shapes:
    """The fixed shapes.

    Attributes:
        chunk: C, tokens of a prompt's chunk.
        max_length: cache slots of a sequence.
        rows: buckets of rows, ascending.
        images: buckets of image slots, ascending; more images get a function of their own.
    """

    chunk: int = 128
    max_length: int = 2048
    rows: tuple[int, ...] = (1,)
    images: tuple[int, ...] = (1, 2, 4)

    @property
    def slots(self) -> int:
        """K: whole chunks, so that the padding of the last one has a place."""
        return -(-self.max_length // self.chunk) * self.chunk


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The smallest size that is enough; `count` itself where none is."""
    return min((size for size in sizes if size >= count), default=count)


def text_entries(graphs: Graphs, shapes: Shapes, full: int, images: int) -> list[Entry]:
    """The entry of a prompt's chunk, then those of decode steps over the same states.

    Args:
        graphs: of the model.
        shapes: the fixed ones.
        full: rows of the bucket.
        images: image features of a row.
    """
    pages = max(full, shapes.rows[-1])
    together, sizes = (1, sorted({full, *shapes.rows})) if graphs.paged else (full, [full])
    calls = [(together, shapes.chunk), *((size, 1) for size in sizes)]
    return [graphs.text(rows, tokens, shapes.slots, images, pages) for rows, tokens in calls]


class GraphRuntime:
    """A loaded model whose functions run in an engine. Hidden states by component are not to be had.

    Attributes:
        waste: of the latest call of each kind: "vision", "prefill", "decode".
        ready_s: seconds until a program could run, making it included, by the entry's name.
    """

    def __init__(self, graphs: Graphs, engine: Engine, shapes: Shapes) -> None:
        self.graphs = graphs
        self.engine = engine
        self.shapes = shapes
        self.waste: dict[str, Waste] = {}
        self.ready_s: dict[str, float] = {}
        self._programs: dict[str, Program] = {}
        self._used: dict[str, None] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.graphs.eager.dtype

    @property
    def device(self) -> torch.device:
        """Where tensors are wanted: on the host."""
        return torch.device("cpu")

    @property
    def merges(self) -> bool:
        """See `Runtime.merges`."""
        return self.graphs.eager.merges

    @property
    def vocabulary(self) -> int:
        """Ids that can be chosen."""
        return self.graphs.eager.vocabulary

    def synchronize(self) -> None:
        """Nothing: every call waits for its result."""

    def _program(self, entry: Entry, mates: Sequence[Entry] = ()) -> Program:
        if entry.name not in self._programs:
            start = time.perf_counter()
            self._programs[entry.name] = self.engine.program(entry, mates)
            self.ready_s[entry.name] = time.perf_counter() - start
        self._used[entry.name] = None
        return self._programs[entry.name]

    def _note(self, kind: str, bucket: str, tokens: int, computed: int) -> None:
        self.waste[kind] = Waste(bucket, tokens, computed, tuple(self._used))

    # images ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Image features, frame by frame or image by image."""
        made = []
        self._used = {}
        for picture in self.graphs.pictures(inputs):
            (states,), _ = self._program(self.graphs.vision(picture))(picture)
            after = self.graphs.connector(states.shape[1])
            made.append(states if after is None else self._program(after)((states,))[0][0])
        self._note("vision", f"1 x {len(made)}", len(made), len(made))
        return self.graphs.features(made, inputs)

    def _image_tensors(self, features: Tensor | None, rows: int, bucket_rows: int) -> tuple[list[Tensor], int]:
        """Keys and values of the images of every crossing layer, padded to buckets; and KI."""
        by_image = None if features is None else self.graphs.by_image(features, rows)
        if by_image is None:
            return [], 0
        entry = self.graphs.cross(by_image.shape[2])
        if entry is None:
            return [], 0
        slots, wanted = by_image.shape[1], bucket(by_image.shape[1], self.shapes.images)
        run, per_row = self._program(entry), []
        for row in by_image:
            images = [run((image[None].contiguous(),))[0] for image in row]
            whole = [torch.cat(parts, dim=2) for parts in zip(*images, strict=True)]
            per_row.append([F.pad(t, (0, 0, 0, (wanted - slots) * by_image.shape[2])) for t in whole])
        per_row += [per_row[0]] * (bucket_rows - rows)
        return [torch.cat(parts) for parts in zip(*per_row, strict=True)], wanted * by_image.shape[2]

    # text ------------------------------------------------------------------------------------------------------------

    def embed(self, inputs: Mapping[str, Tensor], features: Tensor | None) -> Tensor:
        """Token embeddings (B, S, D), with image features in their places where the family merges them."""
        return self.graphs.eager.embed(inputs, features)

    @torch.no_grad()
    def prefill(
        self,
        inputs: Mapping[str, Tensor],
        features: Tensor | None = None,
        *,
        max_length: int,
        taps: bool = False,
    ) -> Sequences:
        """Start sequences; see `EagerRuntime.prefill`.

        Raises:
            ValueError: shapes do not fit each other or the fixed ones.
        """
        if max_length > self.shapes.max_length:
            raise ValueError(f"max_length {max_length} is more than the {self.shapes.max_length} fixed positions")
        if features is None and "pixel_values" in inputs:
            features = self.encode(inputs)
        self._used = {}
        x = self.embed(inputs, features)
        rows, tokens = x.shape[:2]
        mask = inputs.get("attention_mask", torch.ones((rows, tokens), dtype=torch.int64))
        given = inputs.get("position_ids")
        for name, tensor in (("attention_mask", mask), ("position_ids", given)):
            if tensor is not None and tuple(tensor.shape) != (rows, tokens):
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)}; it has to be (batch, tokens), here {(rows, tokens)}"
                )
        positions, last = default_positions(mask) if given is None else given, last_real(mask)
        full = bucket(rows, self.shapes.rows)
        keys, width = self._image_tensors(features, rows, full)
        seen = self.graphs.seen(features, inputs, x)
        images: tuple[Tensor, ...] = ()
        if seen is not None:
            hidden = torch.finfo(x.dtype).min
            images = F.pad(seen[0].expand(rows, 1, tokens, -1), (0, width - seen[0].shape[-1]), value=hidden), seen[1]
        slots, chunk = self.shapes.slots, self.shapes.chunk
        # Over pages, which any row can name, prompts run one after the other.
        groups = [slice(row, row + 1) for row in range(rows)] if self.graphs.paged else [slice(0, rows)]
        together = 1 if self.graphs.paged else full
        entry, *mates = text_entries(self.graphs, self.shapes, full, width)
        self._program(entry, mates)
        cache = GraphCache(full, rows, max_length, self.engine.new_states(entry), tuple(keys))
        cache.require(tokens)
        valid = torch.zeros((rows, slots), dtype=torch.bool)
        valid[:, :tokens] = mask != 0
        valid[:, tokens:] = True
        logits = torch.empty((rows, self.vocabulary), dtype=self.dtype)
        kept = []
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            at = (last - start).clamp(0, chunk - 1)
            bits = tuple(_tokens(image, part) for image in images)
            made = [
                self._step(
                    cache, entry, each, x[each, part], positions[each, part], valid, at[each], _rows_of(bits, each)
                )
                for each in groups
            ]
            ends, states = (torch.cat(parts)[:rows] for parts in zip(*made, strict=True))
            here = (last >= start) & (last < start + chunk)
            logits[here] = ends[here]
            kept.append(states[:, : part.stop - part.start])
            cache.length = part.stop
        chunks = len(kept)
        calls = len(groups) * chunks
        size = f"b{together} c{chunk} x {calls}{_images(width)}"
        self._note("prefill", size, int((mask != 0).sum()), together * chunk * calls)
        each = torch.arange(rows)
        later = dict(zip(("bias", "rows"), (_tokens(image, slice(-1, None)) for image in images), strict=False))
        return Sequences(
            hidden=torch.cat(kept, dim=1),
            logits=logits,
            positions=positions[each, last] + 1,
            valid=valid,
            cache=cache,
            taps={},
            later=later,
        )

    @torch.no_grad()
    def decode(self, sequences: Sequences, tokens: Tensor, *, taps: bool = False) -> Sequences:
        """One token (B,) further for every row.

        Raises:
            ValueError: the number of tokens is not the number of rows, the cache is full, or the step was continued.
        """
        cache = sequences.cache
        if not isinstance(cache, GraphCache) or sequences.valid is None:
            raise TypeError(f"these sequences belong to another runtime; their cache is a {type(cache).__name__}")
        rows = cache.batch
        if tuple(tokens.shape) != (rows,):
            raise ValueError(f"tokens are {tuple(tokens.shape)}; one for each of the {rows} rows is needed")
        sequences.take()
        cache.require(1)
        self._used = {}
        full, width = cache.full, 0
        if sequences.later:
            width = sequences.later["bias"].shape[-1]
        entry = self.graphs.text(full, 1, self.shapes.slots, width, self.shapes.rows[-1])
        x = self.graphs.eager.table(tokens[:, None])
        at = torch.zeros(rows, dtype=torch.int64)
        bits = tuple(sequences.later.values())
        each, positions = slice(0, rows), sequences.positions[:, None]
        outputs = self._step(cache, entry, each, x, positions, sequences.valid, at, bits)
        cache.length += 1
        self._note("decode", f"b{full}{_images(width)}", rows, full)
        return Sequences(
            hidden=outputs[1][:rows],
            logits=outputs[0][:rows],
            positions=sequences.positions + 1,
            valid=sequences.valid,
            cache=cache,
            taps={},
            later=sequences.later,
        )

    def _step(
        self,
        cache: GraphCache,
        entry: Entry,
        which: slice,
        x: Tensor,
        positions: Tensor,
        valid: Tensor,
        last: Tensor,
        images: tuple[Tensor, ...],
    ) -> list[Tensor]:
        """Run a text entry: tensors of some of the caller's rows and of some tokens, padded to its shapes.

        Args:
            cache: states, whose next slots are written.
            entry: the function.
            which: the rows, of all of which `valid` and the cache are.
            x: (rows, tokens, D).
            positions: (rows, tokens).
            valid: (B, K) bool.
            last: (rows,), the token whose logits are wanted.
            images: what the tokens see of images.
        """
        full, chunk = entry.inputs[0].shape[:2]
        padding = chunk - x.shape[1]
        cos, sin = self.graphs.rotary(F.pad(positions, (0, padding)), x.dtype)
        wide = [_rows(tensor, full) for tensor in (F.pad(x, (0, 0, 0, padding)), cos, sin)]
        wide += [_rows(tensor, full) for tensor in self._seen(cache.length, chunk, valid[which], x)]
        if self.graphs.paged:
            pages = torch.arange(which.start, which.start + full, dtype=torch.int16)
            wide += [torch.full((full, 1), cache.length, dtype=torch.int32), pages[:, None] if chunk == 1 else pages]
        else:
            wide.append(torch.arange(cache.length, cache.length + chunk))
        wide.append(_rows(last, full))
        wide += [_rows(F.pad(image, (0, 0, 0, padding)), full) for image in images]
        wide += [image if len(image) == full else image[which] for image in cache.images]
        outputs, cache.states = self._program(entry)([tensor.contiguous() for tensor in wide], cache.states)
        return outputs

    def _seen(self, start: int, chunk: int, valid: Tensor, x: Tensor) -> list[Tensor]:
        """What tokens see of the cache: valid slots (B, K) over pages, else what is added to scores (B, 1, S, K)."""
        if self.graphs.paged:
            return [valid.to(x.dtype)]
        slots = torch.arange(start, start + chunk)
        own = torch.arange(self.shapes.slots)[None, :] <= slots[:, None]
        return [hidden_bias(own & valid[:, None], x)[:, None]]

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, S, V) of hidden states (B, S, D)."""
        rows, tokens = hidden.shape[:2]
        full, chunk = bucket(rows, self.shapes.rows), self.shapes.chunk if tokens > 1 else 1
        run = self._program(self.graphs.head(full, chunk))
        parts = []
        for start in range(0, tokens, chunk):
            piece = hidden[:, start : start + chunk]
            whole = _rows(F.pad(piece, (0, 0, 0, chunk - piece.shape[1])), full)
            parts.append(run((whole,))[0][0][:rows, : piece.shape[1]])
        return torch.cat(parts, dim=1)


def _images(features: int) -> str:
    return f" i{features}" if features else ""


def _tokens(image: Tensor, part: slice) -> Tensor:
    """Some tokens of what they see of images, (B, 1, S, KI) or (B, S, 1)."""
    return image[:, :, part] if image.ndim == 4 else image[:, part]


def _rows_of(tensors: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
    return tuple(tensor[rows] for tensor in tensors)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """More rows, copies of the first."""
    if len(tensor) == rows:
        return tensor.contiguous()
    return torch.cat((tensor, tensor[:1].expand(rows - len(tensor), *tensor.shape[1:])))
