"""Predicted latency of a request on a device: the time that its slowest resource needs, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmqual_contract.errors import UsageError
from vlmqual_perf import costs
from vlmqual_perf.ceilings import Ceilings
from vlmqual_perf.costs_request import Request

PHASES = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class Bound:
    """A predicted time.

    Attributes:
        seconds: the longer of compute and memory, plus the sums over ranks; None where no ceiling is known.
        limit: which resource that is: "compute", "bandwidth", or "all-reduce" where the sums take longer than both.
        parts_s: seconds of each resource alone, as far as known.
    """

    seconds: float | None
    limit: str
    parts_s: Mapping[str, float]

    @property
    def whole(self) -> bool:
        """True when both compute and memory are in it."""
        return {"compute", "bandwidth"} <= set(self.parts_s)


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one number of ranks.

    Attributes:
        tp: ranks.
        reason: why there can be no such number, "" where there can.
        bounds: by phase; vision is missing without images. "decode" is one step, the one in the middle.
        weights_bytes: that a rank holds.
        kv_bytes: of a rank's cache for prompt and new tokens.
        cross_kv_bytes: of a rank's keys and values of images.
        memory_bytes: of a device, None where it is not known.
    """

    tp: int
    reason: str = ""
    bounds: Mapping[str, Bound] | None = None
    weights_bytes: int = 0
    kv_bytes: int = 0
    cross_kv_bytes: int = 0
    memory_bytes: int | None = None

    @property
    def needed_bytes(self) -> int:
        """Weights, keys and values of a rank; activations and what a runtime keeps for itself come on top."""
        return self.weights_bytes + self.kv_bytes + self.cross_kv_bytes

    @property
    def fits(self) -> bool | None:
        """Whether that is within the device's memory; None where either is not known."""
        if self.reason or self.memory_bytes is None:
            return None
        return self.needed_bytes <= self.memory_bytes


def predict(
    config: Mapping[str, object], request: Request, new_tokens: int, *, tp: int, dtype: str, ceilings: Ceilings
) -> Prediction:
    """Predict every phase for one number of ranks.

    Args:
        config: content of config.json.
        request: the batch, as it is computed.
        new_tokens: decode steps.
        tp: ranks.
        dtype: of weights, keys and values.
        ceilings: of one device.

    Raises:
        UsageError: the configuration or the dtype is not valid. A number of ranks that cuts through a head is none: it
            is a prediction with a reason.
    """
    try:
        costs.check(config, tp)
    except UsageError as error:
        return Prediction(tp, reason=str(error))
    bounds = {}
    for phase in PHASES:
        if phase != "vision" or request.total_pictures:
            cost = costs.cost(config, request, phase, tp=tp, dtype=dtype, step=(new_tokens - 1) // 2)
            bounds[phase] = bound(cost, ceilings, tp)
    longest = Request(tuple(tokens + new_tokens for tokens in request.tokens), request.pictures, request.patches)
    kept = costs.cost(config, longest, "prefill", tp=tp, dtype=dtype)
    return Prediction(
        tp,
        bounds=bounds,
        weights_bytes=costs.weights_bytes(config, tp=tp, dtype=dtype),
        kv_bytes=kept.kv_write_bytes,
        cross_kv_bytes=kept.cross_kv_write_bytes,
        memory_bytes=ceilings.memory_bytes,
    )


def bound(cost: costs.Cost, ceilings: Ceilings, tp: int) -> Bound:
    """The roofline of one phase, and the sums over ranks after it, since they wait for the products before them.

    Of a published link a ring is taken: each rank sends 2 (tp - 1) / tp of what it brings. Latency is counted where it
    was measured.
    """
    parts = {}
    if ceilings.flops_per_s:
        parts["compute"] = cost.total_flops / ceilings.flops_per_s
    if ceilings.bandwidth_bytes_per_s:
        parts["bandwidth"] = cost.moved_bytes / ceilings.bandwidth_bytes_per_s
    if not parts:
        return Bound(None, "", parts)
    limit = max(parts, key=lambda name: parts[name])
    seconds = parts[limit]
    summed = _sums_s(cost, ceilings, tp)
    if summed is not None:
        parts["all-reduce"] = summed
        limit = "all-reduce" if summed > seconds else limit
        seconds += summed
    return Bound(seconds, limit, parts)


def _sums_s(cost: costs.Cost, ceilings: Ceilings, tp: int) -> float | None:
    """Seconds of the sums over ranks, None where there are none or nothing is known of the link."""
    if tp == 1:
        return None
    if ceilings.all_reduce_bytes_per_s:
        return cost.all_reduces * (ceilings.all_reduce_latency_s or 0.0) + (
            cost.all_reduce_bytes / ceilings.all_reduce_bytes_per_s
        )
    if ceilings.link_bytes_per_s:
        return 2 * (tp - 1) / tp * cost.all_reduce_bytes / ceilings.link_bytes_per_s
    return None
