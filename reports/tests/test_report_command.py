from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from vlmqual_contract.errors import UsageError
from vlmqual_reports.command import command, write


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(item) for item in arguments]))


@pytest.fixture(autouse=True)
def no_installed_requirements(monkeypatch):
    monkeypatch.setattr("vlmqual_reports.statements.installed", lambda group: {})


@pytest.mark.parametrize(
    ("outcomes", "finish", "code"),
    [
        (["pass"], True, 0),
        (["pass", "expected-fail", "not-applicable"], True, 0),
        (["pass", "fail"], True, 1),
        (["pass", "error"], True, 1),
        (["pass"], False, 3),
        (["pass", "fail"], False, 1),
        (["not-applicable"], True, 3),
        ([], True, 3),
    ],
)
def test_the_exit_code_tells_as_required_from_failed_and_incomplete(book, make_verdict, outcomes, finish, code):
    book.write(book.header(), [make_verdict(name, name, reason="r") for name in outcomes], finish=finish)
    assert run(book.folder) == code
    assert (book.folder / "report.html").is_file(), "the report is written whatever the verdict"
    assert (book.folder / "report.md").is_file()


@pytest.mark.parametrize(("state", "code"), [("valid", 0), ("noisy", 0), ("not-steady", 0), ("failed", 1)])
def test_a_failed_measurement_fails_the_report_and_a_noisy_one_is_only_marked(book, make_measurement, state, code):
    book.write(book.header("perf"), [make_measurement("prefill", [[0.1]], state=state, reason="r")])
    assert run(book.folder) == code


def test_an_older_failure_does_not_fail_the_report(book, make_verdict):
    book.write(book.header(started="2027-01-01T00:00:00+00:00"), [make_verdict("a", "fail", reason="r")])
    book.write(book.header(started="2027-01-02T00:00:00+00:00"), [make_verdict("a")])
    assert run(book.folder) == 0


def test_a_file_that_cannot_be_used_makes_the_report_incomplete(book, make_verdict, capsys):
    book.write(book.header(), [make_verdict("a")])
    (book.folder / "cut.jsonl").write_text('{"record": "hea')
    assert run(book.folder) == 3
    assert "cut.jsonl" in capsys.readouterr().err


def test_the_last_line_has_the_paths_of_both_pages(book, make_verdict, tmp_path, capsys):
    book.write(book.header(), [make_verdict("a")])
    page, text = tmp_path / "new" / "page.html", tmp_path / "other.md"
    assert run(book.folder, "--output", page, "--markdown", text) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["eager:device=cpu: as required", f"{page} {text}"]
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert text.read_text("utf-8").startswith("# Qualification report")
    assert sorted(item.name for item in page.parent.iterdir()) == ["page.html"], "a temporary file was left behind"


def test_the_markdown_page_goes_with_the_html_page(book, make_verdict, tmp_path):
    path = book.write(book.header(), [make_verdict("a")])
    run(path, "--output", tmp_path / "x.html")
    assert (tmp_path / "x.md").is_file()


def test_reports_in_the_results_directory_do_not_disturb_the_next_report(book, make_verdict):
    book.write(book.header(), [make_verdict("a")])
    assert [run(book.folder), run(book.folder)] == [0, 0]


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_directories_without_results_are_usage_errors_and_write_nothing(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=folder):
        run(tmp_path / folder, "--output", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_two_pages_in_one_file_are_refused(book, make_verdict, tmp_path):
    book.write(book.header(), [make_verdict("a")])
    with pytest.raises(UsageError, match="both name"):
        run(book.folder, "--output", tmp_path / "page.md")


def test_a_page_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"page\.html"):
        write(tmp_path / "file" / "page.html", "text")
    with pytest.raises(UsageError, match="is a directory"):
        write(tmp_path, "text")


def test_an_interrupted_write_leaves_the_old_page_whole(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("old")

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(page, "new")
    assert page.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["page.html"]


def test_characters_that_cannot_be_written_do_not_stop_the_report(book, make_verdict):
    book.write(book.header(), [make_verdict("a", "fail", reason="lone \ud800 half")])
    assert run(book.folder) == 1
    assert "lone ? half" in (book.folder / "report.html").read_text("utf-8")
