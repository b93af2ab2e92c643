from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vlmqual_contract.errors import UsageError
from vlmqual_contract.requirement import LEVELS
from vlmqual_reports.load import load, why_incomplete


def test_the_newest_run_of_a_subject_counts_and_the_older_ones_are_only_listed(book, make_verdict):
    old = book.write(book.header(started="2027-01-01T00:00:00+00:00"), [make_verdict("a", "fail", reason="wrong")])
    new = book.write(book.header(started="2027-01-02T00:00:00+00:00"), [make_verdict("a")])
    results = load([book.folder])
    assert [run.path for run in results.newest] == [new]
    assert [run.path for run in results.older] == [old]
    page = book.page()
    assert page.by_id("failures").all("table") == [], "a failure of an older run must not be shown as one of the newest"
    assert any("older, not shown" in row for row in page.by_id("runs").rows())


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "eager:device=cpu,dtype=bfloat16"},
        {"plan": {"families": ["idefics3"], "levels": ["decode"]}},
        {"info": {"version": "2.0", "device": "cpu", "dtype": "float32"}},
        {"machine": {"host": "bench-08", "processor": "Some CPU"}},
    ],
)
def test_runs_that_differ_in_what_they_are_about_do_not_replace_each_other(book, make_verdict, change):
    book.write(book.header(), [make_verdict("a")])
    book.write(book.header(started="2027-01-20T00:00:00+00:00", **change), [make_verdict("a")])
    results = load([book.folder])
    assert len(results.newest) == 2, f"a run with another {next(iter(change))} hid the first one"
    columns = book.page().by_id("levels").rows()[0][2:]
    assert len(set(columns)) == 2, f"two columns cannot be told apart: {columns}"


def test_a_later_run_with_other_fixtures_and_code_replaces_the_earlier_one(book, make_verdict):
    scope = {"families": ["idefics3"], "levels": ["images"]}
    book.write(
        book.header(started="2027-01-01T00:00:00+00:00", plan={**scope, "fixtures": "a", "code": "a"}),
        [make_verdict("a", "fail", reason="wrong")],
    )
    new = book.write(
        book.header(started="2027-01-02T00:00:00+00:00", plan={**scope, "fixtures": "b", "code": "b"}),
        [make_verdict("a")],
    )
    assert [run.path for run in load([book.folder]).newest] == [new], (
        "a repaired failure would stay on the page for ever"
    )


def test_a_run_of_some_levels_is_as_required_for_these_only(book, make_verdict):
    book.write(book.header(plan={"families": ["idefics3"], "levels": ["images"]}), [make_verdict("a")])
    assert "as required as far as it was run: levels images only" in book.markdown()


def test_a_run_of_all_levels_is_as_required_without_a_restriction(book, make_verdict):
    book.write(book.header(plan={"families": ["idefics3"], "levels": list(LEVELS), "select": ""}), [make_verdict("a")])
    text = book.markdown()
    assert "as required" in text
    assert "as far as it was run" not in text


def test_a_file_that_is_named_twice_is_read_once(book, make_verdict):
    path = book.write(book.header(), [make_verdict("a")])
    results = load([book.folder, path])
    assert len(results.newest) == 1
    assert results.older == ()


def test_of_two_copies_of_a_run_the_finished_one_counts(book, make_verdict, tmp_path):
    header = book.header()
    whole = book.write(header, [make_verdict("a"), make_verdict("b")])
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:2]))
    assert [run.path for run in load([copy, whole]).newest] == [whole]


def test_a_missing_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load([tmp_path / "nowhere"])


def test_a_directory_without_results_is_a_usage_error(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UsageError, match="holds no results file"):
        load([tmp_path])


def test_a_directory_with_nothing_but_foreign_files_is_a_usage_error(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match=r"other\.jsonl: no results file"):
        load([tmp_path])


def test_a_foreign_file_beside_good_ones_is_one_sentence_on_the_page(book, make_verdict):
    book.write(book.header(), [make_verdict("a")])
    (book.folder / "zero.jsonl").write_bytes(b"")
    problems = load([book.folder]).problems
    assert len(problems) == 1
    assert "zero.jsonl" in problems[0]
    assert "zero.jsonl" in book.page().by_id("summary").text


def test_a_run_without_footer_says_how_far_it_came(book, make_verdict):
    path = book.write(book.header(), [make_verdict("a"), make_verdict("b")], finish=False)
    assert "after 2 rows" in why_incomplete(load([path]).newest[0])


def test_half_a_line_at_the_end_is_counted_as_damage_and_the_rest_is_kept(book, make_verdict):
    path = book.write(book.header(), [make_verdict("a"), make_verdict("b")], finish=False)
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    run = load([path]).newest[0]
    assert [row.case for row in run.verdicts] == ["a"]
    assert "1 line of its file cannot be read" in why_incomplete(run)


def test_a_lost_row_in_front_of_the_footer_makes_the_run_incomplete(book, make_verdict):
    path = book.write(book.header(), [make_verdict("a"), make_verdict("b")])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert "counts 2 rows, its file has 1" in why_incomplete(load([path]).newest[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("values_s", [["fast"]]),
        ("values_s", [[-1.0]]),
        ("values_s", [[float("nan")]]),
        ("tp", "two"),
        ("tp", 0),
        ("state", "splendid"),
        ("shape", [1, 2]),
        ("reason", 7),
    ],
)
def test_a_measurement_of_the_wrong_type_is_damage_and_not_a_figure(book, make_measurement, key, value):
    path = book.write(book.header("perf"), [make_measurement("prefill", [[0.1]]), make_measurement("vision", [[0.2]])])
    lines = path.read_text().splitlines()
    row = json.loads(lines[1])
    lines[1] = json.dumps({**row, key: value})
    path.write_text("\n".join(lines) + "\n")
    run = load([path]).newest[0]
    assert [cell.phase for cell in run.measurements] == ["vision"]
    assert not run.complete, f"a run with {key}={value!r} in a row was taken as complete"


@pytest.mark.parametrize("key", ["info", "machine", "plan", "subject"])
def test_a_header_field_of_the_wrong_type_makes_the_file_useless(book, make_verdict, key):
    path = book.write(book.header(), [make_verdict("a")])
    lines = path.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), key: 5})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match="header is damaged"):
        load([path])


def test_a_verdict_with_a_worst_that_is_no_number_is_damage(book, make_verdict):
    path = book.write(book.header(), [replace(make_verdict("a"), worst=0.5)])
    path.write_text(path.read_text().replace('"worst": 0.5', '"worst": "small"'))
    run = load([path]).newest[0]
    assert run.verdicts == ()
    assert run.damaged == 1
