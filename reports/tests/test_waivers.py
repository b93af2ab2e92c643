from __future__ import annotations

import pytest

REASON = "the tower computes in halves until firmware 7"


def waiver(**changes):
    entry = {"case": "test_vision.py::*", "component": "connector", "dtype": ["float32"], "budget": 3.0}
    return {**entry, "reason": REASON, "expires": "2027-02-01", "file": "ours.toml", **changes}


def passed_by(make_verdict, name, **changes):
    details = {"waiver": REASON, "waiver expires": "2027-02-01", "waived": ["connector"], **changes}
    return make_verdict(name, worst=1.5, component="connector", details=details)


def plan(*waivers):
    return {"families": ["idefics3"], "waivers": list(waivers)}


def test_a_waiver_is_listed_with_what_it_allows_until_when_and_who_needed_it(book, make_verdict):
    rows = [make_verdict("plain"), passed_by(make_verdict, "dim")]
    book.write(book.header(plan=plan(waiver(), waiver(case="other", reason="not needed"))), rows)
    header, first, second = book.page().by_id("waivers").rows()
    assert header == ["run", "until", "allows", "reason", "cases that passed by it only"]
    assert first[1:] == [
        "△ 2027-02-01",
        "3.0 times the budget at connector in float32 test_vision.py::*",
        REASON,
        "dim 1.5 at connector",
    ]
    assert second[-1] == "none", "a waiver that nobody needed is listed as well"
    assert (
        f"| 2027-02-01 | 3.0 times the budget at connector in float32 (test\\_vision.py::\\*) | {REASON} | dim (1.5)"
        in (book.markdown())
    )


def test_a_subject_that_needed_a_waiver_says_so_in_its_verdict(book, make_verdict):
    rows = [
        passed_by(make_verdict, "dim"),
        passed_by(make_verdict, "dark"),
        make_verdict("old", "expected-fail", reason="r"),
    ]
    book.write(book.header(plan=plan(waiver())), rows)
    line = book.page().by_id("summary").all("article")[0].all("p", "verdict")[0].text
    assert line == "✓ as required, with 1 expected failure and 2 cases by a waiver"


def test_a_pass_by_a_waiver_is_a_failure_after_its_last_day(book, make_verdict):
    until = {"waiver expires": "2027-01-14"}  # pages are of 2027-01-15
    book.write(book.header(plan=plan(waiver(expires="2027-01-14"))), [passed_by(make_verdict, "dim", **until)])
    page = book.page()
    assert (
        page.by_id("summary").all("article")[0].all("p", "verdict")[0].text
        == "✗ failed: 1 case by a waiver past expiry"
    )
    assert page.by_id("waivers").rows()[1][1] == "✗ 2027-01-14, expired"


def test_changed_budgets_are_listed_by_their_goldens(book, make_verdict):
    entry = {"golden": "mllama/*", "reason": "made with torch 2.14", "expires": "2027-02-01", "file": "waivers.toml"}
    book.write(book.header(plan=plan(entry)), [make_verdict("a")])
    assert book.page().by_id("waivers").rows()[1][2] == "budgets that were changed mllama/*"


@pytest.mark.parametrize("listed", [None, "all", [3], [{}]])
def test_a_header_with_other_waivers_than_documented_is_still_shown(book, make_verdict, listed):
    book.write(book.header(plan={"families": ["idefics3"], "waivers": listed}), [make_verdict("a")])
    assert "as required" in book.page().by_id("summary").text


def test_a_run_without_waivers_says_none(book, make_verdict):
    book.write(book.header(), [make_verdict("a")])
    assert book.page().by_id("waivers").text == "Waivers None."
