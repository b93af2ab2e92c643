"""A small model with a cache, as its prefill and decode programs, for the tests of the emulator."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ROWS, STEPS, WIDTH = 1, 8, 4


class Counter(nn.Module):
    """Writes its inputs [L, 4] into a cache [blocks * 8, 4] at `start`, and sums what the cache holds so far."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))

    def forward(self, x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
        places = start + torch.arange(x.shape[0])
        cache.index_copy_(0, places, self.mix(x))
        return cache.sum(dim=0)

    def expected(self, rows: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.stack([self.mix(row) for row in rows]).sum(dim=0)


def programs(rebel: ModuleType, model: nn.Module, sharing: bool = True, **options: Any) -> tuple[Any, Any]:
    """Prefill (2 positions) and decode (1 position) of a model in one context."""
    context = rebel.compile_context.CompileContext(use_weight_sharing=sharing)
    cache = torch.zeros(STEPS, WIDTH, device="meta")
    context.mark_static_address(cache, "cache")

    def one(length: int) -> Any:
        info = [("x", (length, WIDTH), "float32"), ("start", (), torch.int64), ("cache", (STEPS, WIDTH), "float32")]
        examples = (torch.zeros(length, WIDTH), torch.tensor(0), cache)
        return rebel.compile_from_torch(
            model, input_info=info, example_inputs=examples, compile_context=context, **options
        )

    return one(2), one(1)
