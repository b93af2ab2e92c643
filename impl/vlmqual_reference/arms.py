"""Honest ways to take the same sums: how far they lie apart is the noise that a target's budget is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlmqual_adapters.reference import Chunks

#: Scores of attention that are held at one time, in numbers.
_SCORES = 1 << 24


class Spelled(TorchFunctionMode):
    """Computes fused attention as product, softmax and product, some queries at a time; scores are rounded."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, in steps where it is fused attention."""
        named = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **named)
        query, key, value = args
        bias = named.get("attn_mask")
        count = max(1, _SCORES // (key.shape[0] * query.shape[1] * key.shape[2]))
        parts = []
        for start in range(0, query.shape[2], count):
            part = query[:, :, start : start + count]
            some = bias if bias is None or bias.shape[2] == 1 else bias[:, :, start : start + count]
            parts.append(_attended(part, key, value, some))
        return torch.cat(parts, dim=2)


def _attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, S, d) queries over (B, H, K, d) keys and values to (B, H, S, d)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query, key.transpose(-2, -1)).to(wide) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.to(wide)
    return torch.matmul(torch.softmax(scores, -1).to(value.dtype), value)


@dataclass(frozen=True)
class Arm:
    """An honest order of sums.

    Attributes:
        name: what it is called in reference files.
        spelled: attention is spelled out instead of being left to torch.
        parts: None, or count, order and width of the sums, see `Chunks`.
    """

    name: str
    spelled: bool = False
    parts: tuple[int, str, bool] | None = None

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Torch in this order, in the calling thread."""
        with ExitStack() as stack:
            if self.parts:
                count, order, wide = self.parts
                stack.enter_context(Chunks(count, order, wide=wide))
            if self.spelled:
                stack.enter_context(Spelled())
            yield


#: How gold itself is computed, in float32.
PLAIN = Arm("fused")
ARMS = (
    PLAIN,
    Arm("spelled out, 4 parts reversed, rounded", True, (4, "reversed", False)),
    Arm("fused, 3 parts forward, rounded", False, (3, "forward", False)),
    Arm("spelled out", True),
    Arm("spelled out, 4 parts pairwise, rounded", True, (4, "pairwise", False)),
    Arm("fused, 8 parts pairwise, wide", False, (8, "pairwise", True)),
)


def arms(dtype: str, count: int) -> tuple[Arm, ...]:
    """The first `count` arms of a dtype; of gold's own those that differ from gold."""
    return tuple(arm for arm in ARMS if dtype != "float32" or arm is not PLAIN)[:count]
