"""Cost cards: what a measured phase had to do, and which share of the device's ceilings that was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Measurement
from vlmqual_contract.target import Inputs
from vlmqual_perf import costs
from vlmqual_perf.ceilings import Ceilings
from vlmqual_perf.costs_request import of_tensors


def card(
    row: Measurement, inputs: Inputs, config: Mapping[str, object], ceilings: Sequence[Ceilings] = ()
) -> dict[str, Any]:
    """The cost card of a measurement, for `Measurement.checks["cost"]`; empty for phases that have none.

    Of decoding the step in the middle is counted, whose cache has the steps' mean length. A device without a unit for
    the dtype has no MFU.

    Args:
        row: the measurement.
        inputs: its tensors.
        config: the model's config.json.
        ceilings: of the device; the first that knows a figure gives `mbu` and `mfu`.

    Returns:
        flops, flops_by_component, bytes by kind and all-reduces of one rank (see `costs.Cost`), `ranks`;
        flops_all_ranks; padding_share of the FLOPs and kv_padding_share of the bytes of keys and values that padded
        tokens, slots and tiles cause; median_s; and for each kind of ceilings these, mbu and mfu. Or `missing`, why
        there are no counts.
    """
    if row.phase not in costs.PHASES:
        return {}
    try:
        computed, asked = of_tensors(inputs, config)
        step = (row.shape.get("new_tokens", 1) - 1) // 2
        whole = costs.cost(config, computed, row.phase, tp=row.tp, dtype=row.dtype, step=step)
        real = costs.cost(config, asked, row.phase, tp=row.tp, dtype=row.dtype, step=step)
    except UsageError as error:
        return {"missing": str(error)}
    found = costs.plain(whole) | {
        "ranks": row.tp,
        "flops_all_ranks": whole.total_flops * row.tp,
        "padding_share": _share(real.total_flops, whole.total_flops),
        "kv_padding_share": _share(real.kv_bytes, whole.kv_bytes),
    }
    if not row.values_s:
        return found
    seconds = float(np.median([value for steps in row.values_s for value in steps]))
    found["median_s"] = seconds
    rated = {one.kind: _figures(one) | _rates(whole, seconds, one) for one in ceilings}
    if rated:
        found["ceilings"] = rated
    for name in ("mbu", "mfu"):
        known = [rate[name] for rate in rated.values() if name in rate]
        if known:
            found[name] = known[0]
    return found


def _figures(ceilings: Ceilings) -> dict[str, Any]:
    """Ceilings without their kind, which is the key, and their notes, which the devices' own table has."""
    return {name: value for name, value in ceilings.plain().items() if name not in ("kind", "notes")}


def _rates(cost: costs.Cost, seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """MBU and MFU of one rank: its bytes and FLOPs by time, over what its device can do."""
    found = {}
    if ceilings.bandwidth_bytes_per_s:
        found["mbu"] = cost.moved_bytes / seconds / ceilings.bandwidth_bytes_per_s
    if ceilings.flops_per_s:
        found["mfu"] = cost.total_flops / seconds / ceilings.flops_per_s
    return found


def _share(real: int, whole: int) -> float:
    return 1 - real / whole if whole else 0.0
