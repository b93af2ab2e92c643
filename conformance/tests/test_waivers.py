from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from vlmqual_conformance import sessions, waivers
from vlmqual_conformance.policy import FACTOR, Judge
from vlmqual_conformance.waivers import Waiver
from vlmqual_contract import cli
from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Outcome, Run, read

pytestmark = pytest.mark.usefixtures("copied")
ANIMALS = Path(__file__).with_name("targets") / "animals.py"
TODAY = date(2027, 1, 15)
CASE = "test_vision.py::test_image_features_are_within_budget"
REASON = "the tower computes in halves until firmware 7"


def written(folder: Path, *tables: dict[str, object]) -> Path:
    lines = []
    for table in tables:
        values = (f"{key} = {value if key == 'expires' else json.dumps(value)}" for key, value in table.items())
        lines += ["[[waiver]]", *values]
    path = folder / "ours.toml"
    path.write_text("\n".join(lines))
    return path


def table(**changes: object) -> dict[str, object]:
    made = {"case": f"{CASE}[photo-small]", "budget": 1e5, "reason": REASON, "expires": "2099-01-01", **changes}
    return {key: value for key, value in made.items() if value is not None}


# files ---------------------------------------------------------------------------------------------------------------


def test_a_file_of_waivers_is_read(tmp_path):
    changed = {"golden": "mllama/*", "old": "1", "new": "2", "reason": "r", "expires": "2099-01-01"}
    first, second = waivers.load([written(tmp_path, table(dtype=["bfloat16"]), changed)])
    assert (first.case, first.component, first.dtypes, first.budget) == (
        f"{CASE}[photo-small]",
        "*",
        ("bfloat16",),
        1e5,
    )
    assert (second.golden, second.old, second.new, second.file) == ("mllama/*", "1", "2", "ours.toml")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"case": None}, "the waiver of 'nothing' has to have one of case and golden"),
        ({"golden": "mllama/*"}, "has to have one of case and golden"),
        ({"reason": None}, "lacks reason, a string"),
        ({"reason": " "}, "lacks reason, a string"),
        ({"expires": '"soon"'}, "lacks expires, a date such as 2026-06-30"),
        ({"budget": 1}, "has budget 1; a multiple of the derived budget above 1 is valid"),
        ({"budget": True}, "has budget True"),
        ({"budget": None}, "has budget None"),
        ({"dtype": "bfloat16"}, "has dtype 'bfloat16'; a list of names is valid"),
        ({"tolerance": 3}, "has the unknown keys tolerance; known are budget, case, component"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, change, sentence):
    with pytest.raises(UsageError, match=sentence):
        waivers.load([written(tmp_path, table(**change))])


def test_an_expired_waiver_of_a_user_is_refused(tmp_path):
    path = written(tmp_path, table(expires="2027-01-14"))
    with pytest.raises(UsageError, match=rf"expired on 2027-01-14 \({REASON}\); renew or remove it"):
        waivers.load_live([path], TODAY)
    assert waivers.load_live([path], date(2027, 1, 14)), "it holds on its last day"


def test_the_waivers_of_the_suite_can_be_read():
    assert all(waiver.reason for waiver in waivers.load([waivers.OURS]))


# the judge -----------------------------------------------------------------------------------------------------------


def judge(**changes: object) -> Judge:
    waiver = Waiver(**{"reason": REASON, "expires": TODAY, "file": "", "case": "*", "budget": 3.0, **changes})
    return Judge("bfloat16", waivers=(waiver,))


def compare(made: Judge, component: str, times: float) -> None:
    """An error of so many times its budget."""
    gold = np.ones((1, 4))
    made.compare(component, gold * 1.5, gold, 0.5 / FACTOR / times)


@pytest.mark.parametrize("change", [{}, {"component": "prefill/*"}, {"dtypes": ("bfloat16", "float16")}])
def test_an_error_within_the_waiver_passes_and_says_by_which(change):
    made = judge(**change)
    compare(made, "prefill/logits", 2.9)
    made.verdict()
    assert waivers.used(made.waived) == {
        "waiver": REASON,
        "waiver expires": "2027-01-15",
        "waived": ["prefill/logits"],
    }


@pytest.mark.parametrize("change", [{"budget": 2.8}, {"component": "decode/*"}, {"dtypes": ("float16",)}])
def test_an_error_outside_the_waiver_fails(change):
    made = judge(**change)
    compare(made, "prefill/logits", 2.9)
    with pytest.raises(AssertionError, match=r"prefill/logits is 2\.9 times its budget"):
        made.verdict()
    assert not made.waived


def test_a_component_without_a_waiver_still_fails_beside_one_that_has_it():
    made = judge(component="connector")
    compare(made, "connector", 2.0)
    compare(made, "prefill/logits", 1.5)
    with pytest.raises(AssertionError, match=r"^prefill/logits is 1\.5 times its budget"):
        made.verdict()


def test_a_case_within_its_budget_needs_no_waiver():
    made = judge()
    compare(made, "prefill/logits", 0.9)
    made.verdict()
    assert waivers.used(made.waived) == {}


# a run ---------------------------------------------------------------------------------------------------------------


TARGET = f"{ANIMALS}:Zoo:animals=photo-small~half-features+two-images~half-features"


def only_run(folder: Path) -> Run:
    (file,) = folder.glob("*.jsonl")
    return read(file)


def conformance(folder: Path, *tables: dict[str, object]) -> int:
    only = ["--family", "idefics3", "--level", "vision", "--no-library", "--results", str(folder / "results")]
    return cli.main(["conformance", "--target", TARGET, *only, "--waivers", str(written(folder, *tables))])


def test_a_case_that_passes_by_a_waiver_is_marked_in_its_verdict_the_header_and_the_summary(tmp_path, capfd):
    path, cases = written(tmp_path, table(component="features/*")), (f"{CASE}[photo-small]", f"{CASE}[strip]")
    results = tmp_path / "results"
    ended = sessions.run(sessions.Session("target", TARGET, results, 60, cases=cases, waivers=(path,)))
    assert ended.exit == 0
    found = only_run(results)
    row, other = sorted(found.verdicts, key=lambda verdict: verdict.case)
    assert (row.outcome, other.outcome) == (Outcome.PASS, Outcome.PASS)
    assert row.worst is not None
    assert row.worst > 1, "the verdict does not hide how far it is out"
    assert (row.details["waiver"], row.details["waiver expires"]) == (REASON, "2099-01-01")
    assert "waiver" not in other.details
    (listed,) = found.header.plan["waivers"]
    assert (listed["reason"], listed["expires"], listed["budget"]) == (REASON, "2099-01-01", 1e5)
    output = capfd.readouterr().out
    assert "2 pass (1 by a waiver)" in output
    assert f"WAIVED 1 case until 2099-01-01: {REASON}"[:60] in output


def test_a_waiver_that_names_no_case_is_a_failure_and_does_not_help_others(tmp_path):
    assert conformance(tmp_path, table(case="IDEFICS3-VIS-999")) == 1
    rows = {row.case: row for row in only_run(tmp_path / "results").verdicts}
    assert rows["ours.toml::IDEFICS3-VIS-999"].outcome is Outcome.FAIL
    assert "names nothing" in rows["ours.toml::IDEFICS3-VIS-999"].reason
    assert rows[f"{CASE}[photo-small]"].outcome is Outcome.FAIL


def test_an_expired_waiver_ends_the_run_before_it_begins(tmp_path, capfd):
    assert conformance(tmp_path, table(expires="2020-01-01")) == 2
    assert not (tmp_path / "results").exists()
    assert "expired on 2020-01-01" in capfd.readouterr().err
