"""What `vlmqual perf --self-check` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlmqual_contract import host, machine
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK
from vlmqual_perf.selfcheck import MEAN_S, MEAN_SHARE, OVERHEAD_S, P99_SHARE, Checked, Compared, check, write

_MICRO = "\N{MICRO SIGN}s"


def run(runs: int, results: Path) -> int:
    """Check the harness, print and keep what came of it.

    Args:
        runs: short runs with disturbances.
        results: folder of `selfcheck.json`.

    Returns:
        The exit code: whether everything is within what is allowed.
    """
    console = Console(highlight=False)
    load = host.readings().get("load", 0.0)
    with console.status("self-check") as status:

        def say(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text, markup=False)

        checked = check(runs, say)
    show(checked, console)
    if load > 0.5 * machine.cores():
        console.print(
            f"the machine was busy before this began (load {load:.1f} on {machine.cores()} cores): what disturbs the "
            "harness then is in its errors",
            soft_wrap=True,
        )
    console.print(str(write(checked, results)), soft_wrap=True, markup=False)
    return EXIT_OK if checked.right else EXIT_FAILED


def show(checked: Checked, console: Console) -> None:
    """Print every phase of every truth, what was accepted, and what watching costs."""
    for truth in dict.fromkeys(one.truth for one in checked.compared):
        same = [one for one in checked.compared if one.truth == truth]
        table = Table(title=f"truth: {truth}, TP={same[0].tp} (simulated)", title_justify="left", box=None)
        for name in ("phase", "samples", "mean ms", "error", "p99 ms", "error", ""):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for one in same:
            table.add_row(*_row(one))
        console.print(table)
    console.print(
        f"allowed: a mean off by {MEAN_SHARE:.1%} or {1e6 * MEAN_S:g} {_MICRO}, a 99th percentile by {P99_SHARE:.0%}; "
        "it is given from 1,000 samples on",
        soft_wrap=True,
    )
    found = checked.accepted
    console.print(
        f"runs with cold starts or bucket misses among what was counted: {found.disturbed_valid} of "
        f"{found.disturbed} accepted as valid{'' if not found.disturbed_valid else ', WRONG'}; runs without: "
        f"{found.clean_valid} of {found.clean}",
        soft_wrap=True,
    )
    console.print(
        f"watching a decode step costs {1e6 * checked.overhead_s:.1f} {_MICRO} (measured beside the same step "
        f"unwatched), allowed are {1e6 * OVERHEAD_S:g}{'' if checked.cheap else ', WRONG'}",
        soft_wrap=True,
    )


def _row(one: Compared) -> tuple[str, ...]:
    p99 = ("-", "")
    if one.p99_s is not None and one.true_p99_s is not None:
        p99 = f"{1e3 * one.p99_s:.3f}", f"{one.p99_s / one.true_p99_s - 1:+.2%}"
    error = f"{1e6 * (one.mean_s - one.true_mean_s):+.1f} {_MICRO}"
    return one.phase, f"{one.samples:,}", f"{1e3 * one.mean_s:.3f}", error, *p99, "ok" if one.right else "WRONG"
