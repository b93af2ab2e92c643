"""The numeric mode "bfloat16": products rounded as third parties report of the NPU.

The report (rebel-compiler 0.10, RBLN-CA25; no official statement): a program that is compiled in float32 computes in
bfloat16, and simulating that on a CPU reproduces its error. The rule here: the inputs of a product are rounded to
bfloat16, accumulated in float32, and the result is rounded to bfloat16. Products are linear, matmul, convolution and
the two products of an attention; sums, norms, softmax and rotary embedding stay in the dtypes of the program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .operators import KERNELS, NAMESPACE

_aten = torch.ops.aten
PRODUCTS = frozenset(
    (
        _aten.mm,
        _aten.bmm,
        _aten.addmm,
        _aten.baddbmm,
        _aten.mv,
        _aten.addmv,
        _aten.dot,
        _aten.linear,
        _aten.matmul,
        _aten.convolution,
    )
)
"""What every product of a program comes down to once torch has taken composite operators apart."""


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            with self:  # an operator of RBLN is made of products itself
                return KERNELS[func.overloadpacket.__name__](*args, **kwargs)
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        dtype = next((one.dtype for one in args if isinstance(one, torch.Tensor)), torch.float32)
        if not dtype.is_floating_point:
            return func(*args, **kwargs)
        product = func(*(_rounded(one) for one in args), **{key: _rounded(one) for key, one in kwargs.items()})
        return product.bfloat16().to(dtype)


def _rounded(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _float32() -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _bfloat16() -> Iterator[None]:
    # The other kernels of scaled_dot_product_attention would hide the two products.
    with sdpa_kernel(SDPBackend.MATH), _Rounding():  # type: ignore[no-untyped-call]
        yield


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {"float32": _float32, "bfloat16": _bfloat16}
"""Settings.numeric -> the context in which a program runs."""
