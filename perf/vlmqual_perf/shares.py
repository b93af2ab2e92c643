"""The shares of a device's ceilings that measurements reached, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmqual_contract.records import Measurement


def show(rows: Sequence[Measurement], console: Console) -> None:
    """MBU and MFU by scenario and phase over tensor-parallel sizes; nothing where no row knows them."""
    cards = {(row.scenario, row.phase, row.tp): row.checks.get("cost", {}) for row in rows if row.state != "failed"}
    known = {key: card for key, card in cards.items() if "mbu" in card or "mfu" in card}
    if not known:
        return
    sizes = sorted({tp for _, _, tp in known})
    grid = Table(title="MBU / MFU: share of bandwidth and of peak, %", title_justify="left", box=None, pad_edge=False)
    grid.add_column("scenario", overflow="fold")
    grid.add_column("phase")
    for size in sizes:
        grid.add_column(f"TP={size}", justify="right")
    grid.add_column("padding", justify="right")
    for scenario, phase in dict.fromkeys((scenario, phase) for scenario, phase, _ in known):
        same = [known.get((scenario, phase, size), {}) for size in sizes]
        padding = max((card.get("padding_share", 0.0) for card in same), default=0.0)
        grid.add_row(scenario, phase, *map(_shares, same), f"{100 * padding:.0f} %" if padding else "")
    console.print(grid)
    for line in dict.fromkeys(line for card in known.values() for line in ceilings(card)):
        console.print(line, markup=False)


def ceilings(card: Mapping[str, Any]) -> list[str]:
    """What the shares of a card are of, in words; the first line is what `mbu` and `mfu` are of."""
    lines = []
    for kind, one in card.get("ceilings", {}).items():
        ranks = f", {one['ranks']} ranks at once" if one.get("ranks", 1) > 1 else ""
        parts = []
        if "bandwidth_bytes_per_s" in one:
            parts.append(f"{one['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s")
        if "flops_per_s" in one:
            parts.append(f"{one['flops_per_s'] / 1e12:.3g} TFLOP/s {one['dtype']}")
        if parts:
            source = one["source"].partition(":")[0] if kind == "data-sheet" else one["source"]
            lines.append(f"ceilings of a rank, {kind}{ranks}: {', '.join(parts)} ({source})")
    return lines


def _shares(card: Mapping[str, Any]) -> str:
    return " / ".join(_percent(card.get(name)) for name in ("mbu", "mfu")) if card else "-"


def _percent(share: float | None) -> str:
    """Two significant digits, all of them from 100 on."""
    if share is None:
        return "-"
    return f"{100 * share:.2g}" if share < 1 else f"{100 * share:.0f}"
