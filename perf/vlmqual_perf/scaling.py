"""The table of speed-ups: every scenario and phase at each tensor-parallel size against one device."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vlmqual_contract.records import Measurement
from vlmqual_contract.scaling import scaling, short
from vlmqual_perf.plan import ONCE
from vlmqual_perf.progress import mark


def table(rows: Sequence[Measurement], console: Console) -> None:
    """Print speed-up S(n) = T(1)/T(n) and efficiency S(n)/n with 95 % confidence intervals; nothing for one size.

    Args:
        rows: of a run, in the order in which they are shown.
        console: is printed to.
    """
    sizes = sorted({row.tp for row in rows} - {1})
    if not sizes or all(row.tp != 1 for row in rows):
        return
    threads = sorted({str(row.checks["threads"]) for row in rows if "threads" in row.checks})
    console.print(f"\nspeed-up over TP=1 and efficiency, 95 % intervals; threads of each rank: {', '.join(threads)}")
    grid = Table(box=None, pad_edge=False)
    grid.add_column("scenario", overflow="fold")
    grid.add_column("phase")
    grid.add_column("TP", justify="right")
    grid.add_column("speed-up")
    grid.add_column("efficiency")
    collected = any("collectives" in row.checks for row in rows)
    if collected:
        grid.add_column("in collectives")
    repeated = [row for row in rows if row.phase not in ONCE]
    for scenario in dict.fromkeys(row.scenario for row in repeated):
        found = {(row.phase, row.tp): row for row in repeated if row.scenario == scenario}
        phases = list(dict.fromkeys(phase for phase, _ in found))
        pairs = {
            (phase, size): _pair(found.get((phase, 1)), found.get((phase, size))) for phase in phases for size in sizes
        }
        # A size that no phase can run at, for one reason, is told once.
        whole = {size for size in sizes if _refused([found.get((phase, size)) for phase in phases])}
        for phase in phases:
            for size in (size for size in sizes if size not in whole):
                spent = [_collectives(found.get((phase, size)))] if collected else []
                grid.add_row(scenario, phase, str(size), *pairs[phase, size], *spent)
        for size in sorted(whole):
            grid.add_row(scenario, "each", str(size), *pairs[phases[0], size])
    console.print(grid)


def _collectives(row: Measurement | None) -> str:
    """Share of a call that the fastest and the slowest rank spend in collective operations."""
    found = row.checks.get("collectives") if row is not None else None
    if not found:
        return ""
    shares = [100 * found[name] / found["call_s"] for name in ("fastest_s", "slowest_s")]
    return f"{shares[0]:.0f} to {shares[1]:.0f} %"


def _refused(rows: Sequence[Measurement | None]) -> bool:
    """True when all of them failed for the same reason."""
    failed = [row.reason for row in rows if row is not None and row.state == "failed"]
    return len(failed) == len(rows) and len(set(failed)) == 1


def _pair(one: Measurement | None, many: Measurement | None) -> tuple[str, str]:
    """Speed-up and efficiency of a cell, or in the first place why there is none."""
    if one is None or many is None:
        return "-", ""
    for row in (many, one):
        if row.state == "failed":
            return (short(row.reason) if row is many else "TP=1 failed"), ""
    found = scaling(one, many)
    if found is None:
        return "-", ""
    doubt = "" if one.state == many.state == "valid" else "?"
    return (
        f"{found.speedup:.2f}{doubt}{_between(found.interval)}{mark(many)}",
        f"{100 * found.efficiency:.0f} %{_between(found.efficiency_interval, 100)}{mark(many)}",
    )


def _between(interval: tuple[float, float] | None, factor: float = 1.0) -> str:
    if interval is None:
        return ""
    digits = 2 if factor == 1 else 0
    return f" [{factor * interval[0]:.{digits}f}, {factor * interval[1]:.{digits}f}]"
