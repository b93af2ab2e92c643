"""`vlmqual perf --self-check`: the harness measures what is known, and is judged by it.

A `truth` target takes known time and logs what it really took (see `truth_clock`). It is measured as any other target,
in workers, by the same code; then every counted value is held against the log's entry of the same call.
"""

from __future__ import annotations

import json
import statistics as plain
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np

from vlmqual_contract import timing
from vlmqual_contract.errors import VlmqualError
from vlmqual_contract.records import Measurement
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import Options, Session
from vlmqual_contract.timing import Work
from vlmqual_perf import truth_clock
from vlmqual_perf.bench import Bench
from vlmqual_perf.plan import Cell, model_of, prompts_of
from vlmqual_perf.statistics import percentile
from vlmqual_perf.truth import Truth
from vlmqual_perf.truth_clock import Entry

PHASES = ("preprocess", "vision", "prefill", "decode", "ttft")
#: A mean may be off by the larger of these, a 99th percentile by the share alone.
MEAN_SHARE, MEAN_S = 0.005, 50e-6
P99_SHARE = 0.01
OVERHEAD_S = 20e-6
_STEPS = 25
_SCENARIO = Scenario(
    id="self-check",
    family="idefics3",
    checkpoint="idefics3-tiny",
    images=("astronaut.png",),
    prompt="User:<image>What is this?<end_of_utterance>\nAssistant:",
    new_tokens=_STEPS,
)
#: Steps of 2 ms: interrupts of the host, of some ten microseconds, are half a percent of that.
_NOISE = "jitter=0.02,step_ms=2"


@dataclass(frozen=True)
class Known:
    """A truth that is measured.

    Attributes:
        name: in a few words.
        options: of the target string.
        tp: tensor-parallel size.
    """

    name: str
    options: str
    tp: int = 1


#: Synchronous and asynchronous completion, one rank and four with stragglers.
TRUTHS = (
    Known("calls wait", _NOISE),
    Known("calls return early", f"{_NOISE},async=1"),
    Known("stragglers", f"{_NOISE},straggler=1.5", tp=4),
    Known("stragglers, calls return early", f"{_NOISE},straggler=1.5,async=1", tp=4),
)
#: Runs of which none may be accepted as valid when one of its counted calls was disturbed.
DISTURBED = (
    "cold=0.01,cold_ms=8",
    "bucket_miss=0.01",
    "bucket_miss=0.01,async=1",
    "bucket_miss=0.01,fixed=1",
    "cold=0.005,cold_ms=2,async=1",
)


@dataclass(frozen=True)
class Compared:
    """One phase of one truth: what was measured beside what was true, in seconds.

    Attributes:
        truth: name of the truth.
        phase: see `PHASES`.
        tp: tensor-parallel size.
        samples: values behind both.
        mean_s: measured.
        true_mean_s: by the log.
        p99_s: measured, None with fewer than 1,000 samples.
        true_p99_s: by the log.
    """

    truth: str
    phase: str
    tp: int
    samples: int
    mean_s: float
    true_mean_s: float
    p99_s: float | None
    true_p99_s: float | None

    @property
    def right(self) -> bool:
        """Whether both are within what is allowed."""
        mean = abs(self.mean_s - self.true_mean_s) <= max(MEAN_SHARE * self.true_mean_s, MEAN_S)
        if self.p99_s is None or self.true_p99_s is None:
            return mean
        return mean and abs(self.p99_s - self.true_p99_s) <= P99_SHARE * self.true_p99_s


@dataclass(frozen=True)
class Accepted:
    """How many runs of which kind the harness called valid."""

    disturbed: int
    disturbed_valid: int
    clean: int
    clean_valid: int


@dataclass(frozen=True)
class Checked:
    """What the harness is worth on this machine, now.

    Attributes:
        compared: every phase of every truth.
        accepted: runs with and without disturbances.
        overhead_s: what watching costs a decode step, beside the same step unwatched.
    """

    compared: tuple[Compared, ...]
    accepted: Accepted
    overhead_s: float

    @property
    def right(self) -> bool:
        """Whether everything is within what is allowed."""
        return all(one.right for one in self.compared) and not self.accepted.disturbed_valid and self.cheap

    @property
    def cheap(self) -> bool:
        """Whether watching costs less than is allowed."""
        return self.overhead_s < OVERHEAD_S


def check(runs: int, say: Callable[[str], None]) -> Checked:
    """Measure the harness.

    Args:
        runs: short runs with disturbances among what is counted; a fifth as many without.
        say: is told what is done next.
    """
    compared: list[Compared] = []
    for known in TRUTHS:
        say(f"{known.name}, TP={known.tp}")
        compared += compare(known)
    say(f"{runs} runs with cold starts and bucket misses")
    hit: list[Measurement] = []
    for seed in count():
        row, entries = _run(f"{DISTURBED[seed % len(DISTURBED)]},seed={seed}")
        hit += [row] if any(entry.disturbed for entry in entries) else []  # some are left alone by chance
        if len(hit) == runs:
            break
    say(f"{max(1, runs // 5)} runs without")
    clean = [_run(f"{_NOISE},seed={seed}") for seed in range(max(1, runs // 5))]
    accepted = Accepted(
        len(hit), sum(row.state == "valid" for row in hit), len(clean), sum(row.state == "valid" for row, _ in clean)
    )
    say("cost of watching")
    return Checked(tuple(compared), accepted, overhead_s())


def compare(known: Known, phases: Sequence[str] = PHASES, repeats: int = 44) -> list[Compared]:
    """Measure a truth and hold it against its log.

    Args:
        known: the truth.
        phases: which ones.
        repeats: repetitions of each; 44 of decode are 1,100 samples.
    """
    with tempfile.TemporaryDirectory(prefix="vlmqual-truth-") as folder:
        rows = _measured(known, phases, repeats, Path(folder))
        log = truth_clock.read(Path(folder))
    return [_compared(known, row, true_s(row, log)) for row in rows]


def _measured(known: Known, phases: Sequence[str], repeats: int, folder: Path) -> list[Measurement]:
    with RemoteTarget(f"truth:{known.options},log={folder}", tp=known.tp, threads=1) as target:
        bench = Bench(target, known.tp, [_SCENARIO], checkpoint=None, repeats=repeats, cell_s=0.2, threads=1)
        return [bench.measure(Cell(_SCENARIO, phase, known.tp)) for phase in phases]


def _compared(known: Known, row: Measurement, truth: Sequence[Sequence[float]]) -> Compared:
    measured = [value for steps in row.values_s for value in steps]
    true = [value for steps in truth for value in steps]
    means = [float(np.mean(values)) for values in (measured, true)]
    tops = [percentile(values, 0.99) for values in (measured, true)]
    return Compared(known.name, row.phase, known.tp, len(measured), *means, *tops)


def true_s(row: Measurement, log: Mapping[int, Sequence[Entry]]) -> list[list[float]]:
    """What the counted calls of a row really took: for each repetition a list of the slowest rank's values.

    Args:
        row: measured on a truth target.
        log: by rank.

    Raises:
        VlmqualError: the log has no entry for a counted call.
    """
    first = "preprocess" if row.phase == "ttft" else row.phase
    last = "prefill" if row.phase == "ttft" else row.phase
    starts = {rank: [entry for entry in entries if entry.phase == first] for rank, entries in log.items()}
    ends = {rank: [entry for entry in entries if entry.phase == last] for rank, entries in log.items()}
    began = [entry.began_s for entry in starts.get(0, [])]
    found: list[list[float]] = []
    for repetition, moment in zip(row.values_s, row.began_s, strict=True):
        place = bisect_left(began, moment)
        if place + len(repetition) > len(began):
            raise VlmqualError(f"the truth's log ends before a counted call of {row.case}")
        found.append(
            [
                max(_took(starts[rank][place + step], ends[rank], step) for rank in starts)
                for step in range(len(repetition))
            ]
        )
    return found


def _took(start: Entry, ends: Sequence[Entry], step: int) -> float:
    """From the beginning of one entry to the end of the first that follows it, or of itself."""
    place = bisect_left([entry.began_s for entry in ends], start.began_s)
    return ends[place].ended_s - start.began_s


def _run(options: str) -> tuple[Measurement, list[Entry]]:
    """A short run of decode, and the log's entries of what was counted."""
    with tempfile.TemporaryDirectory(prefix="vlmqual-truth-") as folder:
        [row] = _measured(Known("", options), ["decode"], 7, Path(folder))
        entries = [entry for entry in truth_clock.read(Path(folder))[0] if entry.phase == "decode"]
    counted = [one for one in entries if one.began_s >= row.began_s[0]]
    return row, counted


def overhead_s(steps: int = 2000, blocks: int = 20) -> float:
    """Seconds that watching costs a decode step: the timing loop beside the same calls alone, A B B A, median."""
    target = Truth(step_ms="0", prefill_ms="0", preprocess_ms="0")
    with target.open(model_of(_SCENARIO, None), Options()) as session:
        inputs = session.preprocess(prompts_of(_SCENARIO))
        work = Work("decode", inputs=inputs, steps=steps)

        def watched() -> float:
            start = time.perf_counter()
            timing.repeat(cast(Session, session), work)  # it decodes its own steps only
            return time.perf_counter() - start

        def bare() -> float:
            start = time.perf_counter()
            step = session.prefill(inputs)
            for _ in range(steps):
                step = session.decode(step)
                session.synchronize()
            return time.perf_counter() - start

        pairs = [(watched(), bare(), bare(), watched()) for _ in range(blocks)]
    return plain.median((a + d - b - c) / 2 for a, b, c, d in pairs) / steps


def write(checked: Checked, results: Path) -> Path:
    """`selfcheck.json`, for a report."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / "selfcheck.json"
    path.write_text(json.dumps({"format": 1, "right": checked.right, **asdict(checked)}, indent=1) + "\n", "utf-8")
    return path
