from __future__ import annotations

from datetime import date

import pytest

from vlmqual_reports.conformance import summarize
from vlmqual_reports.load import load
from vlmqual_reports.statements import Statements

ALL = ("error", "fail", "expected-fail", "pass", "not-applicable")


def marks(book, name, statements=None):
    found = summarize(load([book.folder]).newest, statements or Statements(), date(2027, 1, 15))
    return next(row.marks for level in found.levels for row in level.rows if row.id == name)


def test_a_run_as_required_says_so_with_its_counts(book, make_verdict):
    book.write(book.header(), [make_verdict("a"), make_verdict("b")])
    card = book.page().by_id("summary").all("article")[0]
    assert card.all("p", "verdict")[0].text == "✓ as required"
    assert "2 pass" in card.text
    assert "vlmqual conformance --target eager:device=cpu" in card.text
    assert "bench-07" in card.text
    assert "64.0 GiB" in card.text


def test_failed_requirements_are_counted_once_however_many_cases_fail(book, make_verdict):
    book.write(
        book.header(),
        [
            make_verdict("a", "fail", ["IDEFICS3-IMG-001", "IDEFICS3-IMG-002"], reason="too bright"),
            make_verdict("b", "error", ["IDEFICS3-IMG-002"], reason="it crashed"),
            make_verdict("c", "pass", ["IDEFICS3-IMG-003"]),
        ],
    )
    card = book.page().by_id("summary").all("article")[0]
    assert card.all("p", "verdict")[0].text == "✗ failed: 2 requirements"
    assert "✗ failed: 2 requirements" in book.markdown()


def test_a_failing_case_without_a_requirement_is_not_lost(book, make_verdict):
    book.write(book.header(), [make_verdict("a", "fail", [], reason="odd"), make_verdict("b")])
    assert "failed: 1 case without a requirement" in book.page().by_id("summary").text


def test_the_five_outcomes_stand_apart_in_the_matrix(book, make_verdict):
    rows = []
    for number, outcome in enumerate(ALL, start=1):
        rows += [make_verdict(f"{outcome}-{index}", outcome, reason="r") for index in range(number)]
    book.write(book.header(), rows)
    table = book.page().by_id("levels").rows()
    assert table[0][:2] == ["family", "level"]
    expected = "! 1 error ✗ 2 fail △ 3 expected fail ✓ 4 pass \N{EN DASH} 5 not applicable"
    assert table[1] == ["idefics3", "images", expected]


@pytest.mark.parametrize("better", range(1, len(ALL)))
@pytest.mark.parametrize("worse", range(len(ALL) - 1))
def test_a_requirement_has_the_worst_outcome_of_its_cases(book, make_verdict, worse, better):
    if worse >= better:
        worse, better = better, worse
    book.write(book.header(), [make_verdict("x", ALL[better], reason="x"), make_verdict("y", ALL[worse], reason="y")])
    mark = marks(book, "IDEFICS3-IMG-001")[0]
    assert mark.status == ALL[worse]
    assert mark.cases == 2


def test_headroom_is_that_of_the_worst_case_and_names_its_component(book, make_verdict):
    book.write(
        book.header(),
        [
            make_verdict("a", worst=0.25, component="vision.layers.0", dtype="float32"),
            make_verdict("b", worst=0.75, component="connector", dtype="float32"),
            make_verdict("c"),
        ],
    )
    mark = marks(book, "IDEFICS3-IMG-001")[0]
    assert (mark.worst, mark.component) == (0.75, "connector")
    page = book.page()
    assert "0.75 of its budget among passed cases, at connector" in page.by_id("summary").text
    assert "0.75" in page.by_id("requirements").text


def test_what_a_target_seems_to_compute_in_stands_in_the_summary(book, make_verdict):
    seems = {"says": "computes like <float32>, finer than declared; declared bfloat16", "accused": False}
    book.write(book.header(), [make_verdict("a", details={"precision": seems})])
    page = book.page()
    assert f"precision idefics3 {seems['says']}" in page.by_id("summary").text
    assert "declared bfloat16" in book.markdown()


def test_a_failure_is_listed_with_reason_component_error_and_what_was_observed(book, make_verdict, make_requirement):
    book.statements = Statements({"IDEFICS3-IMG-001": make_requirement("IDEFICS3-IMG-001")})
    book.write(
        book.header(),
        [
            make_verdict(
                "logits[photo]",
                "fail",
                reason="step 3 leaves its budget",
                worst=3.25,
                component="text.layers.1",
                dtype="bfloat16",
                details={"seed": 987, "note": "row 1"},
            )
        ],
    )
    text = book.page().by_id("failures").text
    for part in ("logits[photo]", "step 3 leaves its budget", "3.25", "text.layers.1", "bfloat16", "987", "row 1"):
        assert part in text, f"the list of failures does not show {part!r}"
    assert "The sentence of IDEFICS3-IMG-001." in text


def test_an_unfinished_run_is_never_shown_as_passed(book, make_verdict):
    book.write(book.header(), [make_verdict("a"), make_verdict("b")], finish=False)
    page = book.page()
    line = page.by_id("summary").all("p", "verdict")[0].text
    assert line.startswith("◐ incomplete: conformance: it was stopped or is still running after 2 rows")
    assert page.all("span", "pass") == [], "a mark of the class pass stands on the page of an unfinished run"
    assert "as required" not in page.by_id("summary").text
    assert page.by_id("levels").rows()[1][2] == "◐ 2 passed so far"
    assert marks(book, "IDEFICS3-IMG-001")[0].status == "so-far"
    assert "✓" not in page.by_id("requirements").text
    assert "✓" not in book.markdown()


def test_no_failures_so_far_is_not_said_as_none(book, make_verdict):
    book.write(book.header(), [make_verdict("a")], finish=False)
    assert "None so far; a run is incomplete." in book.page().by_id("failures").text


def test_a_killed_file_with_half_a_line_keeps_its_rows_and_is_incomplete(book, make_verdict):
    path = book.write(book.header(), [make_verdict("a", "fail", reason="wrong"), make_verdict("b")], finish=False)
    path.write_bytes(path.read_bytes()[:-30])
    text = book.page().by_id("summary").text
    assert "failed: 1 requirement; and incomplete:" in text
    assert "1 line of its file cannot be read" in text
    assert "wrong" in book.page().by_id("failures").text


def test_a_run_in_which_nothing_could_be_judged_is_not_as_required(book, make_verdict):
    book.write(book.header(), [make_verdict("a", "not-applicable", reason="no vision")])
    assert "incomplete: no case could be judged" in book.page().by_id("summary").text


def test_a_run_without_rows_is_not_as_required(book):
    book.write(book.header(), [])
    page = book.page()
    assert "incomplete: no case could be judged" in page.by_id("summary").text
    assert "no case" in page.by_id("levels").text


def test_an_expected_failure_shows_its_reason_and_its_expiry(book, make_verdict):
    row = make_verdict("a", "expected-fail", reason="5.x renamed a keyword", details={"expires": "2027-06-30"})
    book.write(book.header(), [row, make_verdict("b")])
    page = book.page()
    text = page.by_id("expected").text
    assert "5.x renamed a keyword" in text
    assert "2027-06-30" in text
    assert "expired" not in text
    assert "✓ as required, with 1 expected failure" in page.by_id("summary").text
    assert "2027-06-30" in book.markdown()


@pytest.mark.parametrize(("until", "line"), [("2027-01-14", "failed"), ("2027-01-15", "as required")])
def test_an_expected_failure_past_its_expiry_is_a_failure(book, make_verdict, until, line):
    # The page's day is 2027-01-15; a failure is accepted up to and including its last day.
    book.write(book.header(), [make_verdict("a", "expected-fail", reason="known", details={"expires": until})])
    page = book.page()
    assert f"{line}" in page.by_id("summary").all("p", "verdict")[0].text
    assert ("expired" in page.by_id("expected").text) == (line == "failed")


def test_an_expected_failure_without_expiry_is_told(book, make_verdict):
    book.write(book.header(), [make_verdict("a", "expected-fail", reason="known")])
    assert "no expiry given" in book.page().by_id("expected").text


def test_cases_that_are_not_applicable_are_grouped_by_reason(book, make_verdict):
    rows = [make_verdict(f"c{n}", "not-applicable", [f"IDEFICS3-IMG-00{n}"], reason="no taps") for n in range(1, 4)]
    book.write(book.header(), [*rows, make_verdict("d", "not-applicable", reason="no batch"), make_verdict("e")])
    table = book.page().by_id("not-applicable").rows()
    assert [(row[1], row[2]) for row in table[1:]] == [("no taps", "3"), ("no batch", "1")]


def test_requirements_without_a_case_are_listed_as_not_run(book, make_verdict, make_requirement):
    names = {
        name: make_requirement(name, subject=subject)
        for name, subject in (
            ("IDEFICS3-IMG-001", "target"),
            ("IDEFICS3-IMG-002", "target"),
            ("IDEFICS3-CFG-001", "library"),
        )
    }
    names["MLLAMA-IMG-001"] = make_requirement("MLLAMA-IMG-001", family="mllama")
    book.statements = Statements(names)
    book.write(book.header(), [make_verdict("a")])
    page = book.page()
    listed = page.by_id("not-applicable").text
    assert "1 requirement without a case" in listed
    assert "IDEFICS3-IMG-002" in listed
    assert "IDEFICS3-CFG-001" not in listed, "a library's requirement is not missing from a target's run"
    assert "MLLAMA-IMG-001" not in page.text, "a family that no run covers does not belong on the page"
    assert marks(book, "IDEFICS3-CFG-001", book.statements)[0].status == "elsewhere"
    assert marks(book, "IDEFICS3-IMG-002", book.statements)[0].status == "not-run"
    assert "The sentence of IDEFICS3-IMG-001." in page.by_id("requirements").text


def test_calibration_and_emulation_are_said_in_words(book, make_verdict):
    book.write(book.header(subject="transformers", plan={"calibration": True}), [make_verdict("a")])
    book.write(book.header(subject="rbln", info={"device": "RBLN-CA25", "emulated": True}), [make_verdict("a")])
    cards = {card.all("code")[0].text: card.text for card in book.page().by_id("summary").all("article")}
    assert "calibration" in cards["transformers"]
    assert "emulated" not in cards["transformers"]
    assert "no figure of this target says anything about a device" in cards["rbln"]
    assert "calibration" not in cards["rbln"]
    assert "transformers (calibration)" in book.markdown()
    assert "rbln (emulated)" in book.markdown()


def test_subjects_share_a_table_but_not_their_counts(book, make_verdict):
    book.write(book.header(subject="one"), [make_verdict("a")])
    book.write(book.header(subject="two"), [make_verdict("a", "fail", reason="no")])
    table = book.page().by_id("levels").rows()
    assert table[0][2:] == ["one", "two"]
    assert table[1][2:] == ["✓ 1 pass", "✗ 1 fail"]
    assert "2 subjects: 1 failed, 1 as required" in book.page().by_id("summary").text


def test_machines_that_differ_are_named_with_what_differs(book, make_verdict):
    book.write(book.header(subject="one"), [make_verdict("a")])
    book.write(book.header(subject="two", machine={"host": "bench-08", "processor": "Some CPU"}), [make_verdict("a")])
    text = book.page().by_id("summary").text
    assert "differ in host, cores, memory bytes;" in text
