"""What a gate says before it starts and at its end; and `gate.json`."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Shown

from vlmqual_contract import machine
from vlmqual_contract.discovery import suite_version
from vlmqual_contract.errors import UsageError
from vlmqual_perf.gate_forecast import Noise, forecast, forecast_unpaired
from vlmqual_perf.gate_launches import Arm, Launch
from vlmqual_perf.gate_plan import Plan
from vlmqual_perf.gate_progress import counted
from vlmqual_perf.gate_recorded import Recorded
from vlmqual_perf.gate_run import Comparison, Outcome, Table
from vlmqual_perf.gate_statistics import FEWEST, Word

NAME = "gate.json"
FORMAT = 1
_WIDTH = 80
_LISTED = 5
_ORDER: tuple[Word, ...] = ("regressed", "cannot tell", "improved", "unchanged")


def announce(plan: Plan, noise: Noise | float, console: Console) -> dict[str, Any]:
    """Print what will be compared and what can be seen; the forecast as plain data."""
    comparison = plan.comparison
    rule, settings, count = comparison.rule, comparison.settings, len(comparison.cells)
    for title, one in (("baseline", comparison.baseline), ("candidate", comparison.candidate)):
        _say(console, f"{title:9}  {one.name}  {_who(one)}")
    for line in (*plan.differs, *plan.notes):
        _say(console, f"note: {line}")
    sizes = ", ".join(str(size) for size in dict.fromkeys(cell.tp for cell in comparison.cells))
    _say(console, f"{counted(count, 'cell')}, TP {sizes}, {counted(settings.threads, 'thread')} for each rank")
    if isinstance(comparison.candidate, Arm):
        side = "" if comparison.recorded else " of each arm in blocks A B B A or B A A B"
        _say(
            console,
            f"at most {rule.pairs} launches{side}, the first look after {FEWEST}; "
            f"{settings.repeats} repetitions or more for each cell and launch",
        )
    _say(
        console,
        f"margin {100 * rule.margin:g} %; false alarms at most {100 * rule.alpha:g} % for a cell, and as a false-"
        f"discovery rate over all cells at most {50 * rule.alpha:g} % in each direction (Benjamini-Hochberg)",
    )
    return _predict(comparison, noise, console)


def _predict(comparison: Comparison, noise: Noise | float, console: Console) -> dict[str, Any]:
    rule, count = comparison.rule, len(comparison.cells)
    if isinstance(comparison.candidate, Recorded):
        return {}
    if isinstance(noise, Noise):
        spread = noise.value(comparison.settings.repeats)
        source = f"assumed: {100 * noise.launch:g} % between launches, {100 * noise.iteration:g} % between repetitions"
    else:
        spread, source = noise, "recorded earlier, the median over its cells"
    found = {}
    for name, cells in {"alone": count, "together": 1}.items():
        if isinstance(comparison.baseline, Recorded):
            most = Counter(case for one in comparison.baseline.launches for case in one.cells)
            made = max(2, max(most.values()))
            found[name] = forecast_unpaired(spread, made, comparison.session, rule, cells)
        else:
            found[name] = forecast(spread, rule, cells)
    _say(console, f"predicted for a noise of {100 * spread:.2g} % of a launch ({source}):")
    together, alone = found["together"], found["alone"]
    if count > 1:
        _say(console, f"  {_seen(together.smallest)} if all cells slow down")
        _say(console, f"  {_seen(alone.smallest)} if one cell of {count} does")
    else:
        _say(console, f"  {_seen(alone.smallest)}")
    slower = "" if math.isnan(together.launches_slower) else f" and {together.launches_slower:.0f} with that slowdown"
    _say(
        console,
        f"  launches of an arm that are expected: {together.launches_same:.0f} without a change{slower}; "
        f"without a change a cell is called unchanged in {100 * together.settled:.1f} %",
    )
    plain = {name: {key: _finite(value) for key, value in asdict(one).items()} for name, one in found.items()}
    return {"predicted": True, "launch_spread": spread, "source": source, **plain}


def _seen(smallest: float) -> str:
    if math.isinf(smallest):
        return "not even +50 % is called regressed in 99 of 100 gates"
    return f"{100 * smallest:+.1f} % is called regressed in 99 of 100 gates"


def show(plan: Plan, outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the verdicts, worst first, and what did not count."""
    title = "rehearsal with an emulated target" if plan.rehearsal else None
    shown = Shown(title=title, title_justify="left", box=None, pad_edge=False, width=min(_WIDTH, console.width))
    shown.add_column("cell", overflow="fold", ratio=1)
    for name in ("change", "interval %", "n"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for one in sorted(outcomes, key=lambda one: _ORDER.index(one.verdict)):
        found = one.estimate
        style = {"regressed": "bold red", "improved": "green", "cannot tell": "yellow"}.get(one.verdict, "")
        figures = ("-", "-", "-")
        if found is not None:
            change, low, high = (f"{100 * value:+.1f}" for value in (found.change, found.low, found.high))
            figures = (f"{change} %", f"{low} to {high}", str(found.pairs))
        shown.add_row(one.case, *figures, f"[{style}]{one.verdict}[/]" if style else one.verdict)
    console.print(shown)
    kind = "launches" if plan.comparison.recorded else "pairs of launches"
    _say(console, f"change: of the candidate's time, + is slower; n: {kind}; intervals hold at every look at once")
    for one in outcomes:
        if one.reason:
            _say(console, f"cannot tell {one.case}: {one.reason}")
        for note in one.notes:
            _say(console, f"note {one.case}: {note}")
    lost = [f"{line} ({one.case})" for one in outcomes for line in one.excluded]
    if lost:
        _say(console, f"{counted(len(lost), 'reading')} did not count (arm, block.place, state):")
        for line in lost[:_LISTED]:
            _say(console, f"  {line}")
        if len(lost) > _LISTED:
            _say(console, f"  and {len(lost) - _LISTED} more, all named in {NAME}")
    counts = Counter(one.verdict for one in outcomes)
    line = ", ".join(f"{counts[word]} {word}" for word in _ORDER if counts[word])
    _say(console, f"{line} (rehearsal)" if plan.rehearsal else line)


def write(path: Path, plan: Plan, table: Table, outcomes: Sequence[Outcome], more: Mapping[str, Any]) -> None:
    """Write `gate.json`: everything that was said, and the value of every launch.

    Raises:
        UsageError: it cannot be written.
    """
    comparison = plan.comparison
    sides = (comparison.baseline, comparison.candidate)
    recorded = [launch for one in sides if isinstance(one, Recorded) for launch in one.launches]
    document = {
        "format": FORMAT,
        "kind": "vlmqual gate",
        "suite": suite_version(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["vlmqual", *sys.argv[1:]]),
        "machine": machine.describe(),
        "paired": not comparison.recorded,
        "rehearsal": plan.rehearsal,
        "arms": {one.name: {"subject": _who(one), **_side(one), "info": plan.infos[one.name]} for one in sides},
        "differs": list(plan.differs),
        "notes": list(plan.notes),
        "rule": vars(comparison.rule),
        "session": comparison.session,
        "seed": comparison.seed,
        "settings": comparison.settings.plain(),
        "blocks": table.blocks,
        "cells": [_cell(one, [*recorded, *table.launches]) for one in outcomes],
        **more,
    }
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(document, indent=1, allow_nan=False, default=str) + "\n", "utf-8")
        new.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def _cell(one: Outcome, launches: Sequence[Launch]) -> dict[str, Any]:
    made = [
        {
            "arm": launch.arm,
            "block": launch.block,
            "place": launch.place,
            "began": launch.began,
            "median_s": math.exp(reading.value) if reading.counts else None,
            "state": reading.state,
            "reason": reading.reason,
        }
        for launch in launches
        if (reading := launch.cells.get(one.case)) is not None
    ]
    figures = asdict(one.estimate) if one.estimate else {}
    return {
        "case": one.case,
        "verdict": one.verdict,
        "reason": one.reason,
        "broken": one.broken,
        **{key: _finite(value) for key, value in figures.items()},
        "p": dict(zip(("slower", "faster", "same"), one.p, strict=True)),
        "excluded": list(one.excluded),
        "notes": list(one.notes),
        "launches": made,
    }


def _side(one: Arm | Recorded) -> dict[str, Any]:
    if isinstance(one, Arm):
        return {"target": one.target, "python": one.python or "", "recorded": False}
    return {
        "target": one.subject,
        "recorded": True,
        "source": one.source.name,
        "digest": one.digest,
        "signer": one.signer,
        "machine": dict(one.machine),
    }


def _who(one: Arm | Recorded) -> str:
    if isinstance(one, Arm):
        return f"{one.target} ({one.python})" if one.python else one.target
    return f"{one.subject}, recorded in {one.source.name}"


def _say(console: Console, text: str) -> None:
    indent = " " * (len(text) - len(text.lstrip()))
    width = min(_WIDTH, console.width)
    wrapped = textwrap.fill(
        text.strip(), width, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False
    )
    console.print(wrapped, markup=False, highlight=False, soft_wrap=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
