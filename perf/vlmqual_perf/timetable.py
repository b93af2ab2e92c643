"""The part of `vlmqual perf --dry-run` that tells what is measured in which order, and how long that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmqual_contract.scaling import short
from vlmqual_perf.forecast import Forecast, shown
from vlmqual_perf.plan import Cell


def show(
    plan: Sequence[Cell],
    impossible: Mapping[tuple[str, int], str],
    forecast: Forecast,
    facts: Mapping[str, Any],
    console: Console,
) -> None:
    """Print the cells in their order, each with the seconds that it is expected to take, and the sum.

    Args:
        plan: all cells in the order in which they are run.
        impossible: scenario and size to why the target refuses them.
        forecast: of these cells.
        facts: the plan of the run's header.
        console: is printed to.
    """
    grid = Table(box=None, pad_edge=False)
    grid.add_column("cell", overflow="fold")
    for name in ("images", "rows", "new tokens", "seconds"):
        grid.add_column(name, justify="right")
    total_s, guessed = 0.0, 0
    for cell in plan:
        scenario = cell.scenario
        refused = impossible.get((scenario.id, cell.tp))
        if refused is None:
            total_s += forecast.seconds(cell)
            guessed += not forecast.knows(cell)
        about = short(refused) if refused else f"{forecast.seconds(cell):.1f}"
        grid.add_row(cell.case, str(len(scenario.images)), str(scenario.batch), str(scenario.new_tokens), about)
    console.print(grid)
    order = f"random, seed {facts['seed']}" if "seed" in facts else "as listed"
    said = f"{len(plan)} cells, {facts['threads']} threads for each rank; order: {order}"
    if impossible:
        said += f"; {sum((cell.scenario.id, cell.tp) in impossible for cell in plan)} are not possible"
    console.print(said, markup=False)
    ground = "as they took before"
    if guessed:
        ground = f"{guessed} of them guessed from the repeat settings"
    about = f"about {shown(total_s)} (minutes:seconds) for the cells, {ground}"
    console.print(f"{about}; starting and loading come on top", markup=False)
