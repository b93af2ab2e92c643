"""What the full-size benchmarks share: random weights in place, seconds and memory of a phase."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GATE = 0.7


def materialize(model: nn.Module, dtype: torch.dtype, seed: int) -> int:
    """Give every parameter of a model on the meta device its own storage; the bytes of all of them."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype)
            value.normal_(0.0, 0.02, generator=generator)
            if isinstance(module, nn.LayerNorm) or type(module).__name__ == "RMSNorm":
                value += 1.0 if name == "weight" else 0.0
            if "gate" in name or name.startswith("alpha_"):  # a gate near 0 would hide what is behind it
                value += GATE
            setattr(module, name, nn.Parameter(value, requires_grad=False))
            total += value.nbytes
    return total


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Run and print how long it took."""
    start = time.perf_counter()
    result = work()
    print(f"{name:<22} {time.perf_counter() - start:9.2f} s   peak {peak_gib():6.2f} GiB", flush=True)
    return result


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
