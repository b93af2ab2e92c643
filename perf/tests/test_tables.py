"""The tables at the end of a sweep."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from vlmqual_contract.records import Measurement
from vlmqual_perf import progress, scaling

SPREAD = (0.98, 0.99, 1.0, 1.01, 1.02)


def row(phase: str, tp: int, median_s: float | None, **more: Any) -> Measurement:
    """A cell whose repetitions lie around a median, or one that failed."""
    values = () if median_s is None else tuple((median_s * factor,) for factor in SPREAD)
    values_of = {"values_s": values, "checks": {"threads": 2}, **more}
    return Measurement("c", "one-photo", "idefics3", phase, tp, 1, "float32", {}, **values_of)


def drawn(table: Callable[[Sequence[Measurement], Console], None], *rows: Measurement) -> list[str]:
    stream = io.StringIO()
    table(rows, Console(file=stream, width=80, highlight=False))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_a_speedup_stands_beside_its_interval_and_its_efficiency() -> None:
    lines = drawn(scaling.table, row("prefill", 1, 0.3), row("prefill", 2, 0.2), row("prefill", 4, 0.1))
    assert any("threads of each rank: 2" in line for line in lines)
    two, four = (line.split() for line in lines[-2:])
    assert two[:4] == ["one-photo", "prefill", "2", "1.50"]
    assert four[:4] == ["one-photo", "prefill", "4", "3.00"]
    low, high = float(two[4].strip("[,")), float(two[5].strip("]"))
    assert 1.4 < low < 1.5 < high < 1.6
    assert two[6:8] == ["75", "%"]
    assert two[8] == f"[{50 * low:.0f},"


def test_a_size_that_is_not_possible_is_told_once_and_a_failed_cell_where_it_stands() -> None:
    refused = {"state": "failed", "reason": "text_config: 6 attention heads do not divide by 4 ranks"}
    crashed = {"state": "failed", "reason": "the target's process ended (signal SIGKILL)"}
    rows = [row(phase, 1, 0.3) for phase in ("vision", "prefill")]
    rows += [row("vision", 2, 0.2), row("prefill", 2, None, **crashed)]
    rows += [row(phase, 4, None, **refused) for phase in ("vision", "prefill")]
    lines = drawn(scaling.table, *rows)
    assert [line.split() for line in lines[-2:]] == [
        ["one-photo", "prefill", "2", "crashed"],
        ["one-photo", "each", "4", "heads", "%", "4"],
    ]
    shown = [line.split() for line in drawn(progress.table, *rows) if line.startswith("one-photo")]
    assert shown == [
        ["one-photo", "vision", "300", "200", "heads", "%", "4"],
        ["one-photo", "prefill", "300", "crashed", "heads", "%", "4"],
    ]


def test_a_speedup_over_doubtful_cells_is_marked_and_single_values_have_none() -> None:
    lines = drawn(
        scaling.table, row("vision", 1, 0.3, state="noisy"), row("vision", 2, 0.2), row("load", 1, 1), row("load", 2, 1)
    )
    assert "1.50?" in lines[-1]
    assert not any("load" in line for line in lines)


def test_nothing_is_said_of_one_size() -> None:
    assert drawn(scaling.table, row("prefill", 1, 0.3)) == []
    assert drawn(scaling.table, row("prefill", 2, 0.3)) == []


def test_every_state_but_valid_has_a_sign_that_is_explained() -> None:
    for state in ("noisy", "too-few", "not-steady", "throttled", "wrong-bucket"):
        sign, words = progress.MARKS[state]
        text = drawn(progress.table, row("prefill", 1, 0.3, state=state, reason="r"))
        assert any(line.endswith(f"300 {sign}") for line in text)
        assert f"{sign} {words}" in text[-1]
