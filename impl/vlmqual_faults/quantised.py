"""Numbers stored with fewer bits than they are said to have: what a device does that saves memory in silence."""

from __future__ import annotations

import torch
from torch import Tensor


def fp8(x: Tensor) -> Tensor:
    """Rounded to float8 (e4m3) with one scale for all of it."""
    scale = x.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def integer(x: Tensor, bits: int) -> Tensor:
    """Rounded to signed integers with one scale for each output row, as weight-only quantisation does; (O, I)."""
    if x.ndim < 2:
        return x
    most = float((1 << bits - 1) - 1)
    scale = x.abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True).clamp(min=1e-12) / most
    rounded: Tensor = (x / scale).round().clamp(-most - 1, most)
    return rounded * scale


def weight(x: Tensor, kind: str) -> Tensor:
    """A weight in the named kind; vectors (norms, biases) stay as they are."""
    if x.ndim < 2:
        return x
    return fp8(x) if kind == "fp8" else integer(x, int(kind.removeprefix("int")))
