"""Replay files and `vlmqual replay`: a case that failed in a run fails alone, and passes once it is mended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vlmqual_conformance import replays
from vlmqual_contract import cli, fixtures
from vlmqual_contract.discovery import suite_version
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Outcome, Run, Verdict, read

pytestmark = pytest.mark.usefixtures("copied")
TARGETS = Path(__file__).with_name("targets")
DRIFTING, HONEST = f"{TARGETS / 'drifting.py'}:Drifting", f"{TARGETS / 'honest.py'}:Honest"
FEATURES = "test_vision.py::test_image_features_are_within_budget"
SMALL, TILES, BESIDE = (f"{FEATURES}[{name}]" for name in ("photo-small", "photo-tiles", "text-beside-image"))
DOCUMENT = f"{FEATURES}[document]"
VISION = ("--family", "idefics3", "--level", "vision", "--no-library")
KNOWN = f"""
[[failure]]
library = "zoo"
versions = "==1.*"
case = "{DOCUMENT}"
reason = "pages come out too bright"
expires = 2099-01-01
"""


def vlmqual(*arguments: str | Path) -> int:
    return cli.main([str(item) for item in arguments])


def last_run(folder: Path) -> Run:
    return max((read(path) for path in folder.glob("*.jsonl")), key=lambda run: run.path.stat().st_mtime_ns)


def files(results: Path) -> dict[str, Path]:
    """Replay files by the case that they name."""
    return {json.loads(path.read_text())["case"]: path for path in results.glob("replay/*/*.json")}


def lines(text: str) -> dict[str, str]:
    return {line[:13].strip(): line[13:] for line in text.splitlines() if line[:1].strip()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a run with a wrong answer, a crash, a known failure and a pass."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "zoo.toml").write_text(KNOWN)
    chosen = "test_image_features and (photo-small or photo-tiles or text-beside-image or document)"
    arguments = ("--target", f"{DRIFTING}:library=zoo", *VISION, "-k", chosen, "--known", folder / "zoo.toml")
    assert vlmqual("conformance", *arguments, "--results", folder / "results") == 1
    return folder / "results"


# what a run writes -------------------------------------------------------------------------------------------------


def test_every_verdict_that_is_not_as_required_has_a_replay_file_and_names_it(ran):
    rows = {row.case: row for row in last_run(ran).verdicts}
    assert {case: row.outcome for case, row in rows.items()} == {
        SMALL: Outcome.FAIL,
        TILES: Outcome.ERROR,
        DOCUMENT: Outcome.EXPECTED_FAIL,
        BESIDE: Outcome.PASS,
    }
    assert set(files(ran)) == {SMALL, TILES, DOCUMENT}, "what passes has none"
    for case, path in files(ran).items():
        assert ran / rows[case].details["replay"] == path
    assert "replay" not in rows[BESIDE].details


def test_a_replay_file_says_what_was_run_and_what_came_of_it(ran):
    data = json.loads(files(ran)[SMALL].read_text())
    row = next(row for row in last_run(ran).verdicts if row.case == SMALL)
    assert data["requirements"] == list(row.requirements)
    assert (data["kind"], data["subject"], data["python"]) == ("target", f"{DRIFTING}:library=zoo", "")
    assert (data["family"], data["level"], data["dtype"]) == ("idefics3", "vision", "float64")
    assert (data["outcome"], data["component"], data["reason"]) == ("fail", "vision.layers.1", row.reason)
    assert data["worst"] == row.worst > 1
    known = json.loads(files(ran)[DOCUMENT].read_text())
    assert known["observed"].startswith("fail: "), "of a known failure what was observed"
    assert (data["version"], data["fixtures"]) == (suite_version(), fixtures.digest())
    assert str(ran) not in files(ran)[SMALL].read_text().replace(str(ran.parent / "zoo.toml"), ""), "it can be moved"


def test_the_end_of_a_run_names_the_folder_once(tmp_path, capfd):
    only = ("-k", "test_image_features and (photo-small or photo-tiles)")
    vlmqual("conformance", "--target", DRIFTING, *VISION, *only, "--results", tmp_path)
    output = capfd.readouterr().out
    (folder,) = (tmp_path / "replay").iterdir()
    assert output.count("replay: ") == 1
    assert f"  replay: {folder}\n" in output


def test_a_run_that_begins_anew_removes_what_it_judges_and_what_is_no_more(tmp_path, monkeypatch):
    only = ("-k", "test_image_features and photo-small")
    vlmqual("conformance", "--target", DRIFTING, *VISION, *only, "--results", tmp_path)
    (made,) = files(tmp_path).values()
    other, gone = (
        made.with_name(replays.slug(TILES) + ".json"),
        made.with_name(replays.slug("test_of_long_ago") + ".json"),
    )
    elsewhere = made.parent.with_name("another") / made.name
    elsewhere.parent.mkdir()
    for path in (other, gone, elsewhere, made.with_name(".cut.json.1.part")):
        path.write_text("{}")
    vlmqual("conformance", "--target", DRIFTING, *VISION, *only, "--results", tmp_path)
    assert {path.name for path in made.parent.iterdir()} == {made.name, other.name}, (
        "a case of the suite that this run does not judge keeps its file; one that is no more does not"
    )
    assert elsewhere.exists(), "another subject keeps its files"
    assert json.loads(made.read_text())["case"] == SMALL, "the new run wrote it anew"
    monkeypatch.setenv("MENDED", "1")
    assert vlmqual("conformance", "--target", DRIFTING, *VISION, *only, "--results", tmp_path) == 0
    assert not made.exists(), "a case that passes now has none"


# replaying ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "outcome", "words"),
    [
        (SMALL, "fail", "reproduced"),
        (TILES, "error", "reproduced"),
        (DOCUMENT, "expected-fail", "reproduced (expected-fail: a known failure)"),
    ],
)
def test_a_failure_is_reproduced_alone_and_leaves_the_results_alone(
    ran, capfd, monkeypatch, tmp_path, case, outcome, words
):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in ran.rglob("*") if path.is_file()}
    assert vlmqual("replay", files(ran)[case]) == 1
    output = capfd.readouterr()
    assert output.err == "", "nothing differs, so nothing is warned of"
    told = lines(output.out)
    assert told["case"] == case
    assert "IDEFICS3-VIS-007 MUST: " in output.out, "each requirement with its statement"
    assert told["subject"] == f"{DRIFTING}:library=zoo"
    assert told["outcome"] == outcome
    assert output.out.splitlines()[-1] == words
    assert {path: path.read_bytes() for path in ran.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.iterdir()), "no results are written where it is called"
    if case == SMALL:
        assert (told["dtype"], told["component"]) == ("float64", "vision.layers.1")
        assert told["worst"].endswith(" times the budget")


def test_the_case_is_run_alone(ran, tmp_path, monkeypatch):
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    assert vlmqual("replay", files(ran)[SMALL]) == 1
    assert (tmp_path / "calls").read_text().split() == ["5"], "the target is asked for one case's features only"


def test_another_target_can_be_tried_and_passes_where_it_is_right(ran, capfd):
    assert vlmqual("replay", files(ran)[SMALL], "--target", HONEST) == 0
    output = capfd.readouterr().out
    told = lines(output)
    assert (told["subject"], told["outcome"]) == (HONEST, "pass")
    assert told["recorded"].startswith(f"fail on {DRIFTING}:library=zoo:")
    assert output.splitlines()[-1] == "not reproduced: now pass"


def test_a_known_failure_that_is_mended_is_not_reproduced(ran, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MENDED", "1")
    assert vlmqual("replay", files(ran)[DOCUMENT]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("not reproduced: now pass, which a known failure")
    path = changed(files(ran)[DOCUMENT], tmp_path, outcome="fail", reason="expected to fail but passed: it is mended")
    assert vlmqual("replay", path) == 1, "a recorded pass that a known failure forbids is found again"
    assert capfd.readouterr().out.splitlines()[-1].startswith("reproduced")
    monkeypatch.delenv("MENDED")
    assert vlmqual("replay", path) == 1
    assert (
        capfd.readouterr().out.splitlines()[-1] == "not reproduced: passed although a known failure, now expected-fail"
    )


def test_a_case_that_cannot_be_tried_is_neither_reproduced_nor_passed(ran, capfd):
    assert vlmqual("replay", files(ran)[SMALL], "--target", f"{HONEST}:families=mllama") == 3
    assert capfd.readouterr().out.splitlines()[-1] == "not tried: now not-applicable"


def test_a_subject_that_does_not_come_up_leaves_the_case_untried(ran, capfd):
    assert vlmqual("replay", files(ran)[SMALL], "--target", f"{TARGETS / 'zoo.py'}:Stillborn") == 3
    assert "the case was not run: " in capfd.readouterr().err


def test_a_row_of_a_results_file_can_be_replayed(ran, capfd):
    path = last_run(ran).path
    assert vlmqual("replay", path, "--case", SMALL) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "reproduced"
    assert vlmqual("replay", path, "--case", BESIDE) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "as recorded: pass"


def test_a_failure_of_another_kind_is_told(ran, tmp_path, capfd):
    path = changed(files(ran)[SMALL], tmp_path, outcome="error", component="connector")
    assert vlmqual("replay", path) == 1
    assert capfd.readouterr().out.splitlines()[-1] == (
        "reproduced, but otherwise: was error, now fail; component was connector, now vision.layers.1"
    )


OLD = """
class Old:
    name, version, families = "old", "1.0", ("idefics3",)

    def __init__(self, emulate="0"):
        self.emulated = emulate == "1"

    def resolve(self, name):
        raise AttributeError(name)

    def to_array(self, value):
        return None

    def from_array(self, array, dtype=None):
        return array
"""


def test_a_library_case_is_replayed_on_its_library_with_the_options_it_had(tmp_path, monkeypatch, capfd):
    (tmp_path / "old.py").write_text(OLD)
    (tmp_path / "old-1.0.dist-info").mkdir()
    (tmp_path / "old-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: old\nVersion: 1.0\n")
    (tmp_path / "old-1.0.dist-info" / "entry_points.txt").write_text("[vlmqual.libraries]\nold = old:Old\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    results = tmp_path / "results"
    only = ("--family", "idefics3", "--level", "api", "-k", "test_parameters_of_the_models_forward")
    assert vlmqual("conformance", "--target", f"{HONEST}:library=old:emulate=1", *only, "--results", results) == 1
    capfd.readouterr()
    ((case, path),) = files(results).items()
    data = json.loads(path.read_text())
    assert (data["kind"], data["subject"], data["emulated"]) == ("library", "old:emulate=1", True)
    assert vlmqual("replay", path) == 1
    told = lines(capfd.readouterr().out)
    assert (told["case"], told["subject"]) == (case, "library old:emulate=1")
    assert told["dtype"] == "none, emulated", "what is emulated says so"
    assert vlmqual("replay", path, "--target", HONEST) == 2
    assert "is checked on a library; give --library instead of --target" in capfd.readouterr().err


# bad input ---------------------------------------------------------------------------------------------------------


def changed(path: Path, folder: Path, **values: Any) -> Path:
    made = folder / "changed.json"
    made.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return made


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert vlmqual("replay", *arguments) == 2
    (sentence,) = capfd.readouterr().err.strip().splitlines()
    return sentence


def test_a_results_file_wants_a_case_that_it_has(ran, capfd):
    path = last_run(ran).path
    assert f"--case NAME says which case of it; not as required are {DOCUMENT}" in refused(capfd, path)
    assert f"near it are {SMALL}" in refused(capfd, path, "--case", SMALL[:-2])
    assert "--case is for a results file" in refused(capfd, files(ran)[SMALL], "--case", SMALL)


def test_a_case_that_its_file_does_not_have_is_refused(ran, tmp_path, capfd):
    path = changed(files(ran)[SMALL], tmp_path, case=f"{FEATURES}[photo-smal]")
    assert f"the suite has no case '{FEATURES}[photo-smal]'; near it are {SMALL}" in refused(capfd, path)


def test_another_suite_other_fixtures_and_lost_known_failures_are_warned_of(ran, tmp_path, capfd):
    path = changed(files(ran)[SMALL], tmp_path, fixtures="0", suite="0", known=[])
    assert vlmqual("replay", path) == 1, "they are no reason to refuse"
    warned = capfd.readouterr().err.splitlines()
    assert warned == [
        "vlmqual replay: warning: tests, requirements or known failures are not those of the recorded run",
        "vlmqual replay: warning: the fixtures are not those of the recorded run",
    ]
    path = changed(files(ran)[DOCUMENT], tmp_path, version="0.0.1", known=["nowhere.toml"])
    assert vlmqual("replay", path) == 1
    output = capfd.readouterr()
    assert output.err.splitlines() == [
        "vlmqual replay: warning: the file of known failures nowhere.toml is gone",
        f"vlmqual replay: warning: recorded by vlmqual 0.0.1, this is {suite_version()}",
    ]
    assert lines(output.out)["outcome"] == "fail"


def test_a_replay_that_is_interrupted_ends_with_3_and_leaves_nothing(ran, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import sys, time\nsys.path.insert(0, {str(TARGETS)!r})\nfrom honest import Honest\n"
        f"class Slow(Honest):\n    def open(self, *_):\n        open({str(tmp_path / 'opened')!r}, 'w').close()\n"
        "        time.sleep(600)\n"
    )
    command = [
        sys.executable,
        "-m",
        "vlmqual_contract.cli",
        "replay",
        str(files(ran)[SMALL]),
        "--target",
        f"{slow}:Slow",
    ]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "opened").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 3, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert not list(scratch.iterdir()), "its own results are gone"


def test_a_row_without_what_a_replay_needs_is_refused(tmp_path, ran):
    run = last_run(ran)
    text = run.path.read_text().replace('"fixtures": "', '"fixtures": 5, "x": "', 1)
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UsageError, match="is damaged: fixtures is 5"):
        replays.read(tmp_path / "bad.jsonl", SMALL)
    row = next(row for row in run.verdicts if row.case == SMALL)
    assert isinstance(row, Verdict)
    assert asdict(replays.read(run.path, SMALL))["worst"] == row.worst
