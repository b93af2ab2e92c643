from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from truth_target import SECONDS

from vlmqual_contract import cli
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE
from vlmqual_contract.records import runs

TRUTH = f"{Path(__file__).with_name('truth_target.py')}:Truth"
QUICK = ["--suite", "idefics3-photo", "--repeats", "5", "--cell-seconds", "0.05"]


def perf(tmp_path, *arguments, target=TRUTH):
    return cli.main(["perf", "--target", target, "--results", str(tmp_path / "results"), *QUICK, *arguments])


def rows(tmp_path):
    (run,) = runs(tmp_path / "results")
    return run, {row.case.removeprefix("idefics3-photo/"): row for row in run.measurements}


def test_every_phase_takes_at_least_the_time_that_its_work_takes(tmp_path):
    assert perf(tmp_path) == EXIT_OK
    run, found = rows(tmp_path)
    assert run.complete
    phases = ("load", "first-call", "preprocess", "vision", "prefill", "decode", "ttft")
    assert set(found) == {f"{phase}/tp1" for phase in phases}
    whole = SECONDS["preprocess"] + SECONDS["vision"] + SECONDS["prefill"]
    for phase, least in {**SECONDS, "ttft": whole}.items():
        values = [value for steps in found[f"{phase}/tp1"].values_s for value in steps]
        assert min(values) >= least, f"{phase} was measured shorter than it slept: work was left outside the interval"


def test_measured_values_are_what_the_target_wrote_down_itself(tmp_path):
    log = tmp_path / "log"
    assert perf(tmp_path, "--phases", "decode", target=f"{TRUTH}:log={log}") == EXIT_OK
    _, found = rows(tmp_path)
    slept = [row["seconds"] for row in map(json.loads, log.read_text().splitlines()) if row["phase"] == "decode"]
    cell = found["decode/tp1"]
    steps = [value for steps in (*cell.warmup_s, *cell.values_s) for value in steps]
    assert len(steps) == len(slept), "every decode step of the target is one recorded value, warm-up included"
    outside = np.array(steps) - np.array(slept)
    assert (outside >= 0).all(), "an interval cannot be shorter than the sleep inside it"


def test_the_slowest_rank_is_the_value_of_a_step(tmp_path):
    assert perf(tmp_path, "--tp", "1,2", "--phases", "prefill,decode", "--threads", "1") == EXIT_OK
    _, found = rows(tmp_path)
    for phase in ("prefill", "decode"):
        row = found[f"{phase}/tp2"]
        assert min(min(steps) for steps in row.values_s) >= 3 * SECONDS[phase], "rank 1 takes three times as long"
        assert row.checks["processes"] == 2
        assert row.checks["threads"] == found[f"{phase}/tp1"].checks["threads"] == 1
        assert row.checks["tp1_tokens_equal"]
        assert row.checks["tp1_error"] <= row.checks["tp1_budget"]
        assert row.tokens_digest == found[f"{phase}/tp1"].tokens_digest != ""


@pytest.mark.parametrize(("bad", "sentence"), [("logits", "from TP=1's"), ("tokens", "TP=1's")])
def test_a_split_that_computes_something_else_fails_its_cells(tmp_path, capsys, bad, sentence):
    assert perf(tmp_path, "--tp", "1,2", "--phases", "decode", target=f"{TRUTH}:bad={bad}") == EXIT_FAILED
    _, found = rows(tmp_path)
    assert found["decode/tp1"].state != "failed"
    assert found["decode/tp2"].state == "failed"
    assert sentence in found["decode/tp2"].reason
    assert "FAILED" in capsys.readouterr().out


def test_an_impossible_size_fails_its_cells_with_the_targets_sentence_and_the_others_are_measured(tmp_path, capsys):
    assert perf(tmp_path, "--tp", "1,3", "--phases", "prefill") == EXIT_FAILED
    run, found = rows(tmp_path)
    assert run.complete
    assert found["prefill/tp1"].state != "failed"
    assert found["prefill/tp3"].state == "failed"
    assert found["prefill/tp3"].reason == "text_config: 8 attention heads do not divide by 3 ranks"
    assert found["prefill/tp3"].dtype == found["prefill/tp1"].dtype, "a reader groups cells by dtype"
    assert "heads % 3" in capsys.readouterr().out


def test_a_run_of_which_nothing_is_possible_is_refused_with_the_targets_sentence(tmp_path, capsys):
    assert perf(tmp_path, "--tp", "3") == EXIT_USAGE
    assert "8 attention heads do not divide by 3" in capsys.readouterr().err
    assert not (tmp_path / "results").exists(), "nothing may be measured"


def test_tokens_that_change_between_repetitions_fail_the_cell(tmp_path):
    assert perf(tmp_path, "--phases", "decode", target=f"{TRUTH}:bad=unsteady-tokens") == EXIT_FAILED
    _, found = rows(tmp_path)
    assert "different tokens" in found["decode/tp1"].reason


def test_a_device_that_gets_slower_and_slower_is_not_steady(tmp_path):
    assert perf(tmp_path, "--phases", "prefill", target=f"{TRUTH}:bad=drift") == EXIT_OK
    _, found = rows(tmp_path)
    assert found["prefill/tp1"].state == "not-steady"


def test_a_crash_fails_its_cells_and_the_others_are_measured(tmp_path):
    assert perf(tmp_path, target=f"{TRUTH}:bad=crash") == EXIT_FAILED
    run, found = rows(tmp_path)
    assert run.complete, "a failed cell is a result, not a gap"
    assert {name for name, row in found.items() if row.state == "failed"} == {
        f"{phase}/tp1" for phase in ("first-call", "prefill", "decode", "ttft")
    }
    assert "exit status 9" in found["prefill/tp1"].reason


def test_larger_sizes_fail_when_the_smallest_gives_nothing_to_compare_with(tmp_path):
    assert perf(tmp_path, "--tp", "1,2", "--phases", "prefill", target=f"{TRUTH}:bad=crash1") == EXIT_FAILED
    run, found = rows(tmp_path)
    assert run.complete
    assert found["prefill/tp2"].state == "failed"
    assert "cannot be compared with TP=1" in found["prefill/tp2"].reason
    assert found["prefill/tp2"].values_s, "what was measured is kept although it could not be judged"


@pytest.mark.parametrize("bad", ["nan64", "only32"])
def test_a_target_without_a_second_dtype_is_judged_by_the_goldens_noise(tmp_path, bad):
    assert perf(tmp_path, "--tp", "1,2", "--phases", "decode", target=f"{TRUTH}:bad={bad}") == EXIT_OK
    _, found = rows(tmp_path)
    checks = found["decode/tp2"].checks
    assert 0 < checks["tp1_budget"] < 1e-4
    assert "goldens" in checks["tp1_budget_source"]


def test_a_size_that_nothing_can_be_compared_with_is_never_valid(tmp_path):
    checkpoint = tmp_path / "own"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"image_token_id": 598}')
    arguments = ("--tp", "1,2", "--phases", "decode", "--checkpoint", str(checkpoint))
    assert perf(tmp_path, *arguments, target=f"{TRUTH}:bad=only32") == EXIT_FAILED
    _, found = rows(tmp_path)
    assert found["decode/tp2"].state == "failed"
    assert "no budget could be derived" in found["decode/tp2"].reason
    assert found["decode/tp2"].values_s, "what was measured is kept"


def test_a_request_that_the_target_refuses_fails_its_cells_only(tmp_path):
    assert perf(tmp_path, "--phases", "preprocess,decode", target=f"{TRUTH}:bad=refuse") == EXIT_FAILED
    run, found = rows(tmp_path)
    assert run.complete
    assert found["preprocess/tp1"].state != "failed"
    assert "too long for the truth" in found["decode/tp1"].reason


def test_other_code_does_not_continue_a_run(tmp_path):
    adapter = tmp_path / "mine.py"
    adapter.write_text(Path(TRUTH.rpartition(":")[0]).read_text())
    assert perf(tmp_path, "--phases", "preprocess", target=f"{adapter}:Truth") == EXIT_OK
    (run,) = runs(tmp_path / "results")
    lines = run.path.read_text().splitlines()
    run.path.write_text("\n".join(lines[:-1]) + "\n")  # without its footer it is unfinished
    adapter.write_text(adapter.read_text() + "\n# another version\n")
    assert perf(tmp_path, "--phases", "preprocess", target=f"{adapter}:Truth") == EXIT_OK
    assert len(list(runs(tmp_path / "results"))) == 2, "rows of other code must not be kept as this code's"


def test_a_prompt_longer_than_the_usual_cache_gets_a_larger_one(tmp_path):
    assert perf(tmp_path, "--phases", "decode", target=f"{TRUTH}:bad=long") == EXIT_OK
    _, found = rows(tmp_path)
    assert found["decode/tp1"].shape["prompt_tokens"] == 2400


def test_a_time_limit_is_for_one_repetition_not_for_several(tmp_path):
    assert perf(tmp_path, "--phases", "decode", "--timeout", "1.0", target=f"{TRUTH}:bad=slow") == EXIT_OK
    _, found = rows(tmp_path)
    assert sum(map(sum, found["decode/tp1"].values_s)) > 1.0, "the repetitions together have to outlast the limit"


def test_failed_cells_are_shown_although_pytest_benchmark_has_nothing_to_show(tmp_path, capsys):
    path = tmp_path / "benchmark.json"
    arguments = ("--phases", "prefill", "--benchmark-json", str(path))
    assert perf(tmp_path, *arguments, target=f"{TRUTH}:bad=crash") == EXIT_FAILED
    assert "FAILED idefics3-photo/prefill/tp1" in capsys.readouterr().out
    assert not path.exists()


def test_an_unwritable_benchmark_file_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert perf(tmp_path, "--benchmark-json", str(tmp_path / "file" / "x.json")) == EXIT_USAGE
    assert "--benchmark-json" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_an_emulated_target_is_refused_unless_rehearsed_and_then_marked(tmp_path, capsys):
    assert perf(tmp_path, "--phases", "prefill", target=f"{TRUTH}:bad=emulated") == EXIT_USAGE
    assert "emulated" in capsys.readouterr().err
    assert perf(tmp_path, "--phases", "prefill", "--rehearse", target=f"{TRUTH}:bad=emulated") == EXIT_OK
    run, found = rows(tmp_path)
    assert found["prefill/tp1"].checks["rehearsal"] is True
    assert found["prefill/tp1"].checks["emulated"] is True
    assert run.header.plan["rehearsal"] is True
    assert run.header.info["emulated"] is True


def test_every_figure_of_a_rehearsal_is_marked_where_it_is_printed(tmp_path, capsys):
    assert perf(tmp_path, "--rehearse", target=f"{TRUTH}:bad=emulated") == EXIT_OK
    text = capsys.readouterr().out
    cells = [line for line in text.splitlines() if line.startswith("[")]
    assert len(cells) == 7
    assert all(" ms emulated" in line for line in cells), "a figure is printed without its mark"
    listed = [line for line in text.splitlines() if line.startswith("idefics3-photo ")]
    assert len(listed) == 7
    assert all(line.rstrip().endswith("emulated") for line in listed), "the table shows a figure without its mark"


def test_a_rehearsal_of_a_real_target_is_called_one(tmp_path, capsys):
    assert perf(tmp_path, "--phases", "prefill", "--rehearse") == EXIT_OK
    _, found = rows(tmp_path)
    assert "emulated" not in found["prefill/tp1"].checks
    assert " ms rehearsal" in capsys.readouterr().out


def test_fixed_shapes_tell_their_bucket_padding_and_compile_time(tmp_path, capsys):
    assert perf(tmp_path, target=f"{TRUTH}:bad=fixed") == EXIT_OK
    _, found = rows(tmp_path)
    text = capsys.readouterr().out
    for phase in ("prefill", "ttft"):
        checks = found[f"{phase}/tp1"].checks
        assert (checks["bucket"], checks["asked"], checks["computed"]) == ("b1 c16 x 1", 4, 16)
    assert found["decode/tp1"].checks["bucket"] == "b1"
    assert found["vision/tp1"].checks["bucket"] == "1 x 2"
    assert "bucket" not in found["preprocess/tp1"].checks
    compiled = found["compile/tp1"]
    # see 0.5 + 0.25, read 0 + 0.125, write 1 + 0.0625; the spare one is no part of the request.
    assert compiled.values_s == ((1.9375,),)
    assert (compiled.checks["compile_s"], compiled.checks["load_s"]) == (1.5, 0.4375)
    assert "2 of 3 functions compiled in 1.5 s, all loaded in 0.438 s" in compiled.reason
    prefill, *_ = [
        line.split() for line in text.splitlines() if line.startswith("idefics3-photo ") and "prefill" in line
    ]
    assert prefill[-6:] == ["b1", "c16", "x", "1", "75", "%"]


def test_a_target_of_free_shapes_has_nothing_to_compile(tmp_path, capsys):
    assert perf(tmp_path, "--phases", "compile") == EXIT_USAGE
    assert "has nothing to measure in compile" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_costs_that_cannot_be_true_fail_their_cell(tmp_path):
    assert perf(tmp_path, "--phases", "prefill", target=f"{TRUTH}:bad=fixed-less") == EXIT_FAILED
    _, found = rows(tmp_path)
    assert "computes less than is asked for" in found["prefill/tp1"].reason


def test_several_targets_are_measured_in_one_run_with_a_file_each(tmp_path, capsys):
    other = ["--target", f"{TRUTH}:bad=fixed"]
    assert perf(tmp_path, "--phases", "prefill", *other) == EXIT_OK
    found = {run.header.subject: run for run in runs(tmp_path / "results")}
    assert set(found) == {TRUTH, f"{TRUTH}:bad=fixed"}
    assert all(run.complete for run in found.values())
    assert perf(tmp_path, *other, "--benchmark-json", str(tmp_path / "b.json")) == EXIT_USAGE
    assert "--benchmark-json is for one target; 2 are given" in capsys.readouterr().err


def test_pytest_benchmark_gets_exactly_the_measured_values(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # it would switch pytest-benchmark off
    path = tmp_path / "deep" / "benchmark.json"
    assert perf(tmp_path, "--phases", "prefill,decode", "--benchmark-json", str(path)) == EXIT_OK
    _, found = rows(tmp_path)
    written = {item["extra_info"]["phase"]: item for item in json.loads(path.read_text())["benchmarks"]}
    assert set(written) == {"prefill", "decode"}
    for phase, item in written.items():
        values = [value for steps in found[f"{phase}/tp1"].values_s for value in steps]
        assert item["stats"]["data"] == values
        assert item["stats"]["median"] == pytest.approx(float(np.median(values)), rel=1e-12)
        assert item["stats"]["rounds"] == len(values)
    assert "Outliers" in capsys.readouterr().out, "the table of pytest-benchmark has to be shown"


def test_a_killed_run_goes_on_with_the_cells_that_are_missing(tmp_path):
    arguments = [
        "--results",
        str(tmp_path / "results"),
        "--suite",
        "idefics3-photo",
        "--phases",
        "load,preprocess,decode",
    ]
    command = [sys.executable, "-m", "vlmqual_contract.cli", "perf", "--target", TRUTH, *arguments]
    process = subprocess.Popen([*command, "--cell-seconds", "1"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list(runs(tmp_path / "results", quiet=True)) if (tmp_path / "results").is_dir() else []
        if found and found[0].measurements:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed,) = runs(tmp_path / "results")
    assert not killed.complete
    before = {row.case: row for row in killed.measurements}
    assert before, "the run was killed before its first cell was done"
    again = subprocess.run([*command, "--cell-seconds", "1"], capture_output=True, text=True, check=False)
    assert again.returncode == EXIT_OK, again.stderr
    assert "measured before and are kept" in again.stdout
    (run,) = runs(tmp_path / "results")
    assert run.complete
    assert len(run.measurements) == 3
    for case, row in before.items():
        assert {r.case: r for r in run.measurements}[case] == row, "finished cells must be kept as they were"


def test_an_interrupt_says_how_to_go_on_and_ends_with_its_own_code(tmp_path):
    arguments = ["--results", str(tmp_path / "results"), "--suite", "idefics3-photo", "--cell-seconds", "30"]
    command = [sys.executable, "-m", "vlmqual_contract.cli", "perf", "--target", TRUTH, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "results").glob("*.jsonl")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_INCOMPLETE, err
    assert "the same command goes on" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tp", "one"], "no list of numbers"),
        (["--tp", "0"], "positive"),
        (["--phases", "dream"], "phases are load"),
        (["--phases", ","], "no phase is named"),
        (["--threads", "0"], "--threads 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--cell-seconds", "nan"], "--cell-seconds nan"),
        (["--timeout", "-1"], "--timeout -1"),
        (["--checkpoint", "nowhere"], "no config.json"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, capsys, arguments, sentence):
    assert perf(tmp_path, *arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_dry_run_lists_the_cells_and_opens_no_model(tmp_path, capsys):
    log = tmp_path / "log"
    assert perf(tmp_path, "--tp", "1,2", "--dry-run", target=f"{TRUTH}:log={log},bad=crash") == EXIT_OK
    text = capsys.readouterr().out
    assert "14 cells" in text
    assert "idefics3-photo/decode/tp2" in text
    assert "idefics3-photo, tensor-parallel size 2" in text
    assert not (tmp_path / "results").exists()
    assert not log.exists()
