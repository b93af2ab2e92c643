from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vlmqual_conformance import failures
from vlmqual_conformance.failures import Failure, judge, load_known
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Outcome

TODAY = date(2026, 1, 15)
ENTRY = Failure(
    "lib", SpecifierSet(">=5"), "test_x.py::test_y[a-1]", "it is upside down", date(2026, 1, 15), file="l.toml"
)
TABLE = """
[[failure]]
library = "lib"
versions = ">=5,<6"
case = "test_x.py::*"
reason = "it is upside down"
expires = 2026-06-30
"""


def test_a_known_failure_is_expected_until_its_last_day():
    judged = judge(Outcome.FAIL, "5 is not 7", [ENTRY], TODAY)
    assert judged.outcome is Outcome.EXPECTED_FAIL
    assert judged.reason == "it is upside down"
    assert judged.details == {"expires": "2026-01-15", "observed": "fail: 5 is not 7"}


def test_an_expired_known_failure_fails_and_says_so():
    judged = judge(Outcome.FAIL, "5 is not 7", [ENTRY], date(2026, 1, 16))
    assert judged.outcome is Outcome.FAIL
    assert judged.reason == "the known failure expired on 2026-01-15: it is upside down; observed: 5 is not 7"


def test_a_known_failure_that_passes_fails():
    judged = judge(Outcome.PASS, "", [ENTRY], TODAY)
    assert judged.outcome is Outcome.FAIL
    assert judged.reason == "expected to fail but passed: it is upside down; remove it from l.toml"


def test_a_crash_does_not_hide_behind_a_known_wrong_answer():
    judged = judge(Outcome.ERROR, "signal SIGSEGV", [ENTRY], TODAY)
    assert judged.outcome is Outcome.ERROR
    assert "a fail was expected" in judged.reason
    assert (
        judge(Outcome.ERROR, "SIGSEGV", [replace(ENTRY, outcome=Outcome.ERROR)], TODAY).outcome is Outcome.EXPECTED_FAIL
    )


def test_what_is_not_applicable_stays_so():
    assert judge(Outcome.NOT_APPLICABLE, "no taps", [ENTRY], TODAY).outcome is Outcome.NOT_APPLICABLE


def test_cases_without_an_entry_keep_their_outcome():
    assert judge(Outcome.PASS, "", [], TODAY).outcome is Outcome.PASS
    assert judge(Outcome.FAIL, "5 is not 7", [], TODAY).reason == "5 is not 7"


@pytest.mark.parametrize(
    ("case", "name", "ids", "named"),
    [
        ("test_x.py::test_y[a-1]", "test_x.py::test_y[a-1]", (), True),
        ("test_x.py::test_y[a-1]", "test_x.py::test_y[b-1]", (), False),
        ("test_x.py::test_y[a]", "test_x.py::test_ya", (), False),
        ("test_x.py::test_y*", "test_x.py::test_y[a-1]", (), True),
        ("*[?-1]", "test_x.py::test_y[a-1]", (), True),
        ("IDEFICS3-IMG-016", "test_x.py::test_y", ("IDEFICS3-IMG-001", "IDEFICS3-IMG-016"), True),
        ("IDEFICS3-IMG-016", "test_x.py::test_y", ("IDEFICS3-IMG-001",), False),
    ],
)
def test_brackets_of_a_case_name_are_no_wildcards(case, name, ids, named):
    assert replace(ENTRY, case=case).names(name, ids) is named


@pytest.mark.parametrize(
    ("library", "version", "concerned"),
    [("lib", "5.0.0", True), ("lib", "5.23.0.dev1", True), ("lib", "4.46.3", False), ("other", "5.1", False)],
)
def test_an_entry_is_about_some_versions_of_one_library(library, version, concerned):
    assert ENTRY.concerns(library, version) is concerned


def test_an_entry_can_be_limited_to_dtypes_and_runtimes():
    entry = replace(ENTRY, dtypes=("float64",), runtime="torch eager *")
    assert entry.concerns("lib", "5.1", "float64", "torch eager 2.13.0")
    assert not entry.concerns("lib", "5.1", "float32", "torch eager 2.13.0")
    assert not entry.concerns("lib", "5.1", "float64", "torch sdpa 2.13.0")
    assert not entry.concerns("lib", "5.1"), "a library run has no dtype, so the entry is not about it"


def test_a_file_is_read(tmp_path: Path):
    (tmp_path / "l.toml").write_text(TABLE)
    (entry,) = load_known([tmp_path / "l.toml"])
    assert (entry.library, entry.case, entry.expires, entry.outcome) == (
        "lib",
        "test_x.py::*",
        date(2026, 6, 30),
        "fail",
    )
    assert entry.file == "l.toml"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('library = "lib"', "", "lacks library"),
        ("2026-06-30", '"soon"', "lacks expires, a date"),
        (">=5,<6", "new", "has versions 'new'"),
        ("reason", "why", "has the unknown keys why"),
        ("[[failure]]", "[[failure]]\noutcome = 'pass'", "has outcome 'pass'; valid are fail, error"),
        ("[[failure]]", "[[failure", "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, old, new, sentence):
    (tmp_path / "l.toml").write_text(TABLE.replace(old, new))
    with pytest.raises(UsageError, match=sentence):
        load_known([tmp_path / "l.toml"])


def test_the_files_of_the_suite_can_be_read_and_give_reasons():
    entries = load_known()
    assert entries, f"there are no known failures in {failures.FOLDER}"
    for entry in entries:
        assert len(entry.reason.split()) >= 4, f"{entry.file}: {entry.case}: {entry.reason!r} is no reason"
