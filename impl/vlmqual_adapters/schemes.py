"""Ways of computing with fewer bits than is said, done to the reference: weights, the cache, inputs of products.

None of them is our implementation's, and none is one of `vlmqual_faults`: they are what devices and libraries are known
to do, written down a second time, so that a fingerprint is independent of what it will judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlmqual_adapters.transformers_session import TransformersSession

Rounding = Callable[[Tensor], Tensor]
_TINY = 1e-12


@dataclass(frozen=True)
class Scheme:
    """One way to compute with fewer bits.

    Attributes:
        kind: "weights", "cache" or "products".
        says: what a reader is told: "int8, one scale per output row".
        coarser_than: declared compute dtypes that do not allow it.
        weight: done to every weight of two or more dimensions.
        cached: done to keys and to values when they are written to the cache.
        later: a prompt's own attention does not see what was done to keys and values, only the steps after it do.
        inputs: done to both inputs of every product.
        activation: done to the left input of every linear layer.
    """

    kind: str
    says: str
    coarser_than: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    weight: Rounding | None = None
    cached: Rounding | None = None
    later: bool = False
    inputs: Rounding | None = None
    activation: Rounding | None = None


def float8(x: Tensor, *, rows: bool = False, scaled: bool = True, kind: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Rounded to 8-bit floats; the scale takes the largest number to the format's largest, for all or for each row."""
    if not scaled:
        return x.to(kind).to(x.dtype)
    largest = x.abs().amax(tuple(range(1, x.ndim)), keepdim=True) if rows else x.abs().amax()
    scale = largest.clamp(min=_TINY) / torch.finfo(kind).max
    return (x / scale).to(kind).to(x.dtype) * scale


def whole(x: Tensor, bits: int, group: int | None = 0, *, zero_point: bool = False) -> Tensor:
    """Rounded to whole numbers of some bits, (O, ...).

    Args:
        x: what is rounded; its dimensions but the first count as one.
        bits: of a number.
        group: how many inputs share a scale, 0 for all of an output row, None for all of the tensor. Rows that the
            group does not divide have one scale.
        zero_point: levels lie between the smallest and the largest number, not around zero.
    """
    rows = x.flatten(1)
    if group is None:
        rows = rows.reshape(1, 1, -1)
    elif group and rows.shape[1] % group == 0:
        rows = rows.reshape(len(rows), -1, group)
    else:
        rows = rows.unsqueeze(1)
    if zero_point:
        least = rows.amin(-1, keepdim=True)
        scale = ((rows.amax(-1, keepdim=True) - least) / ((1 << bits) - 1)).clamp(min=_TINY)
        return (((rows - least) / scale).round() * scale + least).reshape(x.shape)
    most = (1 << bits - 1) - 1
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=_TINY) / most
    return ((rows / scale).round() * scale).reshape(x.shape)


def by_token(x: Tensor) -> Tensor:
    """Rounded to 8-bit whole numbers with a scale for every vector along the last axis."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=_TINY) / 127
    return (x / scale).round() * scale


def mantissa(x: Tensor, bits: int, *, nearest: bool) -> Tensor:
    """float32 whose mantissa keeps some bits: rounded to nearest even, or cut off as some hardware does."""
    if x.dtype != torch.float32:
        return x
    raw, drop = x.contiguous().view(torch.int32), 23 - bits
    if nearest:
        raw = raw + (1 << drop - 1) - 1 + (raw >> drop & 1)
    return (raw >> drop << drop).view(torch.float32)


def bfloat16(x: Tensor) -> Tensor:
    """Rounded to bfloat16."""
    return x.to(torch.bfloat16).to(x.dtype)


_SINGLE = ("float64", "float32")
_ABOVE_BFLOAT16 = (*_SINGLE, "float16")
_E5M2 = torch.float8_e5m2
_UNSCALED = partial(float8, scaled=False)

#: By name, in the order of the stored arrays; weights first, since they explain most.
SCHEMES: Mapping[str, Scheme] = {
    "fp8-tensor": Scheme("weights", "fp8 (e4m3), one scale per tensor", weight=float8),
    "fp8-row": Scheme("weights", "fp8 (e4m3), one scale per output row", weight=partial(float8, rows=True)),
    "fp8-unscaled": Scheme("weights", "fp8 (e4m3) without a scale", weight=_UNSCALED),
    "fp8-e5m2": Scheme("weights", "fp8 (e5m2), one scale per tensor", weight=partial(float8, kind=_E5M2)),
    "fp8-dynamic": Scheme("weights", "fp8 (e4m3), activations too", weight=float8, activation=float8),
    "int8-row": Scheme("weights", "int8, one scale per output row", weight=partial(whole, bits=8)),
    "int8-tensor": Scheme("weights", "int8, one scale per tensor", weight=partial(whole, bits=8, group=None)),
    "int8-32": Scheme("weights", "int8 in groups of 32", weight=partial(whole, bits=8, group=32)),
    "int8-zero": Scheme(
        "weights", "int8 with a zero point, per output row", weight=partial(whole, bits=8, zero_point=True)
    ),
    "int8-dynamic": Scheme(
        "weights", "int8 per output row, activations too", weight=partial(whole, bits=8), activation=by_token
    ),
    "int4-row": Scheme("weights", "int4, one scale per output row", weight=partial(whole, bits=4)),
    "int4-tensor": Scheme("weights", "int4, one scale per tensor", weight=partial(whole, bits=4, group=None)),
    "int4-32": Scheme("weights", "int4 in groups of 32", weight=partial(whole, bits=4, group=32)),
    "int4-16": Scheme("weights", "int4 in groups of 16", weight=partial(whole, bits=4, group=16)),
    "int4-zero": Scheme(
        "weights", "int4 with a zero point, per output row", weight=partial(whole, bits=4, zero_point=True)
    ),
    "int4-32-zero": Scheme(
        "weights",
        "int4 with a zero point, in groups of 32",
        weight=partial(whole, bits=4, group=32, zero_point=True),
    ),
    "kv-fp8": Scheme("cache", "fp8 (e4m3), one scale per write", cached=float8),
    "kv-fp8-unscaled": Scheme("cache", "fp8 (e4m3) without a scale", cached=_UNSCALED),
    "kv-fp8-later": Scheme("cache", "fp8 (e4m3), one scale per write, after the prompt", cached=float8, later=True),
    "kv-fp8-unscaled-later": Scheme(
        "cache", "fp8 (e4m3) without a scale, after the prompt", cached=_UNSCALED, later=True
    ),
    "kv-fp8-e5m2": Scheme("cache", "fp8 (e5m2) without a scale", cached=partial(_UNSCALED, kind=_E5M2)),
    "kv-int8": Scheme("cache", "int8, one scale per token and head", cached=by_token),
    "kv-bfloat16": Scheme("cache", "bfloat16", _ABOVE_BFLOAT16, cached=bfloat16),
    "tf32": Scheme("products", "tf32", _SINGLE, inputs=partial(mantissa, bits=10, nearest=True)),
    "tf32-cut": Scheme("products", "tf32, cut off", _SINGLE, inputs=partial(mantissa, bits=10, nearest=False)),
    "bfloat16-products": Scheme("products", "bfloat16", _ABOVE_BFLOAT16, inputs=bfloat16),
}


class _Products(TorchFunctionMode):
    """Rounds what goes into products."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` on rounded inputs."""
        named = dict(kwargs or {})
        if func in (functional.linear, torch.matmul, torch.Tensor.matmul, torch.bmm, functional.conv2d, torch.conv2d):
            left, right, *rest = args
            if self.scheme.inputs is not None:
                left, right = self.scheme.inputs(left), self.scheme.inputs(right)
            if self.scheme.activation is not None and func is functional.linear:
                left = self.scheme.activation(left)
            args = (left, right, *rest)
        return func(*args, **named)


@contextmanager
def applied(scheme: Scheme, session: TransformersSession) -> Iterator[None]:
    """While the context is open, the session computes as the scheme says; afterwards all is as before."""
    with ExitStack() as stack:
        if scheme.weight is not None:
            _weights(session, scheme.weight, stack)
        if scheme.cached is not None:
            _cache(session, scheme.cached, scheme.later, stack)
        if scheme.inputs is not None or scheme.activation is not None:
            stack.enter_context(_Products(scheme))
        yield


def _weights(session: TransformersSession, done: Rounding, stack: ExitStack) -> None:
    for parameter in session.model.parameters():
        if parameter.ndim >= 2:
            stack.callback(parameter.data.copy_, parameter.detach().clone())
            parameter.data.copy_(done(parameter.detach().float()))


def _cache(session: TransformersSession, done: Rounding, later: bool, stack: ExitStack) -> None:
    empty = session.new_cache

    def new_cache() -> Any:
        cache = empty()
        update = cache.update
        begun: set[int] = set()

        def rounded(keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> Any:
            kept = update(done(keys), done(values), layer, *more, **named)
            fresh = layer not in begun
            begun.add(layer)
            return (keys, values) if later and fresh else kept

        cache.update = rounded
        return cache

    stack.callback(delattr, session, "new_cache")
    session.new_cache = new_cache  # type: ignore[method-assign]  # taken back when the context ends
