"""Sweeps: the user's scenarios, time limits, order, sizes, what is said meanwhile and at the end."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from vlmqual_contract import cli, launch
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, OutOfTime
from vlmqual_contract.launch import Allowance, Limits
from vlmqual_contract.records import Measurement, Run, runs
from vlmqual_contract.scenario import load_catalogue
from vlmqual_perf.plan import PHASES, cells

TRUTH = "truth:preprocess_ms=1,vision_ms=1,prefill_ms=1,step_ms=0.2,load_ms=0"
OWN = """
[[suite]]
id = "mine"
tp = [1, 2]

[[scenario]]
id = "photo"
family = "idefics3"
checkpoint = "idefics3-tiny"
prompt = "<image>What?"
images = ["picture.png"]
new_tokens = 2
suites = ["mine"]

[[scenario]]
id = "text"
base = "photo"
prompt = "What?"
images = []
batch = 4
suites = ["mine"]
"""


def own(tmp_path: Path, text: str = OWN) -> Path:
    (tmp_path / "picture.png").write_bytes(b"")
    path = tmp_path / "requests.toml"
    path.write_text(text)
    return path


def sweep(tmp_path: Path, *arguments: str, target: str = TRUTH, text: str = OWN, results: str = "results") -> int:
    command = ["perf", "--scenarios", str(own(tmp_path, text)), "--suite", "mine", "--target", target, "--rehearse"]
    command += ["--results", str(tmp_path / results), "--repeats", "3", "--cell-seconds", "0.01", "--threads", "1"]
    return cli.main([*command, *arguments])


def rows(tmp_path: Path, results: str = "results") -> tuple[Run, dict[str, Measurement]]:
    (run,) = runs(tmp_path / results)
    return run, {row.case: row for row in run.measurements}


def test_an_own_file_is_swept_over_its_suites_sizes_and_ends_in_a_table_of_speedups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    scenarios = list(load_catalogue(own(tmp_path), own=True).scenarios.values())
    seed = next(n for n in range(99) if cells(scenarios, ["prefill"], [1, 2], seed=n)[0].scenario.id == "text")
    assert sweep(tmp_path, "--repeats", "5", "--phases", "prefill,decode", "--seed", str(seed)) == EXIT_OK
    run, found = rows(tmp_path)
    assert run.complete
    cases = product(("photo", "text"), ("prefill", "decode"), (1, 2))
    assert set(found) == {f"{scenario}/{phase}/tp{tp}" for scenario, phase, tp in cases}
    text = capsys.readouterr().out
    assert re.search(r"^\[1/8, \d+:\d\d left\] ", text, re.MULTILINE), "a line says what is done and how long it takes"
    table = text.partition("speed-up over TP=1")[2]
    listed = [("photo", "prefill"), ("photo", "decode"), ("text", "prefill"), ("text", "decode")]
    assert re.findall(r"^(photo|text) +(prefill|decode) +2 +\d\.\d\d\?? \[.* % \[", table, re.MULTILINE) == listed
    assert run.measurements[0].scenario == "text", "the order of this run is another than the table's"
    assert "threads of each rank: 1" in table
    assert max(map(len, text.partition("median in ms")[2].splitlines()[:-1])) <= 80


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, text=OWN.replace("picture.png", "nothing.png")) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "requests.toml: photo: images has 'nothing.png'" in error
    assert error.count("\n") == 1


def test_rows_do_not_depend_on_the_order_and_the_seed_is_recorded(tmp_path: Path) -> None:
    orders = {"listed": ["--order", "listed"], "five": ["--seed", "5"], "default": []}
    found, kept = {}, {}
    for name, arguments in orders.items():
        assert sweep(tmp_path, "--tp", "1", *arguments, results=name) == EXIT_OK
        found[name], measured = rows(tmp_path, name)
        kept[name] = {case: (row.shape, row.tokens_digest, row.checks["threads"]) for case, row in measured.items()}
    assert kept["listed"] == kept["five"] == kept["default"]
    scenarios = list(load_catalogue(own(tmp_path), own=True).scenarios.values())
    for name, seed in (("listed", None), ("five", 5), ("default", found["default"].header.plan["seed"])):
        planned = [cell.case for cell in cells(scenarios, PHASES, [1], seed=seed)]
        assert [row.case for row in found[name].measurements] == planned, name
    assert "seed" not in found["listed"].header.plan
    assert found["five"].header.plan["scenario_s"] == {}
    assert found["five"].header.plan["seed"] == 5


def test_a_seed_without_a_random_order_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "--order", "listed", "--seed", "5") == EXIT_USAGE
    assert "--seed 5" in capsys.readouterr().err


def test_a_scenario_over_its_limit_is_stopped_after_a_repetition_and_the_sweep_goes_on(tmp_path: Path) -> None:
    # A repetition of the photo's vision takes 0.1 s; at least nine are needed.
    limited = OWN.replace('images = ["picture.png"]', 'images = ["picture.png"]\ntime_limit_s = 0.35')
    limited = limited.replace("images = []", "images = []\ntime_limit_s = 100")
    arguments = ("--tp", "1", "--phases", "vision,prefill", "--order", "listed")
    target = TRUTH.replace("vision_ms=1", "vision_ms=100")
    assert sweep(tmp_path, *arguments, target=target, text=limited) == EXIT_FAILED
    run, found = rows(tmp_path)
    assert run.complete
    for case in ("photo/vision/tp1", "photo/prefill/tp1"):
        assert found[case].state == "failed"
        assert found[case].reason == "the scenario's time limit of 0.35 s is over"
    assert found["text/prefill/tp1"].state != "failed"


def test_a_call_that_outlasts_the_limit_is_killed_and_the_sweep_goes_on(tmp_path: Path) -> None:
    arguments = ("--tp", "1", "--phases", "vision,prefill", "--order", "listed", "--scenario-timeout", "0.5")
    assert sweep(tmp_path, *arguments, target=TRUTH.replace("vision_ms=1", "vision_ms=60000")) == EXIT_FAILED
    run, found = rows(tmp_path)
    assert run.complete
    assert re.fullmatch(
        r"the scenario's time limit of 0\.5 s is over; no answer to \w+ within .* s", found["photo/vision/tp1"].reason
    )
    assert found["photo/prefill/tp1"].reason == "the scenario's time limit of 0.5 s is over"
    assert found["text/prefill/tp1"].state != "failed"


def test_starting_and_opening_are_not_counted_against_an_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(launch.time, "monotonic", lambda: now)
    limits = Limits(call_s=50, open_s=600, allowance=Allowance())
    assert limits.allowance is not None
    assert limits.of("repeat") == 50, "without end until it is started"
    limits.allowance.start(10)
    now += 4
    assert limits.of("repeat") == 6 + 1, "the last request may end by itself"
    assert limits.of("open") == 600
    now += 500
    assert limits.of("repeat") == 6 + 1
    now += 6
    with pytest.raises(OutOfTime):
        limits.of("repeat")
    limits.allowance.start(None)
    assert limits.of("repeat") == 50


def test_a_run_that_goes_on_opens_models_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    adapter = tmp_path / "noted.py"
    adapter.write_text(
        "from vlmqual_perf.truth import Truth\n"
        "class Noted(Truth):\n"
        "    def open(self, model, options):\n"
        f"        with open({str(tmp_path / 'opened')!r}, 'a') as file:\n"
        "            file.write(f'{options.batch} {options.max_length}\\n')\n"
        "        return super().open(model, options)\n"
    )
    arguments = ("--tp", "1", "--phases", "prefill", "--order", "listed")
    assert sweep(tmp_path, *arguments, target=f"{adapter}:Noted") == EXIT_OK
    run, _ = rows(tmp_path)
    lines = run.path.read_text().splitlines()
    (kept,) = [line for line in lines if '"text/prefill/tp1"' in line]
    run.path.write_text(f"{lines[0]}\n{kept}\n")  # as if it had been killed when only the batch of four was done
    assert sweep(tmp_path, *arguments, target=f"{adapter}:Noted") == EXIT_OK
    assert rows(tmp_path)[0].complete
    assert (tmp_path / "opened").read_text().splitlines() == ["4 2048"] * 2


def test_sizes_that_nobody_asked_for_are_left_out_where_a_target_has_one_device(tmp_path: Path) -> None:
    adapter = tmp_path / "alone.py"
    adapter.write_text(
        "from dataclasses import replace\n"
        "from vlmqual_perf.truth import Truth\n"
        "class Alone(Truth):\n"
        "    def __init__(self, **options):\n"
        "        super().__init__(**options)\n"
        "        self.info = replace(self.info, capabilities=self.info.capabilities - {'tensor-parallel'})\n"
    )
    target = f"{adapter}:Alone"
    assert sweep(tmp_path, "--phases", "prefill", target=target) == EXIT_OK
    assert {row.tp for row in rows(tmp_path)[1].values()} == {1}
    assert sweep(tmp_path, "--phases", "prefill", "--tp", "1,2", target=target, results="asked") == EXIT_FAILED
    found = rows(tmp_path, "asked")[1]
    assert "lacks tensor-parallel" in found["photo/prefill/tp2"].reason
    assert found["photo/prefill/tp1"].state != "failed"


def test_a_dry_run_tells_the_order_and_what_cells_took_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ("--tp", "1,16", "--phases", "prefill,decode", "--seed", "3")
    assert sweep(tmp_path, *arguments, "--dry-run") == EXIT_OK
    text = capsys.readouterr().out
    scenarios = list(load_catalogue(own(tmp_path), own=True).scenarios.values())
    planned = [cell.case for cell in cells(scenarios, ["prefill", "decode"], [1, 16], seed=3)]
    assert re.findall(r"^(\S+/tp\d+) ", text, re.MULTILINE) == planned
    assert "8 cells, 1 threads for each rank; order: random, seed 3; 4 are not possible" in text
    assert "repeat settings" in text
    assert len(re.findall(r"too large", text)) == 4
    assert sweep(tmp_path, *arguments) == EXIT_FAILED
    capsys.readouterr()
    assert sweep(tmp_path, *arguments, "--dry-run") == EXIT_OK
    assert "as they took before" in capsys.readouterr().out
    assert len(list(runs(tmp_path / "results"))) == 1


def test_scenarios_of_another_family_than_the_users_checkpoint_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "mllama"}')
    arguments = ["perf", "--target", TRUTH, "--suite", "smoke", "--dry-run", "--checkpoint", str(tmp_path / "model")]
    assert cli.main(arguments) == EXIT_OK
    text = capsys.readouterr().out
    assert "mllama-photo/decode/tp1" in text
    assert "idefics" not in text
    assert cli.main([*arguments, "--family", "idefics"]) == EXIT_USAGE
    assert "is mllama" in capsys.readouterr().err
