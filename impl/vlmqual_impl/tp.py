"""What a PLAN means: a column module keeps some of its outputs, a row module some of its inputs.

A column module's outputs (whole heads, or feed-forward columns) stay on their rank and feed a row module. A row
module's products are partial: they are summed over the ranks, and its bias is added once, after the sum. Modules that
no pattern names are whole on every rank, the language model head among them, so that every rank ends with equal logits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

COLUMN = "column"
ROW = "row"


@dataclass(frozen=True)
class Cut:
    """The part of a stored tensor that a rank keeps: `start` to `stop` along `dim`."""

    dim: int
    start: int
    stop: int


class Sum:
    """Adds a tensor over the ranks, in place; on demand it tells how long that took.

    Args:
        group: process group, None for the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._watched = False
        self._seconds = 0.0

    def __call__(self, x: Tensor) -> None:
        """Add `x` over the ranks; while it is watched, the device is waited for before and after."""
        if not self._watched:
            dist.all_reduce(x, group=self._group)
            return
        _settle(x.device)
        start = time.perf_counter()
        dist.all_reduce(x, group=self._group)
        _settle(x.device)
        self._seconds += time.perf_counter() - start

    def watch(self, watched: bool) -> float:
        """Seconds of host time in sums since this was last called; from now on watched or not."""
        seconds, self._seconds, self._watched = self._seconds, 0.0, watched
        return seconds


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class RowLinear(nn.Module):
    """A linear module that sees some of the inputs; sums over the ranks, then adds the bias once."""

    def __init__(self, inputs: int, outputs: int, bias: bool, add: Sum) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs of this rank) to (..., outputs), equal on every rank."""
        total = F.linear(x, self.weight).contiguous()
        self.add(total)
        return total if self.bias is None else total + self.bias


def check(counts: Iterable[tuple[str, str, int, str]], ranks: int) -> None:
    """Refuse a number of ranks that cuts through a head or leaves a remainder.

    Args:
        counts: configuration, what is counted, the count, and the first module that would be cut.
        ranks: tensor-parallel size.

    Raises:
        ValueError: names the module.
    """
    if ranks < 1:
        raise ValueError(f"tensor-parallel size {ranks} is not positive")
    for part, what, count, module in counts:
        if count % ranks:
            raise ValueError(f"{part}: {count} {what} do not divide by {ranks} ranks ({module})")


def shard(
    model: nn.Module,
    plan: Sequence[tuple[str, str]],
    rank: int,
    ranks: int,
    add: Sum | None = None,
) -> dict[str, Cut]:
    """Replace a model's modules on the meta device by this rank's parts.

    Args:
        model: a model that has no weights yet; changed in place.
        plan: name patterns (matched at the end of a module's name) and `COLUMN` or `ROW`.
        rank: this rank.
        ranks: how many there are.
        add: makes the sums of all row modules; None for sums over the default process group.

    Returns:
        Names of parameters to the part of the stored tensor that this rank loads.
    """
    cuts: dict[str, Cut] = {}
    add = add or Sum()
    patterns = [(re.compile(rf"(^|\.){pattern}$"), kind) for pattern, kind in plan]
    for name, module in list(model.named_modules()):
        kind = next((kind for pattern, kind in patterns if pattern.search(name)), None)
        if kind is None:
            continue
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name}: the plan says {kind!r}, but it is a {type(module).__name__}")
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _part(module, name, kind, rank, ranks, add, cuts))
    return cuts


def _part(
    module: nn.Linear,
    name: str,
    kind: str,
    rank: int,
    ranks: int,
    add: Sum,
    cuts: dict[str, Cut],
) -> nn.Module:
    has_bias = module.bias is not None
    with torch.device(module.weight.device):
        if kind == COLUMN:
            size = module.out_features // ranks
            cuts[f"{name}.weight"] = Cut(0, rank * size, (rank + 1) * size)
            if has_bias:
                cuts[f"{name}.bias"] = cuts[f"{name}.weight"]
            return nn.Linear(module.in_features, size, bias=has_bias)
        size = module.in_features // ranks
        cuts[f"{name}.weight"] = Cut(1, rank * size, (rank + 1) * size)
        return RowLinear(size, module.out_features, has_bias, add)


def environment(variables: Mapping[str, str], ranks: int) -> int:
    """This process's rank, as the launcher put it into the environment.

    Raises:
        ValueError: a variable is missing, or WORLD_SIZE is not the tensor-parallel size that was asked for.
    """
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not variables.get(key)]
    if missing:
        raise ValueError(f"tensor-parallel size {ranks} needs a launcher that sets {', '.join(missing)}")
    if int(variables["WORLD_SIZE"]) != ranks:
        raise ValueError(f"tensor-parallel size {ranks} does not match WORLD_SIZE {variables['WORLD_SIZE']}")
    return int(variables["RANK"])
