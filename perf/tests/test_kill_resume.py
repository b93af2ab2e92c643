"""A sweep that is killed goes on; and the benchmark that kills it a hundred times sees what it has to see."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vlmqual_contract.records import Header, Measurement, Run, Writer, read

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kill_resume  # no package: a benchmark is started by its path

ROW = Measurement(
    "one/decode/tp1", "one", "idefics3", "decode", 1, 1, "float32", {"images": 1}, ((0.1,),), tokens_digest="abc"
)
OTHER = replace(ROW, case="one/prefill/tp1", phase="prefill")
HEADER = Header("perf", "truth", "1", {}, {}, "", {"suite": "smoke"})


def test_killed_sweeps_lose_nothing_that_was_announced_and_end_as_if_they_had_not_been_killed(tmp_path: Path) -> None:
    arguments = ["--target", kill_resume.TARGET, "--suite", "idefics3-text", "--tp", "1", *kill_resume.QUICK]
    found = kill_resume.run(tmp_path, arguments, kills=2, seed=4, reports=False)
    assert found.wrong == []
    assert found.kills == 2
    assert found.rows == 6


def written(folder: Path, *rows: Measurement, header: Header = HEADER, finish: bool = True) -> Run:
    folder.mkdir()
    writer = Writer(folder / "results.jsonl", header)
    for row in rows:
        writer.add(row)
    if finish:
        writer.finish()
    else:
        writer._file.close()
    return read(writer.path)


def test_timings_and_what_they_decide_and_the_order_tell_no_two_runs_apart(tmp_path: Path) -> None:
    later = {"values_s": ((0.5,), (0.6,)), "began_s": (1.0, 2.0), "warmup_s": ((9.0,),)}
    noisy = replace(ROW, **later, state="noisy", reason="a change below 50% could not have been seen")
    timed = replace(noisy, checks={"resolution": 0.5, "host": {"load": 3}})
    one = written(tmp_path / "one", ROW, OTHER)
    other = written(tmp_path / "other", OTHER, timed, header=replace(HEADER, run="another", command="again"))
    assert kill_resume.differences(one, other) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens_digest": "abd"}, "tokens_digest"),
        ({"shape": {"images": 2}}, "shape"),
        ({"state": "failed", "reason": "it crashed", "values_s": ()}, "reason, state"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"checks": {"threads": 2}}, "checks"),
    ],
)
def test_anything_else_does(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    one, other = written(tmp_path / "one", ROW), written(tmp_path / "other", replace(ROW, **changes))
    (found,) = kill_resume.differences(one, other)
    assert found.endswith(f"one/decode/tp1 differs in {sentence}")


def test_a_missing_row_a_missing_end_and_another_plan_are_seen(tmp_path: Path) -> None:
    one = written(tmp_path / "one", ROW, OTHER)
    assert "other cells" in kill_resume.differences(one, written(tmp_path / "short", ROW))[0]
    assert "not complete" in kill_resume.differences(one, written(tmp_path / "cut", ROW, OTHER, finish=False))[0]
    longer = replace(HEADER, plan={"suite": "default"})
    assert "identity" in kill_resume.differences(one, written(tmp_path / "more", ROW, OTHER, header=longer))[0]


def test_a_results_file_has_its_header_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present: list[bool] = []
    write = Writer._write
    monkeypatch.setattr(Writer, "_write", lambda *args: (present.append(args[0].path.exists()), write(*args)))
    written(tmp_path / "one", ROW)
    assert present == [False, True, True], "header, row, footer"
