"""Arguments that the documented forward functions share: tokens, caches, masks, positions.

Legend of shapes: B rows, S token positions of this call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmqual_impl.cache import KeyValueCache

SPARE_SLOTS = 64  # a cache that a plain forward call makes can take this many tokens before it has to grow


def one_of(ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
    """The one of the two that is given.

    Raises:
        ValueError: both are, or neither.
    """
    if ids is not None and embeddings is not None:  # MLLAMA-CGEN-012
        raise ValueError("input_ids and inputs_embeds are both given; exactly one of them is needed")
    if ids is not None:
        return ids
    if embeddings is None:
        raise ValueError("neither input_ids nor inputs_embeds is given; exactly one of them is needed")
    return embeddings


def cached_positions(cache: KeyValueCache | None, caching: bool) -> int:
    """Cached positions.

    Raises:
        ValueError: the cache is of another kind, or is not to be used.
    """
    if cache is None:
        return 0
    if not isinstance(cache, KeyValueCache):  # IDEFICS3-MODEL-012, MLLAMA-CGEN-023
        raise ValueError(f"past_key_values is a {type(cache).__name__}; only the cache that a model returned is taken")
    if not caching:
        raise ValueError("past_key_values is given, but use_cache is False; a cache can only be continued")
    return cache.length


def real_slots(mask: Tensor | None, rows: int, past: int, tokens: int, device: torch.device) -> Tensor | None:
    """An attention mask as (B, cached + S) bool, None when nothing is padding.

    Raises:
        ValueError: its shape is another one.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != (rows, past + tokens):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; with {past} cached and {tokens} new tokens it has to be "
            f"{(rows, past + tokens)}"
        )
    seen = mask.to(device) != 0
    return None if bool(seen.all()) else seen


def rotary_positions(given: Tensor | None, rows: int, past: int, tokens: int, device: torch.device) -> Tensor:
    """Positions (B, S): those given, or counted from the number of cached ones.

    Raises:
        ValueError: the shape of those given is another one.
    """
    if given is None:
        return torch.arange(past, past + tokens, device=device)[None].expand(rows, tokens)
    if given.ndim != 2 or given.shape[1] != tokens or given.shape[0] not in (1, rows):
        raise ValueError(f"position_ids is {tuple(given.shape)}; it has to be {(rows, tokens)}")
    return given.to(device).expand(rows, tokens)


def with_room(cache: KeyValueCache | None, rows: int, tokens: int) -> KeyValueCache | None:
    """A cache that is given, grown where the tokens do not fit.

    Raises:
        ValueError: it has another number of rows.
    """
    if cache is None:
        return None
    if cache.batch != rows:
        raise ValueError(f"past_key_values has {cache.batch} rows; the tokens have {rows}")
    needed = cache.length + tokens
    if needed > cache.max_length:
        cache.grow(needed + max(cache.length, SPARE_SLOTS))
    return cache
