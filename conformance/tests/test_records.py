from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Header, Measurement, Outcome, Verdict, Writer, read, runs


def header(**more) -> Header:
    values = {
        "kind": "conformance",
        "subject": "eager:device=cpu",
        "suite": "1",
        "info": {"capabilities": frozenset({"b", "a"})},
        "machine": {"cores": 2},
        "command": "vlmqual conformance",
        "plan": {"levels": ("images", "prefill")},
    }
    return Header(**{**values, **more})


def verdict(case: str, outcome: Outcome = Outcome.PASS) -> Verdict:
    return Verdict(case, ("IDEFICS3-IMG-016",), "idefics3", "images", outcome, worst=0.5)


def test_a_finished_run_reads_back_as_it_was_written(tmp_path):
    cell = Measurement("c", "s", "idefics3", "decode", 2, 1, "float32", {"images": 1}, ((0.1, 0.2), (0.3, 0.4)))
    with Writer.start(tmp_path, header()) as writer:
        writer.add(verdict("a"))
        writer.add(cell)
    run = read(writer.path)
    assert run.complete
    assert run.verdicts == (verdict("a"),)
    assert run.measurements == (cell,)
    assert run.footer is not None
    assert run.footer.counts == {"pass": 1, "valid": 1}


def test_a_run_that_ends_with_an_exception_has_no_footer_and_is_continued(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer.start(tmp_path, header()) as writer:
        writer.add(verdict("a"))
        raise ZeroDivisionError
    assert not read(writer.path).complete
    with Writer.start(tmp_path, header()) as again:
        assert set(again.done) == {"a"}, "the finished case must be known to the run that continues"
        assert again.path == writer.path
        again.add(verdict("b"))
    run = read(again.path)
    assert run.complete
    assert [row.case for row in run.verdicts] == ["a", "b"]


@pytest.mark.parametrize("change", [{"subject": "other"}, {"plan": {"levels": ["images"]}}, {"machine": {"cores": 3}}])
def test_a_run_of_another_identity_is_not_continued(tmp_path, change):
    with pytest.raises(ZeroDivisionError), Writer.start(tmp_path, header()) as writer:
        raise ZeroDivisionError
    with Writer.start(tmp_path, header(**change)) as other:
        assert other.path != writer.path


def test_a_finished_run_is_history_and_a_fresh_one_ignores_unfinished_ones(tmp_path):
    with Writer.start(tmp_path, header()) as first:
        first.add(verdict("a"))
    with Writer.start(tmp_path, header()) as second:
        assert second.path != first.path
        assert not second.done
    with pytest.raises(ZeroDivisionError), Writer.start(tmp_path, header()) as third:
        third.add(verdict("a"))
        raise ZeroDivisionError
    with Writer.start(tmp_path, header(), fresh=True) as fourth:
        assert not fourth.done


def test_a_killed_process_loses_only_the_line_in_flight(tmp_path):
    script = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_records import header, verdict\n"
        "from vlmqual_contract.records import Writer\n"
        "writer = Writer.start(Path(sys.argv[1]), header())\n"
        "for index in range(3): writer.add(verdict(str(index)))\n"
        'writer._file.write(b\'{"record": "verdict", "case": "half\'); writer._file.flush()\n'
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), os.path.dirname(__file__)], check=False)  # noqa: PTH120
    assert done.returncode == -signal.SIGKILL
    (run,) = runs(tmp_path)
    assert not run.complete
    assert [row.case for row in run.verdicts] == ["0", "1", "2"]
    with Writer.start(tmp_path, header()) as writer:
        assert set(writer.done) == {"0", "1", "2"}
        writer.add(verdict("3"))
    assert read(writer.path).complete, "the half line must be gone, or the file would stay damaged"


def test_a_file_with_a_damaged_line_in_its_middle_is_never_complete(tmp_path):
    with Writer.start(tmp_path, header()) as writer:
        writer.add(verdict("a"))
        writer.add(verdict("b"))
    lines = writer.path.read_text().splitlines()
    lines[1] = lines[1][:20]
    writer.path.write_text("\n".join(lines) + "\n")
    run = read(writer.path)
    assert run.damaged == 1
    assert not run.complete


def test_a_file_that_lost_a_row_is_never_complete(tmp_path):
    with Writer.start(tmp_path, header()) as writer:
        writer.add(verdict("a"))
        writer.add(verdict("b"))
    lines = writer.path.read_text().splitlines()
    writer.path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    assert not read(writer.path).complete


def test_another_format_number_is_refused_by_name(tmp_path):
    path = tmp_path / "new.jsonl"
    path.write_text(json.dumps({"record": "header", "format": 99}) + "\n")
    with pytest.raises(UsageError, match="format 99"):
        read(path)
    assert list(runs(tmp_path, quiet=True)) == []


def test_something_else_than_a_results_file_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("hello\n")
    with pytest.raises(UsageError, match="no results file"):
        read(path)


def test_nan_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"), Writer.start(tmp_path, header()) as writer:
        writer.add(Verdict("a", (), "idefics3", "images", Outcome.FAIL, worst=float("nan")))


def test_an_unwritable_directory_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="results directory"):
        Writer.start(blocked / "below", header())


def test_two_runs_never_write_one_file(tmp_path):
    first = Writer.start(tmp_path, header())
    first.add(verdict("a"))
    with pytest.raises(UsageError, match="being written by another run"):
        Writer.start(tmp_path, header())
    first.finish()
    with Writer.start(tmp_path, header()) as second:
        assert second.path != first.path


def test_a_results_directory_that_is_a_file_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="is no directory"):
        Writer.start(blocked, header())
