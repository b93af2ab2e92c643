"""One pytest-benchmark entry for each measured cell."""

from __future__ import annotations

from typing import Any

from vlmqual_contract.records import Measurement
from vlmqual_perf import replay


def test_cell(row: Measurement, benchmark: Any) -> None:
    """Replay the recorded values of one cell: a round for each repetition, for decode a round for each step."""
    values = [value for steps in row.values_s for value in steps]
    rehearsal = bool(row.checks.get("rehearsal", False))
    benchmark.group = f"{row.scenario}/{row.phase}" + (" (rehearsal)" if rehearsal else "")
    benchmark.extra_info.update(
        scenario=row.scenario,
        phase=row.phase,
        tp=row.tp,
        batch=row.batch,
        dtype=row.dtype,
        state=row.state,
        rehearsal=rehearsal,
        shape=dict(row.shape),
        tokens_digest=row.tokens_digest,
    )
    replay.load(values)
    benchmark.pedantic(lambda: None, rounds=len(values), iterations=1, warmup_rounds=0)
