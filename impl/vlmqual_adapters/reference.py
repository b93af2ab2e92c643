"""The reference that goldens are made with: pinned transformers, in float64 throughout, and as honest arms.

Gold: weights widened to float64, the library's float32 islands (norms, softmax, rotary tables) lifted to float64, and a
guard that stops at the first result of lesser precision. Only Idefics3's bucketing of patch positions stays in float32,
because its rounding decides which position a patch gets (IDEFICS3-VIS-002).

Arms: the same reference as shipped, in one dtype, with its sums taken in another order. They show how far apart honest
implementations in that dtype are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlmqual_adapters.transformers_session import TransformersSession
from vlmqual_adapters.transformers_target import TransformersTarget
from vlmqual_contract.target import Model, Options

_LESSER = (torch.float32, torch.bfloat16, torch.float16)
#: What the bucketing of patch positions is made of: fractions of the side, and nothing else.
_BUCKETING = ("aten.arange", "aten.reciprocal", "aten.mul", "aten.bucketize")


class Lift(TorchFunctionMode):
    """Turns every explicit request for float32 into one for float64.

    Attributes:
        softmax_only: leave norms and rotary tables as they are.
    """

    def __init__(self, *, softmax_only: bool = False) -> None:
        super().__init__()
        self.softmax_only = softmax_only

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` with float64 in the place of float32."""
        named = dict(kwargs or {})
        if self.softmax_only and getattr(func, "__name__", "") != "softmax":
            return func(*args, **named)
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args, **named)
        swapped = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in named.items()}
        return func(*swapped, **named)


class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves this base class untyped
    """Raises when an operation gives a floating-point result of less than float64.

    Attributes:
        bucketing: True while patch positions are being computed, where float32 is the rule.
        lesser: how many float32 results the bucketing had.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.bucketing = False
        self.lesser = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and look at the dtypes of its results."""
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.dtype in _LESSER:
                if not (self.bucketing and str(func).startswith(_BUCKETING)):
                    raise TypeError(f"{func} gave {result.dtype} in a run that has to be float64 throughout")
                self.lesser += 1
        return results


class Chunks(TorchFunctionMode):
    """Splits the summed dimension of every linear layer, product and patch convolution, and adds the parts up.

    Attributes:
        count: number of parts.
        order: "forward", "reversed" or "pairwise".
        wide: add parts up in at least float32 and round once; otherwise every part is rounded, as between ranks.
    """

    def __init__(self, count: int, order: str, *, wide: bool) -> None:
        super().__init__()
        self.count = count
        self.order = order
        self.wide = wide

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, in parts where it is a product."""
        named = dict(kwargs or {})
        if func is functional.linear:
            left, weight, bias = (*args, None, None)[:3]
            bias = named.get("bias", bias)
            return self._plus(self._sum(left, weight, -1, -1, functional.linear), bias)
        if func in (torch.matmul, torch.Tensor.matmul, torch.bmm):
            return self._sum(args[0], args[1], -1, -2, torch.matmul)
        if func in (functional.conv2d, torch.conv2d):
            image, weight, bias, *rest = args

            def part(image: Any, weight: Any) -> Any:
                return functional.conv2d(image, weight, None, *rest)

            return self._plus(self._sum(image, weight, 1, 1, part), None if bias is None else bias[:, None, None])
        return func(*args, **named)

    def _sum(self, left: Any, right: Any, left_dim: int, right_dim: int, product: Callable[..., Any]) -> Any:
        dtype = left.dtype
        if self.wide and dtype != torch.float64:
            left, right = left.to(torch.float32), right.to(torch.float32)
        size = left.shape[left_dim]
        bounds = sorted({size * index // self.count for index in range(self.count + 1)})
        parts = [
            product(left.narrow(left_dim, a, b - a), right.narrow(right_dim, a, b - a)) for a, b in pairwise(bounds)
        ]
        if self.order == "reversed":
            parts.reverse()
        while len(parts) > 1:
            if self.order == "pairwise":
                parts = [sum(parts[i : i + 2][1:], parts[i]) for i in range(0, len(parts), 2)]
            else:
                parts = [parts[0] + parts[1], *parts[2:]]
        return parts[0].to(dtype)

    @staticmethod
    def _plus(total: Any, bias: Any) -> Any:
        return total if bias is None else total + bias


class Unfused(TorchFunctionMode):
    """Computes fused attention, the only one that Idefics has before 5.0, as product, softmax and product."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, in steps where it is fused attention."""
        named = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **named)
        query, key, value = args
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        if named.get("is_causal"):
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if named.get("attn_mask") is not None:
            scores = scores + named["attn_mask"]
        wide = torch.promote_types(scores.dtype, torch.float32)
        return torch.matmul(torch.softmax(scores, -1, dtype=wide).to(value.dtype), value)


@dataclass(frozen=True)
class Arm:
    """An honest variant of the reference.

    Attributes:
        name: what it is called in golden files.
        attention: "eager" or "sdpa".
        parts: None, or count, order and width of the sums.
    """

    name: str
    attention: str
    parts: tuple[int, str, bool] | None = None


ARMS = (
    Arm("eager", "eager"),
    Arm("sdpa", "sdpa"),
    Arm("eager, 2 parts forward, rounded", "eager", (2, "forward", False)),
    Arm("sdpa, 4 parts reversed, rounded", "sdpa", (4, "reversed", False)),
    Arm("eager, 4 parts pairwise, rounded", "eager", (4, "pairwise", False)),
    Arm("eager, 8 parts pairwise, wide", "eager", (8, "pairwise", True)),
)


class Reference:
    """Sessions over the pinned library, loaded once for each dtype and kind of attention.

    Attributes:
        checkpoint: directory of the checkpoint.
    """

    def __init__(self, checkpoint: Path, family: str) -> None:
        self.checkpoint = checkpoint
        self.family = family
        self._sessions: dict[tuple[str, str, bool], TransformersSession] = {}

    def session(self, dtype: str, attention: str, *, lifted: bool = False) -> TransformersSession:
        """A session with taps; a lifted one has its rotary frequencies recomputed in float64."""
        key = (dtype, attention, lifted)
        if key not in self._sessions:
            target = TransformersTarget(dtype=dtype, attn=attention)
            opened = target.open(Model(str(self.checkpoint), self.family), Options(taps=True))
            session = opened.__enter__()
            assert isinstance(session, TransformersSession)
            if lifted:
                (_lift_tables if self.family == "idefics" else _lift_rotary)(session.text_model)
            self._sessions[key] = session
        return self._sessions[key]

    @contextmanager
    def gold(self) -> Iterator[tuple[TransformersSession, Guard]]:
        """A float64 session whose islands are lifted, under the guard."""
        session = self.session("float64", "eager", lifted=True)
        guard = Guard()

        def enter(*_: Any) -> None:
            guard.bucketing = True

        def leave(*_: Any) -> None:
            guard.bucketing = False

        hooks = []
        if self.family == "idefics3":
            embeddings = session.model.model.vision_model.embeddings
            hooks = [embeddings.register_forward_pre_hook(enter), embeddings.register_forward_hook(leave)]
        try:
            with Lift(), guard:
                yield session, guard
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def arm(self, dtype: str, arm: Arm) -> Iterator[TransformersSession]:
        """A session of an arm, as shipped.

        In float64 the library's eager softmax, which asks for float32, turns the mask's smallest float64 into minus
        infinity and rows of padding into NaN; so there the softmax alone is lifted.
        """
        with ExitStack() as stack:
            if dtype == "float64" and arm.attention == "eager":
                stack.enter_context(Lift(softmax_only=True))
            if arm.parts:
                count, order, wide = arm.parts
                stack.enter_context(Chunks(count, order, wide=wide))
            if self.family == "idefics" and arm.attention == "eager":
                stack.enter_context(Unfused())
            yield self.session(dtype, arm.attention)


def _lift_tables(text_model: Any) -> None:
    """The same for Idefics, where every layer has a table of its own."""
    for layer in text_model.layers:
        rotary = layer.self_attn.rotary_emb
        with Lift():
            made = type(rotary)(rotary.dim, rotary.max_position_embeddings, rotary.base)
        if made.cos_cached.dtype != torch.float64:
            raise TypeError(f"a rotary table is {made.cos_cached.dtype}; the library's way to make it has changed")
        layer.self_attn.rotary_emb = made


def _lift_rotary(text_model: Any) -> None:
    rotary = text_model.rotary_emb
    with Lift():
        frequencies, scale = rotary.rope_init_fn(rotary.config, None)
    if frequencies.dtype != torch.float64:
        raise TypeError(f"rotary frequencies are {frequencies.dtype}; the library's way to compute them has changed")
    rotary.inv_freq, rotary.attention_scaling = frequencies, scale
