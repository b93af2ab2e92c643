"""Kills a sweep again and again with SIGKILL, at moments drawn from a seed, and looks at what is left.

    python perf/benchmarks/kill_resume.py --kills 100 --seed 1

A sweep is started, killed and started again with the same command until it ends by itself; then the next one begins,
until there were enough kills. Of four kills three come at a moment drawn from the length of an uninterrupted sweep, the
fourth while a worker starts. What has to hold, and makes the exit status 1 where it does not:

- every cell that the sweep had announced before the kill is on disk, and nothing that was on disk changes;
- at most the cell that was being measured is measured again: no cell has two rows;
- no worker lives on for more than a few seconds;
- rows, header, footer and report of the resumed sweep are those of an uninterrupted one, but for what a clock says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Measurement, Run, read

TARGET = "truth:preprocess_ms=1,vision_ms=1,prefill_ms=2,step_ms=0.3,load_ms=20"
QUICK = ("--rehearse", "--repeats", "3", "--cell-seconds", "0.02", "--threads", "1")
MARK = "VLMQUAL_KILL_RESUME"
GONE_S = 10.0
#: What a clock, or the machine at that moment, decides of a measurement's checks.
TIMED = {"resolution", "warmups", "host", "devices", "energy", "ceilings", "collectives"}
_DOUBTS = "valid|too few values|noisy|not steady|throttled"


@dataclass
class Findings:
    """What was seen, and every sentence on what must not be."""

    kills: int = 0
    starting: int = 0
    sweeps: int = 0
    rows: int = 0
    cut: int = 0
    before_header: int = 0
    longest_worker_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Sweep:
    """A sweep in a folder of its own, started as often as it takes.

    Args:
        folder: for its results.
        arguments: of `vlmqual perf`.
    """

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.results = folder / "results"
        self._said = folder / "said"
        self._mark = uuid.uuid4().hex
        folder.mkdir(parents=True)
        self._command = [sys.executable, "-m", "vlmqual_contract.cli", "perf", "--results", str(self.results)]
        self._command += arguments

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, or go on with it."""
        environment = {**os.environ, MARK: self._mark, "PYTHONUNBUFFERED": "1"}
        with self._said.open("wb") as said:
            return subprocess.Popen(self._command, stdout=said, stderr=subprocess.STDOUT, env=environment)

    def announced(self) -> set[str]:
        """Cells that the latest start said it had measured."""
        return set(re.findall(r"^\[\d+/\d+, [0-9:]+ left\] (\S+)  .*$", self.said(), re.MULTILINE))

    def said(self) -> str:
        """Everything that the latest start printed."""
        return self._said.read_text("utf-8", "replace")

    def processes(self) -> list[psutil.Process]:
        """Every living process that belongs to this sweep."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def file(self) -> Path | None:
        """Its results file; None before it is there."""
        files = sorted(self.results.glob("*.jsonl")) if self.results.is_dir() else []
        if len(files) > 1:
            raise UsageError(f"{len(files)} results files where one sweep was continued: {', '.join(map(str, files))}")
        return files[0] if files else None


def main() -> int:
    """Do it and print what was found."""
    parser = argparse.ArgumentParser(description="kill a sweep at random moments, resume it, compare")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--scenarios", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--suite", default="kills")
    parser.add_argument("--tp", default="1,2")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a folder that is removed)")
    args = parser.parse_args()
    arguments = ["--target", args.target, "--scenarios", str(args.scenarios), "--suite", args.suite]
    arguments += ["--tp", args.tp, *QUICK]
    with tempfile.TemporaryDirectory() as temporary:
        findings = run(args.folder or Path(temporary), arguments, args.kills, args.seed, reports=True)
    print(f"{findings.kills} kills ({findings.starting} while a worker started, {findings.before_header} before a row")
    print(f"could be written) in {findings.sweeps} sweeps of {findings.rows} rows; {findings.cut} lines were cut")
    print(f"the last worker was gone after {findings.longest_worker_s:.1f} s")
    for sentence in findings.wrong:
        print(f"WRONG: {sentence}")
    print("holds" if not findings.wrong else f"does not hold: {len(findings.wrong)} times")
    return 1 if findings.wrong else 0


def run(folder: Path, arguments: Sequence[str], kills: int, seed: int, *, reports: bool) -> Findings:
    """Kill and resume sweeps until there were enough kills.

    Args:
        folder: for everything that is written; a subfolder for each sweep.
        arguments: of `vlmqual perf`.
        kills: how often.
        seed: of the moments.
        reports: compare the Markdown report of the last sweep too; rows are compared of each.
    """
    rng = random.Random(seed)
    findings = Findings()
    whole = Sweep(folder / "whole", arguments)
    began = time.monotonic()
    process = whole.start()
    process.wait()
    length_s = time.monotonic() - began
    path = whole.file()
    if process.returncode != 0 or path is None:
        findings.wrong.append(f"the uninterrupted sweep ended with {process.returncode}: {whole.said()[-500:]}")
        return findings
    expected = read(path)
    findings.rows = len(expected.measurements)
    while findings.kills < kills and not findings.wrong:
        sweep = Sweep(folder / f"sweep-{findings.sweeps}", arguments)
        for left in range(kills - findings.kills, -1, -1):
            if not left or not _killed(sweep, rng, length_s, findings):
                break
        if not left:
            sweep.start().wait()
        findings.sweeps += 1
        ended = sweep.file()
        if ended is None:
            findings.wrong.append(f"{sweep.results} has no results: {sweep.said()[-500:]}")
            continue
        findings.wrong += differences(expected, read(ended))
        findings.wrong += _twice(ended)
        print(f"{findings.kills} kills, {findings.sweeps} sweeps", flush=True)
    if reports and not findings.wrong and (lines := _different(report(whole.results), report(sweep.results))):
        findings.wrong.append(f"{sweep.results}: the report differs: {lines}")
    return findings


def _killed(sweep: Sweep, rng: random.Random, length_s: float, findings: Findings) -> bool:
    """Start it once and kill it; False when it had ended by then."""
    starting = rng.random() < 0.25
    process = sweep.start()
    if starting:
        _wait_for_a_worker(sweep, process)
        moment_s = rng.uniform(0.0, 0.1)
    else:
        moment_s = rng.uniform(0.0, length_s)
    try:
        process.wait(moment_s)
        return False
    except subprocess.TimeoutExpired:
        before = _lines(sweep)
    process.kill()
    process.wait()
    findings.kills += 1
    findings.starting += starting
    path = sweep.file()
    data = path.read_bytes() if path else b""
    findings.cut += bool(data) and not data.endswith(b"\n")
    written = {case for case, _ in _cases(data)}
    findings.before_header += not written
    if missing := sweep.announced() - written:
        findings.wrong.append(f"kill {findings.kills}: {', '.join(sorted(missing))} was announced and is not on disk")
    if not data.startswith(before):
        findings.wrong.append(f"kill {findings.kills}: lines that were on disk have changed")
    findings.longest_worker_s = max(findings.longest_worker_s, _gone(sweep, findings))
    return b'{"record": "footer"' not in data


def _wait_for_a_worker(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        if any("vlmqual_contract.worker" in other.cmdline() for other in _children(process.pid)):
            return
        time.sleep(0.005)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def _gone(sweep: Sweep, findings: Findings) -> float:
    """Seconds until no process of the sweep is left."""
    began = time.monotonic()
    while left := sweep.processes():
        if time.monotonic() - began > GONE_S:
            findings.wrong.append(f"kill {findings.kills}: {len(left)} processes live on: {left[0].cmdline()}")
            for process in left:
                process.kill()
            break
        time.sleep(0.05)
    return time.monotonic() - began


def _lines(sweep: Sweep) -> bytes:
    """The whole lines that are on disk."""
    path = sweep.file()
    data = path.read_bytes() if path else b""
    return data[: data.rfind(b"\n") + 1]


def _cases(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["record"] == "measurement":
            yield row["case"], row


def _twice(path: Path) -> list[str]:
    cases = [case for case, _ in _cases(path.read_bytes())]
    twice = sorted({case for case in cases if cases.count(case) > 1})
    return [f"{path}: {', '.join(twice)} has more than one row"] if twice else []


# comparison ----------------------------------------------------------------------------------------------------------


def differences(one: Run, other: Run) -> list[str]:
    """What tells two runs apart besides what a clock says; rows are compared by case, whatever their order."""
    found = []
    if not other.complete:
        found.append(f"{other.path} is not complete")
    if one.header.identity() != other.header.identity():
        found.append(f"{other.path}: another identity than {one.path}")
    rows = [{row.case: timeless(row) for row in run.measurements} for run in (one, other)]
    if rows[0].keys() != rows[1].keys():
        found.append(f"{other.path}: other cells: {sorted(rows[0].keys() ^ rows[1].keys())}")
    for case in sorted(rows[0].keys() & rows[1].keys()):
        keys = sorted(key for key in rows[0][case] if rows[0][case][key] != rows[1][case].get(key))
        if keys or rows[0][case].keys() != rows[1][case].keys():
            found.append(f"{other.path}: {case} differs in {', '.join(keys) or 'its keys'}")
    return found


def timeless(row: Measurement) -> dict[str, Any]:
    """A row without what a clock decides: values, when they began, the verdict on their spread."""
    kept = {key: value for key, value in asdict(row).items() if not key.endswith("_s")}
    state, reason = ("failed", row.reason) if row.state == "failed" else ("measured", "")
    checks = {key: _shape(value) for key, value in row.checks.items() if key not in TIMED}
    return {**kept, "state": state, "reason": reason, "checks": checks}


def _shape(value: object) -> object:
    """Data without its fractions: shares of a ceiling are times too."""
    if isinstance(value, Mapping):
        return {key: _shape(item) for key, item in value.items()}
    return "a fraction" if isinstance(value, float) else value


def report(results: Path) -> str:
    """The Markdown report of a folder of results, without numbers and without what they decide."""
    page = results.parent / "page.html"
    command = [sys.executable, "-m", "vlmqual_contract.cli", "report", str(results), "--output", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"the report of {results} ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    text = page.with_suffix(".md").read_text("utf-8").replace(str(results.parent), "")
    text = re.sub(r"\S+\.jsonl", "file", text)
    text = re.sub(rf"^- perf: .*({_DOUBTS}).*$", "- perf: states", text, flags=re.MULTILINE)
    text = re.sub(rf"\| \S+ ({_DOUBTS})(: [^|\n]*)? *\|$", "| state |", text, flags=re.MULTILINE)
    text = re.sub(r"\d[\d.,:]*(e[+-]\d+)?|\N{EN DASH}", "0", text)
    # Percentiles and intervals need so many values, and how many a short cell has is the clock's too.
    return re.sub(r" \(0 to 0\)| emulated(?= \|)", "", text)


def _different(one: str, other: str) -> list[str]:
    lines = [text.splitlines() for text in (one, other)]
    return sorted(set(lines[0]) ^ set(lines[1]))[:6]


if __name__ == "__main__":
    sys.exit(main())
