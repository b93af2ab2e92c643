"""The operators `torch.ops.rbln_custom_ops.*` that decoder-only models are compiled to.

Importing this module registers them. Shapes, with B rows, H key-value heads, G query heads for each, L new positions,
D the head size, n blocks in a row's table, `block_size` positions in a block:

    q                [B, H, G, L, D]
    k, v             [B, H, 1, L, D]
    kcache, vcache   [blocks, H, 1, block_size, D]: changed in place
    seq              [B, 1] integers: position of the first new one, which is the number of positions before it
    scale            [] factor of the scores
    block_table      [n] (prefill) or [B, n] (decode) integers: the blocks of each row in order
    mask             0 or 1, 1 attends: [B, n * block_size] for the causal operators,
                     [B, 1, 1, L, n * block_size] for `paged_attn_*` and `paged_flash_attn_*`
    s_aux            [H * G, sinks] scores that take part in the softmax and carry no value
    result           as q

First k and v are written at positions seq ... seq + L - 1 through the table, then query i attends to positions
0 ... seq + i; with `is_bidirectional` to 0 ... seq + L - 1. The masked operators attend to those of 0 ... seq + L - 1
that their mask names.
`partition` tells the NPU how to cut a long row; it does not change the result. Sources: the calls of optimum-rbln
0.12.0 and its placeholders up to 0.11; vllm-rbln's Triton kernels state the same order.

`rbln_cache_update(cache, state, position, axis)` writes `state` into `cache`, along `axis` from `position` on (both 0-d
or one-element integers), and gives the cache as it is then.

The schemas declare no mutation, as the vendor's do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import RBLNRuntimeError

NAMESPACE = "rbln_custom_ops"


def _write(cache: Tensor, new: Tensor, blocks: list[int], start: int, block: int) -> None:
    """Put new [H, L, D] at positions start ... of the row whose blocks these are."""
    done, length = 0, new.shape[1]
    while done < length:
        position = start + done
        count = min(block - position % block, length - done)
        into = cache[blocks[position // block], :, 0, position % block : position % block + count]
        into.copy_(new[:, done : done + count])
        done += count


def _read(cache: Tensor, blocks: list[int], length: int, block: int) -> Tensor:
    """Positions 0 ... length - 1 of a row: [H, length, D]."""
    used = -(-length // block)
    parts = [cache[blocks[one], :, 0, : min(block, length - one * block)] for one in range(used)]
    return parts[0] if used == 1 else torch.cat(parts, dim=1)


def _row_blocks(table: Tensor, start: int, length: int, block: int, cache: Tensor) -> list[int]:
    blocks = [int(one) for one in table]
    if cache.shape[3] != block:
        raise RBLNRuntimeError(f"block_size: {block}, but a block of the cache holds {cache.shape[3]} positions.")
    if start < 0 or start + length > len(blocks) * block:
        raise RBLNRuntimeError(
            f"seq: positions {start} to {start + length - 1} do not fit a row of {len(blocks)} blocks of {block}."
        )
    wrong = [one for one in blocks[: -(-(start + length) // block)] if not 0 <= one < cache.shape[0]]
    if wrong:
        raise RBLNRuntimeError(f"block_table: there is no block {wrong[0]}; the cache has {cache.shape[0]} blocks.")
    return blocks


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of scores [H, G, L, N]; sinks [H * G, s] take their share and are dropped."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    heads, groups, length, count = scores.shape
    shares = sinks.to(scores.dtype).reshape(heads, groups, 1, -1).expand(-1, -1, length, -1)
    return torch.softmax(torch.cat((scores, shares), dim=-1), dim=-1)[..., :count]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    seq: Tensor,
    scale: Tensor,
    block_table: Tensor,
    block_size: int,
    causal: bool,
    mask: Tensor | None,
    s_aux: Tensor | None,
) -> Tensor:
    rows, heads, groups, length, size = q.shape
    tables = block_table.reshape(rows, -1)
    compute = torch.promote_types(q.dtype, torch.float32)
    result = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row, start in enumerate(seq.reshape(rows, -1)[:, 0].tolist()):
        blocks = _row_blocks(tables[row], start, length, block_size, kcache)
        _write(kcache, k[row, :, 0], blocks, start, block_size)
        _write(vcache, v[row, :, 0], blocks, start, block_size)
        count = start + length
        keys, values = (_read(cache, blocks, count, block_size).to(compute) for cache in (kcache, vcache))
        queries = q[row].to(compute).reshape(heads, groups * length, size)
        scores = torch.matmul(queries, keys.transpose(1, 2)).reshape(heads, groups, length, count) * scale.to(compute)
        attends = torch.ones(length, count, dtype=torch.bool)
        if causal:
            attends = attends.tril(start)
        if mask is not None:
            attends = attends & (mask[row][..., :count].reshape(-1, count) != 0)
        # Not -inf: a padded query attends to nothing, and must still give a number.
        scores = scores.masked_fill(~attends, torch.finfo(compute).min)
        shares = _softmax(scores, s_aux).reshape(heads, groups * length, count)
        result[row] = torch.matmul(shares, values).reshape(heads, groups, length, size).to(q.dtype)
    return result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Not torch.nn.functional.linear: while a model is compiled, that name is this very operator.
    result: Tensor = torch.ops.aten.linear(input, weight, bias)
    return result


def _update(cache: Tensor, state: Tensor, position: Tensor, axis: Tensor) -> Tensor:
    along, start = int(axis), int(position)
    if not 0 <= along < cache.dim() or state.dim() != cache.dim():
        raise RBLNRuntimeError(f"axis: {along} of a cache {list(cache.shape)} and a state {list(state.shape)}.")
    count = state.shape[along]
    if start < 0 or start + count > cache.shape[along]:
        raise RBLNRuntimeError(
            f"position: {start} to {start + count - 1} do not fit axis {along} of a cache {list(cache.shape)}."
        )
    into = cache.narrow(along, start, count)
    if into.shape != state.shape:
        raise RBLNRuntimeError(f"state: {list(state.shape)}; axis {along} of the cache takes {list(into.shape)}.")
    into.copy_(state)
    return cache


_QUERY = "Tensor q, Tensor k, Tensor v"
_CACHE = "Tensor kcache, Tensor vcache, Tensor seq, Tensor scale, Tensor block_table, int block_size"
_OPTIONAL = "Tensor? mask=None, Tensor? s_aux=None"


def _paged(flash: bool, causal: bool, prefill: bool) -> tuple[str, str]:
    """Name and arguments of one attention operator."""
    name = f"paged_{'flash_' if flash else ''}{'causal_' if causal else ''}attn_{'prefill' if prefill else 'decode'}"
    arguments = [_QUERY, *([] if causal else ["Tensor mask"]), _CACHE, *(["int partition"] if flash else [])]
    if causal:
        arguments += [*(["bool is_bidirectional"] if prefill else []), _OPTIONAL]
    return name, ", ".join(arguments)


def _attention(arguments: str, causal: bool) -> Callable[..., Tensor]:
    names = [one.split()[1].partition("=")[0] for one in arguments.split(", ")]

    def kernel(*values: Any, **named: Any) -> Tensor:
        call = dict(zip(names, values, strict=False)) | named
        call.pop("partition", None)
        both_ways = call.pop("is_bidirectional", False)
        return _attend(**{"mask": None, "s_aux": None} | call, causal=causal and not both_ways)

    return kernel


def _operators() -> Iterator[tuple[str, str, Callable[..., Tensor]]]:
    yield "linear", "Tensor input, Tensor weight, Tensor? bias=None", _linear
    yield "rbln_cache_update", "Tensor cache, Tensor state, Tensor position, Tensor axis", _update
    for flash, causal, prefill in itertools.product((False, True), repeat=3):
        name, arguments = _paged(flash, causal, prefill)
        yield name, arguments, _attention(arguments, causal)


SCHEMAS = {name: f"{name}({arguments}) -> Tensor" for name, arguments, _ in _operators()}
KERNELS: dict[str, Callable[..., Tensor]] = {name: kernel for name, _, kernel in _operators()}


def _as_first(first: Tensor, *others: object, **named: object) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _as_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _register() -> object:
    library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    for name, kernel in KERNELS.items():
        library.define(SCHEMAS[name])
        library.impl(name, kernel, "CPU")
        library.impl(name, _as_linear if name == "linear" else _as_first, "Meta")
    return library


LIBRARY = _register()
"""Keeps the registration: torch takes the operators away with this object."""
