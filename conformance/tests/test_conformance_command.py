from __future__ import annotations

from pathlib import Path

import pytest

from vlmqual_conformance.progress import Reporter, counted, summary
from vlmqual_contract import cli
from vlmqual_contract.records import Outcome, Verdict, read

pytestmark = pytest.mark.usefixtures("copied")
TARGETS = Path(__file__).with_name("targets")
ZOO, HONEST = TARGETS / "zoo.py", TARGETS / "honest.py"


def conformance(*arguments: str | Path) -> int:
    return cli.main(["conformance", *map(str, arguments)])


def one_sentence(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, f"one sentence was expected: {text}"
    assert "Traceback" not in text
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--target", "warp-drive"], "target 'warp-drive' is not installed; installed are eager"),
        (["--target", "nowhere.py:Toy"], "target file nowhere.py does not exist"),
        (["--target", "eager:dtype"], "'dtype' is no key=value"),
        (["--timeout", "0"], "--timeout 0 is no time"),
        (["--jobs", "0"], "--jobs 0 is no number of targets"),
        (["--known", "nowhere.toml"], "nowhere.toml: cannot be read as a file of known failures"),
        (["--results", __file__], "is no folder"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(tmp_path, monkeypatch, capfd, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert conformance(*arguments) == 2
    output = capfd.readouterr()
    assert sentence in one_sentence(output.err)
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("arguments", [["--level", "colour"], ["--family", "llama"], ["--speed"]])
def test_an_unknown_choice_ends_with_2(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        conformance(*arguments)
    assert caught.value.code == 2
    assert arguments[-1] in capfd.readouterr().err, "the message names what is wrong"


@pytest.mark.parametrize(
    ("target", "code", "sentence"),
    [
        (f"{ZOO}:Tiger", 2, "has no 'Tiger'; its classes are"),
        (f"{ZOO}:Odd", 2, "declares the compute dtype 'int3'; valid are float64, float32, bfloat16, float16"),
        (f"{ZOO}:Stillborn", 1, "did not come up: the target's process ended (exit status 9)"),
    ],
)
def test_a_target_that_cannot_start_is_named_in_one_sentence(tmp_path, capfd, target, code, sentence):
    assert conformance("--target", target, "--results", tmp_path / "results", "--no-library") == code
    assert sentence in one_sentence(capfd.readouterr().err)
    assert not (tmp_path / "results").exists(), "a run that never began leaves no file"


@pytest.mark.parametrize(
    ("expression", "sentence"), [("nosuchtest", "nothing is selected"), ("and and", "Wrong expression")]
)
def test_an_expression_that_selects_nothing_is_a_mistake(tmp_path, capfd, expression, sentence):
    code = conformance("--target", f"{HONEST}:Honest", "-k", expression, "--results", tmp_path, "--no-library")
    assert code == 2
    assert sentence in one_sentence(capfd.readouterr().err)
    assert not list(tmp_path.iterdir()), "no results file is begun"


SOCIABLE = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(TARGETS)!r})
from honest import Honest


class Sociable(Honest):
    def __init__(self, mine, other):
        super().__init__(families="mllama")
        here = Path(__file__).parent
        (here / mine).touch()
        until = time.monotonic() + 30
        while not (here / other).exists():
            if time.monotonic() > until:
                raise TimeoutError("nobody else is there")
            time.sleep(0.02)
"""


def test_targets_that_are_judged_at_the_same_time_have_whole_results_and_say_one_after_the_other(tmp_path, capfd):
    (tmp_path / "sociable.py").write_text(SOCIABLE)
    kind = f"{tmp_path / 'sociable.py'}:Sociable"
    targets = [f"{kind}:mine=a,other=b", f"{kind}:mine=b,other=a"]
    code = conformance(
        *("--target", targets[0], "--target", targets[1], "--jobs", "2", "--no-library"),
        *("--family", "idefics3", "--requirement", "IDEFICS3-VIS-002", "--results", tmp_path / "results"),
    )
    output = capfd.readouterr().out
    assert code == 0, output
    found = [read(path) for path in (tmp_path / "results").glob("*.jsonl")]
    assert {run.header.subject for run in found} == set(targets)
    assert all(run.complete for run in found)
    said = [line for line in output.splitlines() if line in targets or line.strip().startswith("results: ")]
    assert [line in targets for line in said] == [True, False, True, False], output


def test_a_dry_run_says_what_would_be_run_and_starts_nothing(tmp_path, capfd):
    code = conformance("--target", f"{ZOO}:Stillborn", "--dry-run", "--level", "vision", "--results", tmp_path)
    output = capfd.readouterr().out
    assert code == 0
    assert f"{ZOO}:Stillborn: " in output
    assert "vision" in output
    assert "prefill" not in output
    assert not list(tmp_path.iterdir())


def row(case: str, level: str, outcome: Outcome, **more) -> Verdict:
    return Verdict(case, ("IDEFICS3-VIS-001",), "idefics3", level, outcome, **more)


ROWS = [
    row("test_a.py::test_b[c]", "vision", Outcome.PASS, worst=0.25),
    row("test_a.py::test_b[d]", "vision", Outcome.ERROR, reason="the process ended"),
    row(
        "test_a.py::test_of_" + "very_" * 20 + "long_name",
        "prefill",
        Outcome.FAIL,
        reason="5 is not 7 " * 20,
        worst=3.5,
    ),
    row("test_a.py::test_e", "decode", Outcome.NOT_APPLICABLE, reason="no taps"),
    row("test_a.py::test_f", "decode", Outcome.EXPECTED_FAIL, reason="known"),
]


def test_the_summary_has_a_line_for_each_level_and_every_case_that_is_not_as_required():
    text = summary(ROWS)
    lines = text.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:4]}
    assert cells["vision"] == ["1", "-", "1", "-", "-", "0.25"]
    assert cells["prefill"] == ["-", "1", "-", "-", "-", "3.50"]
    assert cells["decode"] == ["-", "-", "-", "1", "1"]
    assert "ERROR test_a.py::test_b[d]" in text
    assert "no taps" not in text, "what is not applicable is counted, not listed"
    assert max(map(len, lines)) <= 80


def test_the_summary_ends_with_what_the_target_seems_to_compute_in():
    seems = {"says": "weights look like int8 (coefficient 0.97 +- 0.02); declared bfloat16"}
    row = Verdict("a", ("X-A-001",), "idefics3", "generation", Outcome.PASS, details={"precision": seems})
    assert summary([row]).splitlines()[-1] == f"  idefics3 {seems['says']}"


def test_the_summary_of_several_families_has_a_line_for_each_family_and_level():
    rows = [*ROWS[:1], Verdict("test_b.py::test_c", ("MLLAMA-TOWER-001",), "mllama", "vision", Outcome.PASS, worst=0.5)]
    lines = summary(rows).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["idefics3", "vision", "1"], ["mllama", "vision", "1"]]
    assert max(map(len, lines)) <= 80


def test_a_log_without_a_terminal_has_a_line_for_each_level(capsys):
    reporter = Reporter("a target", total=5)
    for verdict in ROWS:
        reporter.starting(verdict.level)
        reporter.ended(verdict)
    reporter.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "vision", "prefill", "decode"]
    assert "1 pass, 1 error" in lines[1]


def test_counts_leave_out_outcomes_that_do_not_occur():
    assert counted(ROWS[:2]) == "1 pass, 1 error"
    assert counted([]) == "nothing"
