"""Runs of the real suite on small targets: what becomes of crashes, hangs, NaN, known failures, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmqual_conformance import catalogue
from vlmqual_conformance.catalogue import Case
from vlmqual_conformance.subjects import PATIENCE, LibraryKeeper, TargetKeeper
from vlmqual_contract import cli
from vlmqual_contract.discovery import code_digest
from vlmqual_contract.errors import TargetCrashed, TargetHung, TargetRaised
from vlmqual_contract.records import Outcome, Run, Verdict, read
from vlmqual_contract.requirement import Citation, Requirement, Subject
from vlmqual_contract.target import Model, Options

pytestmark = pytest.mark.usefixtures("copied")
TARGETS = Path(__file__).with_name("targets")
ZOO, HONEST = TARGETS / "zoo.py", TARGETS / "honest.py"
FEATURES = "test_vision.py::test_image_features_are_within_budget"
VISION = ["--family", "idefics3", "--level", "vision", "--no-library"]

KNOWN = f"""
[[failure]]
library = "zoo"
versions = "==1.*"
case = "{FEATURES}[text-beside-image]"
reason = "the last image token is missing"
expires = 2099-01-01
outcome = "error"

[[failure]]
library = "zoo"
versions = ">=1"
case = "{FEATURES}[document]"
reason = "pages come out blank"
expires = 2099-01-01

[[failure]]
library = "zoo"
versions = ">=1"
case = "{FEATURES}[photo-whole]"
reason = "one frame alone is not a number"
expires = 2020-01-01
outcome = "error"

[[failure]]
library = "zoo"
versions = ">=1"
case = "test_vision.py::test_of_long_ago"
reason = "nobody remembers"
expires = 2099-01-01

[[failure]]
library = "zoo"
versions = ">=2"
case = "*"
reason = "another version fails everywhere"
expires = 2099-01-01
"""


def conformance(*arguments: str | Path) -> int:
    return cli.main(["conformance", *map(str, arguments)])


def only_run(folder: Path) -> Run:
    files = sorted(folder.glob("*.jsonl"))
    assert len(files) == 1, f"one results file was expected, there are {[file.name for file in files]}"
    return read(files[0])


def by_case(run: Run) -> dict[str, Verdict]:
    return {row.case: row for row in run.verdicts}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Run]:
    """A target that crashes, hangs, gives NaN and wrong shapes on some inputs, with known failures of its library."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "zoo.toml").write_text(KNOWN)
    results = folder / "results"
    target = f"{ZOO}:Mixed:library=zoo"
    code = conformance(
        "--target", target, *VISION, "--results", results, "--timeout", "3", "--known", folder / "zoo.toml"
    )
    return code, only_run(results)


def test_a_crash_in_the_middle_is_an_error_and_the_rest_still_runs(mixed):
    code, run = mixed
    crashed = by_case(run)[f"{FEATURES}[photo-tiles]"]
    assert crashed.outcome is Outcome.ERROR
    assert "SIGKILL" in crashed.reason, crashed.reason
    assert run.complete, "the file of a run that came to its end has a footer that counts every row"
    assert code == 1
    after = [row for row in run.verdicts[run.verdicts.index(crashed) :] if row.outcome is Outcome.PASS]
    assert len(after) >= 3, "cases after the crash pass in a new process"


def test_a_hang_in_the_middle_is_an_error_after_its_time_limit(mixed):
    hung = by_case(mixed[1])[f"{FEATURES}[strip]"]
    assert (hung.outcome, hung.reason) == (Outcome.ERROR, "no answer to vision within 3 s")


def test_nan_is_an_error_and_not_a_wrong_answer(mixed):
    row = by_case(mixed[1])["test_vision.py::test_without_a_pixel_mask_every_pixel_is_visible"]
    assert (row.outcome, row.reason) == (
        Outcome.ERROR,
        "features/image_hidden_states holds NaN in 1 of 1024 places",
    )


def test_a_wrong_shape_is_an_error_that_a_known_failure_can_expect(mixed):
    row = by_case(mixed[1])[f"{FEATURES}[text-beside-image]"]
    assert (row.outcome, row.reason) == (Outcome.EXPECTED_FAIL, "the last image token is missing")
    assert row.details["expires"] == "2099-01-01"
    assert "has shape (1, 15, 64), not (1, 16, 64)" in row.details["observed"]


def test_an_expected_failure_that_passes_is_a_failure(mixed):
    row = by_case(mixed[1])[f"{FEATURES}[document]"]
    assert row.outcome is Outcome.FAIL
    assert row.reason.startswith("expected to fail but passed: pages come out blank")


def test_an_expired_known_failure_is_a_failure(mixed):
    row = by_case(mixed[1])[f"{FEATURES}[photo-whole]"]
    assert row.outcome is Outcome.ERROR
    assert row.reason.startswith("the known failure expired on 2020-01-01: one frame alone is not a number; observed:")


def test_a_known_failure_that_names_no_case_is_a_failure(mixed):
    row = by_case(mixed[1])["zoo.toml::test_vision.py::test_of_long_ago"]
    assert row.outcome is Outcome.FAIL
    assert "names nothing" in row.reason


def test_verdicts_carry_requirements_dtype_and_the_ratio_of_every_component(mixed):
    row = by_case(mixed[1])[f"{FEATURES}[photo-small]"]
    assert row.outcome is Outcome.PASS
    assert "IDEFICS3-VIS-005" in row.requirements
    assert (row.family, row.level, row.dtype) == ("idefics3", "vision", "float64")
    assert row.worst is not None
    assert 0 < row.worst <= 1
    assert row.component in row.details["ratios"]
    assert "vision.layers.2" in row.details["ratios"]


def test_the_header_tells_what_was_run(mixed):
    header = mixed[1].header
    assert header.kind == "conformance"
    assert header.info["dtype"] == "float64"
    assert header.plan["levels"] == ["vision"]
    assert header.plan["calibration"] is False
    assert len(header.plan["fixtures"]) == 64
    assert header.plan["code"] == code_digest(f"{ZOO}:Mixed"), "a run of other code is another run, not resumed"
    assert header.machine["cores"] >= 1


def test_an_honest_target_passes_and_lacking_capabilities_are_not_applicable(tmp_path: Path, capfd):
    code = conformance(
        *("--target", f"{HONEST}:Honest:without=pixel-mask+taps", "--level", "vision", "prefill", "masks"),
        *("--family", "idefics3", "-k", "not text-long", "--results", tmp_path, "--no-library"),
    )
    run = only_run(tmp_path)
    assert code == 0, capfd.readouterr().out
    outcomes = {row.outcome for row in run.verdicts}
    assert outcomes == {Outcome.PASS, Outcome.NOT_APPLICABLE}
    missing = [row for row in run.verdicts if row.outcome is Outcome.NOT_APPLICABLE]
    assert {row.reason for row in missing} == {"the target does not declare pixel-mask"}
    assert all("taps" not in row.reason for row in missing), "without taps only the component is unknown"
    assert len(missing) >= 3
    lines = [line for line in capfd.readouterr().out.splitlines() if "/" not in line]
    assert max(map(len, lines)) <= 80, "lines without a path fit a terminal of 80 columns"


def test_another_family_is_not_applicable_and_no_failure(tmp_path: Path):
    code = conformance("--target", f"{HONEST}:Honest:families=mllama", *VISION, "--results", tmp_path)
    run = only_run(tmp_path)
    assert code == 0
    assert {row.reason for row in run.verdicts} == {"the target does not open models of the family idefics3"}
    assert {row.outcome for row in run.verdicts} == {Outcome.NOT_APPLICABLE}


def test_two_families_are_run_one_after_the_other_and_a_model_stays_open_until_another_is_needed(tmp_path: Path, capfd):
    opened = tmp_path / "opened"
    code = conformance(
        *("--target", f"{ZOO}:Openings:file={opened}", "--family", "idefics3", "--family", "mllama"),
        *("--level", "vision", "prefill", "parallel", "--results", tmp_path / "results", "--no-library"),
    )
    output = capfd.readouterr().out
    assert code == 0, output
    of_each = ("tiny", "rotary", "tiny", "tiny-over-2")  # the second one for the last case of its level
    assert opened.read_text().split() == [f"{family}-{name}" for family in ("idefics3", "mllama") for name in of_each]
    rows = only_run(tmp_path / "results").verdicts
    order = list(dict.fromkeys((row.family, row.level) for row in rows))
    levels = ("vision", "prefill", "parallel")
    assert order == [(family, level) for family in ("idefics3", "mllama") for level in levels]
    assert "  mllama prefill " in output, "where there are several families a level is shown with its family"


def started(results: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vlmqual_contract.cli", "conformance", "--target", f"{ZOO}:Slow", *VISION]
    process = subprocess.Popen(
        [*command, "--results", str(results)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        files = list(results.glob("*.jsonl"))
        if files and files[0].read_bytes().count(b'"verdict"') >= 3:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no verdict was written: {process.communicate()[0].decode()}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_keeps_every_finished_row_and_resumes(tmp_path: Path, how: signal.Signals):
    process = started(tmp_path)
    os.killpg(process.pid, how)
    output = process.communicate(timeout=60)[0].decode()
    stopped = only_run(tmp_path)
    assert stopped.footer is None, "a file without its end must not count as complete"
    assert len(stopped.verdicts) >= 3
    if how == signal.SIGINT:
        assert process.returncode == 3, output
        assert "the same command resumes" in output

    assert conformance("--target", f"{ZOO}:Slow", *VISION, "--results", tmp_path) == 0
    whole = only_run(tmp_path)
    assert whole.complete
    assert whole.verdicts[: len(stopped.verdicts)] == stopped.verdicts, "finished cases are not run again"
    assert whole.path.read_bytes().count(b'"record": "verdict"') == len(whole.verdicts)


# tests against requirements ----------------------------------------------------------------------------------------


def a_requirement(name: str, *, subject: Subject = "target", untested: str = "") -> Requirement:
    citation = Citation("a document", "1", "a section")
    return Requirement(name, "idefics3", "vision", "MUST", subject, "It is so.", (citation,), untested=untested)


ONE, TWO = "IDEFICS3-VIS-001", "IDEFICS3-VIS-002"
BOTH = {ONE: a_requirement(ONE), TWO: a_requirement(TWO)}


def test_tests_and_requirements_that_cover_each_other_are_in_order():
    assert catalogue.problems([Case("a", (ONE, TWO))], BOTH, whole=True) == []


def test_a_requirement_without_a_test_stops_the_collection():
    (sentence,) = catalogue.problems([Case("a", (ONE,))], BOTH, whole=True)
    assert sentence == f"{TWO} has no test and does not say why"
    assert catalogue.problems([Case("a", (ONE,))], BOTH, whole=False) == [], (
        "unless only part of the suite is collected"
    )


def test_a_requirement_that_says_why_it_has_no_test_may_have_none_and_must_have_none():
    known = {ONE: BOTH[ONE], TWO: a_requirement(TWO, untested="it needs the released weights")}
    assert catalogue.problems([Case("a", (ONE,))], known, whole=True) == []
    (sentence,) = catalogue.problems([Case("a", (ONE, TWO))], known, whole=True)
    assert sentence == f"{TWO} says why it has no test, but has one"


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (Case("a", ()), "a names no requirement; every test carries @requirement(...)"),
        (Case("a", (ONE, "IDEFICS3-VIS-999")), "a names IDEFICS3-VIS-999, which no requirement file has"),
        (
            Case("a", (ONE,), uses_library=True),
            f"a takes the fixture 'library', but {ONE} is checked on a target",
        ),
    ],
)
def test_a_test_that_does_not_fit_its_requirements_stops_the_collection(case, sentence):
    assert sentence in catalogue.problems([case, Case("b", (ONE, TWO))], BOTH, whole=True)


def test_the_suite_and_the_requirement_files_cover_each_other():
    """What every run checks first; here it costs no target."""
    files = [str(file) for file in catalogue.requirement_files()]
    assert any(file.endswith("idefics3_numeric.toml") for file in files)
    requirements = catalogue.requirements()
    uncited = [item.id for item in requirements.values() if not item.citations]
    assert uncited == []
    numeric = [item for item in requirements.values() if item.subject == "target"]
    assert {item.level for item in numeric} >= {"vision", "prefill", "decode", "masks", "generation", "parallel"}


OLD_LIBRARY = """
class Old:
    name, version, families = "old", "1.0", ("mllama",)

    def resolve(self, name):
        raise AttributeError(name)

    def to_array(self, value):
        return None

    def from_array(self, array, dtype=None):
        return array
"""


def test_a_family_that_a_library_does_not_have_is_not_applicable_and_one_that_it_has_is_judged(tmp_path, monkeypatch):
    """A version from before a family is not wrong about it; one that says it has the family is held to it."""
    (tmp_path / "old.py").write_text(OLD_LIBRARY)
    (tmp_path / "old-1.0.dist-info").mkdir()
    (tmp_path / "old-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: old\nVersion: 1.0\n")
    (tmp_path / "old-1.0.dist-info" / "entry_points.txt").write_text("[vlmqual.libraries]\nold = old:Old\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = tmp_path / "results"
    only = ("--level", "api", "-k", "test_signatures or test_mllama_api")
    code = conformance("--target", f"{ZOO}:Mixed:library=old", *only, "--results", results)
    rows = [row for file in results.glob("*library*.jsonl") for row in read(file).verdicts]
    absent = [row for row in rows if row.family == "idefics3"]
    assert absent, "the cases are counted, not left out"
    assert {row.outcome for row in absent} == {Outcome.NOT_APPLICABLE}
    assert {row.reason for row in absent} == {"old 1.0 has no classes of the family idefics3"}
    judged = [row for row in rows if row.family == "mllama"]
    assert Outcome.FAIL in {row.outcome for row in judged}
    assert not [row.case for row in judged if "no classes of the family" in row.reason]
    assert code == 1


def test_a_library_with_options_keeps_its_known_failures_and_says_that_it_is_emulated(tmp_path, monkeypatch):
    text = OLD_LIBRARY.replace('("mllama",)', '("idefics3",)')
    text += "\n    def __init__(self, emulate='0'):\n        self.emulated = emulate == '1'\n"
    (tmp_path / "old.py").write_text(text)
    (tmp_path / "old-1.0.dist-info").mkdir()
    (tmp_path / "old-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: old\nVersion: 1.0\n")
    (tmp_path / "old-1.0.dist-info" / "entry_points.txt").write_text("[vlmqual.libraries]\nold = old:Old\n")
    entry = '[[failure]]\nlibrary = "old"\nversions = "==1.0"\ncase = "*"\nreason = "it is old"\nexpires = 2099-01-01\n'
    (tmp_path / "known.toml").write_text(entry)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = tmp_path / "results"
    only = ("--family", "idefics3", "--level", "api", "-k", "test_parameters_of_the_configuration or forward")
    target = f"{ZOO}:Mixed:library=old:emulate=1"
    conformance("--target", target, *only, "--known", tmp_path / "known.toml", "--results", results)
    (file,) = (read(path) for path in results.glob("*library*.jsonl"))
    assert file.header.subject == "library old:emulate=1"
    assert file.header.info["name"] == "old"
    assert file.header.info["emulated"] is True
    outcomes = {row.case: row.outcome for row in file.verdicts}
    assert outcomes["test_signatures.py::test_parameters_of_the_models_forward"] is Outcome.EXPECTED_FAIL
    rbln = [row for row in file.verdicts if row.case.startswith("test_rbln")]
    assert {row.outcome for row in rbln} == {Outcome.NOT_APPLICABLE}
    assert {row.reason for row in rbln} == {"old 1.0 has no RBLNIdefics3ForConditionalGeneration"}


# keepers -----------------------------------------------------------------------------------------------------------


def test_a_library_whose_process_ended_is_started_again():
    keeper = LibraryKeeper("vlmqual_impl")
    try:
        with pytest.raises(TargetCrashed):
            keeper.library().call("os:abort")
        again = keeper.library()
        assert again.name == "vlmqual_impl"
        assert again.call("os:getcwd") == str(Path.cwd()), "the new process answers"
    finally:
        keeper.stop()


def test_a_target_that_hangs_again_and_again_is_given_up():
    keeper = TargetKeeper(f"{HONEST}:Honest")
    try:
        for _ in range(PATIENCE):
            keeper.target()
            keeper.ended(TargetHung("no answer"))
        with pytest.raises(TargetHung, match="not tried: the target hung in each of the 5 cases before"):
            keeper.target()
        keeper.ended(None)
        keeper.target()
    finally:
        keeper.stop()


def test_a_model_that_cannot_be_opened_is_tried_twice_only():
    keeper = TargetKeeper(f"{HONEST}:Honest")
    model, options = Model("nowhere", "idefics3"), Options()
    try:
        for _ in range(2):
            with pytest.raises(TargetRaised, match="FileNotFoundError"):
                keeper.session(model, options)
        before = keeper.target()
        with pytest.raises(TargetRaised, match="FileNotFoundError") as third:
            keeper.session(model, options)
        with pytest.raises(TargetRaised) as fourth:
            keeper.session(model, options)
        assert third.value is fourth.value, "the remembered failure is raised, the target is not asked"
        assert keeper.target() is before
    finally:
        keeper.stop()


def test_ranks_hold_one_model_and_open_another_when_it_is_asked_for(tmp_path: Path):
    opened = tmp_path / "opened"
    keeper = TargetKeeper(f"{ZOO}:Openings:file={opened}")
    first, second, options = Model("a", "idefics3"), Model("b", "mllama"), Options(tp=2)
    try:
        one = keeper.ranks(2, first, options)
        assert keeper.ranks(2, first, options) is one, "a model that is open is not opened again"
        other = keeper.ranks(2, second, options)
        assert other is not one, "the ranks of one family must not answer for the other"
        assert keeper.ranks(2, first, options) is not one, "the session of a closed model is not used again"
    finally:
        keeper.stop()
    assert opened.read_text().split() == ["a-over-2", "b-over-2", "a-over-2"]
