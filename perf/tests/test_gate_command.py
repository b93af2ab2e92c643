from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from vlmqual_contract import cli, machine
from vlmqual_contract.discovery import parse
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE
from vlmqual_contract.records import Header, Measurement, Writer
from vlmqual_contract.target import Capability, Info
from vlmqual_perf import baselines, gate_plan, gate_report, gate_run
from vlmqual_perf.gate_forecast import forecast, forecast_unpaired
from vlmqual_perf.gate_journal import Journal
from vlmqual_perf.gate_launches import Arm, Launch, Reading, Settings, launch
from vlmqual_perf.plan import Cell

INFO = Info(
    name="truth",
    version="1",
    device="clock",
    runtime="sleep",
    dtype="float32",
    capabilities=frozenset({Capability.PREPROCESS, Capability.VISION}),
    families=("idefics", "idefics3", "mllama"),
    processes="one",
)
SAME = ("--baseline", "fake:ms=4")
SLOWER = (*SAME, "--candidate", "fake:ms=4.4")


class Launches:
    """Stands for real launches: a launch's time is its target's `ms` with 0.5 % of noise."""

    def __init__(self):
        self.made: list[Launch] = []
        self.stop_after = math.inf

    def __call__(self, arm, tp, block, place, cells, settings):
        if len(self.made) >= self.stop_after:
            raise KeyboardInterrupt
        options = parse(arm.target).options
        readings = {}
        for cell in cells:
            seed = zlib.crc32(f"{arm.name} {tp} {block} {place} {cell.case}".encode())
            noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(8)
            slow = 1.3 if options.get("only") == cell.phase else 1.0
            times = 1e-3 * float(options["ms"]) * slow * np.exp(0.005 * noise[0] + 0.005 * noise[1:])
            state, _, often = options.get("state", "valid-0").rpartition("-")
            bad = int(often) and (2 * block + place // 2) % int(often) == 0
            readings[cell.case] = Reading(
                state if bad else "valid",
                "as it was told" if bad else "",
                tuple((float(value),) for value in times),
                options.get("tokens", "same"),
            )
        self.made.append(Launch(arm.name, tp, block, place, "2026-01-01T00:00:00+00:00", 0.25, readings))
        return self.made[-1]


@pytest.fixture
def launches(monkeypatch):
    fake = Launches()
    monkeypatch.setattr(gate_run, "launch", fake)
    monkeypatch.setattr(gate_plan, "check", lambda *_: INFO)
    monkeypatch.setattr(gate_report, "forecast", partial(forecast, runs=100))
    monkeypatch.setattr(gate_report, "forecast_unpaired", partial(forecast_unpaired, runs=100))
    return fake


def gate(tmp_path, *arguments):
    scope = ("--suite", "idefics3-photo", "--phases", "prefill,decode", "--threads", "1")
    return cli.main(["gate", *scope, "--results", str(tmp_path / "results"), *arguments])


def written(tmp_path):
    found = json.loads((tmp_path / "results" / "gate.json").read_text())
    return found, {cell["case"].split("/")[1]: cell for cell in found["cells"]}


def test_a_slower_candidate_is_regressed_in_every_cell_and_fails(tmp_path, launches, capsys):
    assert gate(tmp_path, *SLOWER) == EXIT_FAILED
    whole, cells = written(tmp_path)
    assert {cell["verdict"] for cell in cells.values()} == {"regressed"}
    assert all(cell["low"] < 0.1 < cell["high"] for cell in cells.values()), "4.4 ms are 10 % more than 4 ms"
    assert whole["exit"] == EXIT_FAILED
    text = capsys.readouterr().out
    assert "2 regressed" in text
    assert max(map(len, text.splitlines()[:-1])) <= 80, "it has to be readable on 80 columns"


def test_arms_are_launched_in_blocks_and_no_longer_than_needed(tmp_path, launches):
    assert gate(tmp_path, *SAME) == EXIT_OK
    _, cells = written(tmp_path)
    assert {cell["verdict"] for cell in cells.values()} == {"unchanged"}
    arms = "".join(one.arm for one in launches.made)
    blocks = [arms[index : index + 4] for index in range(0, len(arms), 4)]
    assert set(blocks) == {"ABBA", "BAAB"}
    assert 3 <= len(blocks) < 10, "a clear case is decided before the last block"
    assert (arms.count("A"), arms.count("B")) == (2 * len(blocks), 2 * len(blocks))


def test_the_result_holds_the_value_of_every_launch(tmp_path, launches):
    gate(tmp_path, *SLOWER)
    _, cells = written(tmp_path)
    for phase, cell in cells.items():
        for row, one in zip(cell["launches"], launches.made, strict=False):
            values = [value for steps in one.cells[f"idefics3-photo/{phase}/tp1"].values_s for value in steps]
            assert row["median_s"] == pytest.approx(float(np.median(values)), rel=1e-12)
            assert (row["arm"], row["block"], row["place"]) == (one.arm, one.block, one.place)


def test_cells_are_judged_one_by_one_and_a_decided_one_is_measured_no_more(tmp_path, launches):
    assert gate(tmp_path, *SAME, "--candidate", "fake:ms=4,only=decode", "--margin", "0.5") == EXIT_FAILED
    _, cells = written(tmp_path)
    assert cells["decode"]["verdict"] == "regressed"
    assert cells["prefill"]["verdict"] in ("unchanged", "cannot tell")
    assert len(cells["decode"]["launches"]) == 12, "30 % are seen at the first look"
    assert len(cells["prefill"]["launches"]) == len(launches.made) > 12
    assert all(list(one.cells) == ["idefics3-photo/prefill/tp1"] for one in launches.made[12:])


def test_a_faster_candidate_is_improved_and_passes(tmp_path, launches):
    assert gate(tmp_path, *SAME, "--candidate", "fake:ms=3.6") == EXIT_OK
    assert {cell["verdict"] for cell in written(tmp_path)[1].values()} == {"improved"}


def test_a_wider_margin_makes_a_slowdown_unchanged(tmp_path, launches):
    assert gate(tmp_path, *SAME, "--candidate", "fake:ms=4.08", "--margin", "10") == EXIT_OK
    assert {cell["verdict"] for cell in written(tmp_path)[1].values()} == {"unchanged"}


def test_an_emulated_target_is_marked_wherever_its_figures_are(tmp_path, launches, monkeypatch, capsys):
    monkeypatch.setattr(gate_plan, "check", lambda *_: replace(INFO, emulated=True))
    assert gate(tmp_path, *SLOWER) == EXIT_FAILED
    text = capsys.readouterr().out
    assert "rehearsal with an emulated target" in text
    assert "2 regressed (rehearsal)" in text
    assert written(tmp_path)[0]["rehearsal"] is True


def test_an_emulated_target_is_refused_unless_rehearsed(tmp_path, capsys):
    assert gate(tmp_path, "--baseline", "truth") == EXIT_USAGE
    assert "is emulated: its latency says nothing about a device" in capsys.readouterr().err


def test_undecided_cells_pass_unless_strict(tmp_path, launches):
    narrow = ("--margin", "0.05", "--max-launches", "6")
    assert gate(tmp_path, *SAME, *narrow) == EXIT_OK
    cells = written(tmp_path)[1]
    assert {cell["verdict"] for cell in cells.values()} == {"cannot tell"}
    assert "the change may be anything from" in cells["decode"]["reason"]
    assert gate(tmp_path, *SAME, *narrow, "--strict") == EXIT_FAILED


def test_launches_that_are_not_valid_are_named_and_do_not_count(tmp_path, launches, capsys):
    gate(tmp_path, *SAME, "--candidate", "fake:ms=4,state=throttled-4")
    _, cells = written(tmp_path)
    lost = [row for row in cells["decode"]["launches"] if row["state"] == "throttled"]
    assert {row["arm"] for row in lost} == {"B"}
    assert all(row["median_s"] is None and row["reason"] == "as it was told" for row in lost)
    assert len(cells["decode"]["excluded"]) == len(lost) > 0
    assert cells["decode"]["pairs"] == len(cells["decode"]["launches"]) / 2 - len(lost)
    assert "did not count" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["failed", "not-steady", "wrong-bucket"])
def test_a_cell_whose_launches_keep_failing_is_given_up_and_the_gate_is_incomplete(tmp_path, launches, state):
    assert gate(tmp_path, *SAME, "--candidate", f"fake:ms=4,state={state}-1") == EXIT_INCOMPLETE
    cells = written(tmp_path)[1]
    assert {cell["verdict"] for cell in cells.values()} == {"cannot tell"}
    assert "most launches of an arm failed or are not valid" in cells["decode"]["reason"]
    assert len(launches.made) == 12, "three blocks show it"


@pytest.mark.parametrize("state", ["noisy", "too-few"])
def test_noisy_launches_count(tmp_path, launches, state):
    assert gate(tmp_path, *SLOWER[:-1], f"fake:ms=4.4,state={state}-1") == EXIT_FAILED


def test_other_tokens_are_said(tmp_path, launches, capsys):
    gate(tmp_path, *SAME, "--candidate", "fake:ms=4,tokens=other")
    assert "the arms generated different tokens" in capsys.readouterr().out


def test_an_interrupted_gate_goes_on_and_ends_as_if_it_had_not_been(tmp_path, launches, capsys):
    gate(tmp_path / "whole", *SLOWER)
    whole = [(one.arm, one.block, one.place) for one in launches.made]
    launches.made.clear()
    launches.stop_after = 5
    assert gate(tmp_path, *SLOWER) == EXIT_INCOMPLETE
    assert "the same command goes on after 5 launches" in capsys.readouterr().out
    assert not (tmp_path / "results" / "gate.json").exists()
    launches.stop_after = math.inf
    assert gate(tmp_path, *SLOWER) == EXIT_FAILED
    assert "5 launches made before are kept" in capsys.readouterr().out
    assert [(one.arm, one.block, one.place) for one in launches.made] == whole
    assert written(tmp_path)[1] == written(tmp_path / "whole")[1]


def test_a_finished_gate_is_not_continued_and_other_arguments_are_another_gate(tmp_path, launches):
    gate(tmp_path, *SLOWER)
    made = len(launches.made)
    gate(tmp_path, *SLOWER)
    assert len(launches.made) == 2 * made, "the same command measures again"
    launches.stop_after = len(launches.made) + 5
    gate(tmp_path, *SLOWER)
    launches.stop_after = math.inf
    before = len(launches.made)
    gate(tmp_path, *SLOWER, "--margin", "2")
    assert len(launches.made) - before >= 12, "launches of a gate with another margin are not taken over"


def test_a_line_that_was_cut_off_is_made_again(tmp_path, launches):
    launches.stop_after = 5
    gate(tmp_path, *SLOWER)
    (path,) = (tmp_path / "results").glob("*.launches")
    path.write_bytes(path.read_bytes()[:-20])
    launches.stop_after = math.inf
    assert gate(tmp_path, *SLOWER) == EXIT_FAILED
    keys = [(one.block, one.place) for one in launches.made]
    assert keys[4] == keys[5] == (1, 0), "the launch whose line was cut off was made again, the others were not"
    assert keys[:4] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["block"], row["place"]) for row in rows[1:-1]] == [*keys[:4], *keys[5:]], "no half line may be left"


def test_two_gates_do_not_write_one_journal(tmp_path, launches, capsys):
    launches.stop_after = 1
    gate(tmp_path, *SLOWER)
    (path,) = (tmp_path / "results").glob("*.launches")
    plan = json.loads(path.read_text().splitlines()[0])["plan"]
    other = Journal(tmp_path / "results", plan)
    assert other.path == path
    assert gate(tmp_path, *SLOWER) == EXIT_USAGE
    assert "being written by another gate" in capsys.readouterr().err
    other.close()


def test_a_dry_run_says_what_could_be_seen_and_launches_nothing(tmp_path, launches, capsys):
    assert gate(tmp_path, *SLOWER, "--dry-run") == EXIT_OK
    assert not launches.made
    assert not (tmp_path / "results").exists()
    text = capsys.readouterr().out
    assert "is called regressed in 99 of 100 gates if all cells slow down" in text
    assert "assumed: 1 % between launches, 2 % between repetitions" in " ".join(text.split())
    quiet = float(text.split("+")[1].split(" %")[0])
    assert gate(tmp_path, *SLOWER, "--dry-run", "--noise", "3,6") == EXIT_OK
    assert float(capsys.readouterr().out.split("+")[1].split(" %")[0]) > 2 * quiet


def test_the_noise_of_an_earlier_gate_makes_the_next_forecast(tmp_path, launches, capsys):
    gate(tmp_path, *SLOWER)
    spreads = [cell["noise"] / 2**0.5 for cell in written(tmp_path)[1].values()]
    capsys.readouterr()
    assert gate(tmp_path, *SLOWER, "--dry-run", "--noise", str(tmp_path / "results" / "gate.json")) == EXIT_OK
    assert f"predicted for a noise of {100 * float(np.median(spreads)):.2g} % of a launch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-launches", "7"], "--max-launches 7"),
        (["--max-launches", "4"], "at least 6"),
        (["--margin", "0"], "--margin 0.0 is not positive"),
        (["--margin", "100"], "--margin 100"),
        (["--tp", "one"], "no list of numbers"),
        (["--phases", "dream"], "phase 'dream' is unknown"),
        (["--noise", "much"], "--noise 'much'"),
        (["--noise", "0,0"], "--noise '0,0'"),
        (["--noise", "nowhere.json"], "nowhere.json"),
        (["--baseline", "nowhere.json"], "nowhere.json does not exist"),
        (["--checkpoint", "nowhere"], "no config.json"),
        (["--session-noise", "-1"], "--session-noise -1"),
        (["--repeats", "0"], "--repeats 0"),
        (["--trust", "key"], "--trust key is for recorded launches"),
        (["--sign", "key"], "--sign is for --save-baseline"),
        (["--save-baseline", "x.json", "--candidate", "truth"], "takes no candidate"),
        (["--save-baseline", "x.txt"], "ends with .json"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, capsys, launches, arguments, sentence):
    assert gate(tmp_path, *SAME, *arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


# recorded launches ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, launches):
    path = tmp_path / "main.json"
    assert gate(tmp_path, *SAME, "--save-baseline", str(path)) == EXIT_OK
    launches.made.clear()
    return path


def test_launches_of_a_baseline_that_do_not_count_are_said(tmp_path, launches, capsys):
    path = tmp_path / "flaky.json"
    arguments = ("--save-baseline", str(path), "--max-launches", "8")
    assert gate(tmp_path, "--baseline", "fake:ms=4,state=failed-8", *arguments) == EXIT_OK
    assert "decode/tp1: 6 of 8 launches count" in capsys.readouterr().out
    assert gate(tmp_path, "--baseline", "fake:ms=4,state=failed-4", *arguments) == EXIT_INCOMPLETE
    version = baselines.read(path).version
    assert gate(tmp_path, "--baseline", "fake:ms=4,state=failed-1", *arguments) == EXIT_FAILED
    assert "no reading of 6 launches counts, the last: as it was told" in capsys.readouterr().err
    assert baselines.read(path).version == version, "what does not count replaces no baseline"


def test_a_baseline_file_is_compared_unpaired_and_says_so(tmp_path, launches, saved, capsys):
    assert gate(tmp_path, "--baseline", str(saved), "--candidate", "fake:ms=4.8") == EXIT_FAILED
    whole, cells = written(tmp_path)
    assert {one.arm for one in launches.made} == {"B"}, "the baseline is not launched again"
    assert whole["paired"] is False
    assert {cell["verdict"] for cell in cells.values()} == {"regressed"}
    assert "unpaired" in capsys.readouterr().out


def test_without_a_candidate_the_recorded_target_is_launched_again(tmp_path, launches, saved):
    assert gate(tmp_path, "--baseline", str(saved), "--margin", "12") == EXIT_OK
    assert {cell["verdict"] for cell in written(tmp_path)[1].values()} == {"unchanged"}
    assert {one.arm for one in launches.made} == {"B"}


def test_a_change_that_sessions_may_make_is_no_regression_of_recorded_launches(tmp_path, launches, saved):
    arguments = ("--baseline", str(saved), "--candidate", "fake:ms=4.1")
    assert gate(tmp_path, *arguments) == EXIT_OK
    assert {cell["verdict"] for cell in written(tmp_path)[1].values()} == {"cannot tell"}
    assert gate(tmp_path, *arguments, "--session-noise", "0", "--margin", "0.5") == EXIT_FAILED


def test_two_recordings_are_compared_without_a_launch(tmp_path, launches, saved):
    other = tmp_path / "other.json"
    assert gate(tmp_path, "--baseline", "fake:ms=5", "--save-baseline", str(other)) == EXIT_OK
    launches.made.clear()
    assert gate(tmp_path, "--baseline", str(saved), "--candidate", str(other)) == EXIT_FAILED
    assert gate(tmp_path, "--baseline", str(other), "--candidate", str(saved)) == EXIT_OK
    assert {cell["verdict"] for cell in written(tmp_path)[1].values()} == {"improved"}
    assert not launches.made
    assert gate(tmp_path, *SAME, "--candidate", str(saved)) == EXIT_USAGE


def test_another_machine_is_refused_unless_it_is_allowed_and_then_said(tmp_path, launches, saved, monkeypatch, capsys):
    here = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: {**here, "processor": "another one", "governor": "slow"})
    arguments = ("--baseline", str(saved), "--candidate", "fake:ms=4.8")
    assert gate(tmp_path, *arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "the machines differ" in error
    assert "another one" in error
    assert not launches.made
    assert gate(tmp_path, *arguments, "--allow-different-machine") == EXIT_FAILED
    differs = written(tmp_path)[0]["differs"]
    assert any("processor" in line and "another one" in line for line in differs)
    assert any("governor" in line for line in differs), "what is no reason to refuse is said all the same"


def test_a_baseline_of_other_fixtures_or_threads_is_refused(tmp_path, launches, saved, capsys):
    assert (
        gate(tmp_path, "--baseline", str(saved), *SAME[:0], "--candidate", "fake:ms=4", "--threads", "2") == EXIT_USAGE
    )
    assert "ran with 1 threads" in capsys.readouterr().err
    document = json.loads(saved.read_text())
    document["fixtures"] = "0" * 64
    content = {key: value for key, value in document.items() if key not in ("digest", "signature")}
    saved.write_text(json.dumps({**content, "digest": baselines._digest(content)}))
    assert gate(tmp_path, "--baseline", str(saved), "--candidate", "fake:ms=4") == EXIT_USAGE
    assert "different fixtures" in capsys.readouterr().err


def test_results_of_perf_are_one_launch_each(tmp_path, launches, capsys):
    folder = tmp_path / "perf"
    for index in range(8):
        header = Header("perf", "fake", "1", {}, machine.describe(), "", {"fixtures": gate_plan.fixtures.digest()})
        with Writer.start(folder, header, fresh=True) as writer:
            for phase in ("prefill", "decode"):
                cell = (f"idefics3-photo/{phase}/tp1", "idefics3-photo", "idefics3", phase, 1, 1, "float32", {})
                writer.add(Measurement(*cell, values_s=((0.004 + 1e-5 * index,),) * 5))
    assert gate(tmp_path, "--baseline", str(folder), "--candidate", "fake:ms=5") == EXIT_FAILED
    cells = written(tmp_path)[1]
    assert sum(row["arm"] == "A" for row in cells["decode"]["launches"]) == 8
    one = sorted(folder.glob("*.jsonl"))[0]
    assert gate(tmp_path, "--baseline", str(one), "--candidate", "fake:ms=5") == EXIT_OK
    assert "the baseline has 1 launches that count" in written(tmp_path)[1]["decode"]["reason"]
    assert gate(tmp_path, "--baseline", str(folder), "--candidate", "fake:ms=5", "--trust", "key.pub") == EXIT_USAGE


# real launches -------------------------------------------------------------------------------------------------------


def truth_cells():
    scenarios = gate_plan.load_catalogue(gate_plan.fixtures.file("scenarios.toml")).scenarios
    return [Cell(scenarios["idefics3-photo"], phase, 1) for phase in ("prefill", "decode")]


def test_a_real_launch_measures_what_its_target_takes(tmp_path):
    made = launch(Arm("B", "truth:prefill_ms=2,step_ms=1"), 1, 3, 2, truth_cells(), Settings(1, repeats=5, cell_s=0.1))
    assert (made.arm, made.block, made.place) == ("B", 3, 2)
    for phase, least in (("prefill", 0.002), ("decode", 0.001)):
        values = made.cells[f"idefics3-photo/{phase}/tp1"].values_s
        assert len(values) >= 5
        assert min(value for steps in values for value in steps) >= least
    assert made.cells["idefics3-photo/decode/tp1"].tokens_digest


def test_a_launch_that_cannot_be_made_is_kept_with_its_reason():
    made = launch(Arm("A", "truth:step_ms=minus"), 1, 0, 0, truth_cells(), Settings(1))
    assert {one.state for one in made.cells.values()} == {"failed"}
    assert all("the launch failed" in one.reason for one in made.cells.values())
    assert Launch.from_plain(json.loads(json.dumps(made.plain()))) == made


def test_a_killed_gate_keeps_every_finished_launch(tmp_path):
    results = tmp_path / "results"
    arguments = ["gate", "--rehearse", "--baseline", "truth:step_ms=1", "--suite", "idefics3-photo"]
    arguments += ["--phases", "prefill", "--cell-seconds", "0.05", "--results", str(results)]
    command = [sys.executable, "-m", "vlmqual_contract.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ})
    deadline, lines = time.monotonic() + 60, 0
    while time.monotonic() < deadline and lines < 3:
        lines = sum(path.read_bytes().count(b"\n") for path in results.glob("*.launches"))
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = results.glob("*.launches")
    plan, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    journal = Journal(results, plan["plan"])
    assert journal.path == path
    assert [one.plain() for one in journal.launches] == [Launch.from_plain(row).plain() for row in rows]
    assert len(journal.launches) >= 2
    journal.close()
