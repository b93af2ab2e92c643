"""The section of a proof: what was caught, by which rule, and what must not be."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlmqual_contract.errors import UsageError
from vlmqual_reports import proofs
from vlmqual_reports.command import command
from vlmqual_reports.load import load

HOSTILE = "<script>alert(1)</script>\"'&amp;</td></table>| **x** `y` {{ 7*7 }} \ud800 \n# h"
CAUGHT, MISSED, ALSO = "IDEFICS3-VIS-001", "IDEFICS3-VIS-002", "IDEFICS3-TEXT-001"


def trial(variant: str = "gate-missing", profile: str = "taps", **changes: Any) -> dict[str, Any]:
    values = {
        "family": "idefics3",
        "variant": variant,
        "kind": "fault",
        "level": "vision",
        "profile": profile,
        "caught": True,
        "declared": True,
        "expected_by": [CAUGHT],
        "by": [CAUGHT, ALSO],
        "missed": [],
        "cases": [2, 40],
        "component": "connector",
        "expected": "connector",
        "worst": 7.5,
        "reason": "connector is 7.5 times its budget",
        "rules": {"cosine": False},
        "derived": False,
        "seconds": 2.0,
    }
    return {**values, **changes}


def proof(*trials: dict[str, Any], **changes: Any) -> dict[str, Any]:
    rule = {"rule": "cosine", "title": "cosine >= 0.99", "faults": 4, "caught": 3, "honest": 2, "rejected": 1}
    values = {
        "format": 2,
        "suite": "0.6.0",
        "started": "2027-01-10T08:00:00+01:00",
        "mode": "quick",
        "wall_s": 321.5,
        "jobs": 2,
        "cores": 2,
        "comparison": {"idefics3": [rule]},
        "unproven": [],
        "wrong": [],
        "doubtful": [],
        "variants": {"idefics3": {"gate-missing": "the gate is not there"}},
        "trials": list(trials),
    }
    return {**values, **changes}


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "proof.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


HONEST = trial("honest-split", kind="honest", caught=False, expected_by=[], by=[], component="", expected="")
SURVIVED = trial("late", caught=False, declared=False, by=[], missed=[MISSED], expected_by=[MISSED], component="")
NARROW = trial("gate-missing", "last-logits", derived=True, declared=False, by=[ALSO], missed=[CAUGHT], component="")


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(item) for item in arguments]))


def test_rates_are_counted_by_family_and_profile_and_say_when_they_are_derived(book) -> None:
    write(book.folder, proof(trial(), SURVIVED, NARROW, HONEST))
    rows = book.page().by_id("proof").rows()
    assert ["taps", "1 of 2 (50.0%)", "1 of 2 (50.0%)", "1 of 1 (100.0%)", "0 of 1"] in rows
    derived = "last-logits derived from the trials with taps"
    assert [derived, "1 of 1 (100.0%)", "0 of 1 (0.0%)", "\N{EN DASH}", "0 of 0"] in rows
    text = book.markdown()
    assert "| taps | 1 of 2 (50.0%) | 1 of 2 (50.0%) | 1 of 1 (100.0%) | 0 of 1 |" in text
    assert "last-logits (derived from the trials with taps)" in text


def test_rules_of_comparison_stand_beside_each_other(book) -> None:
    write(book.folder, proof(trial()))
    assert ["cosine >= 0.99", "3 of 4 (75.0%)", "1 of 2"] in book.page().by_id("proof").rows()
    assert "| cosine &gt;= 0.99 | 3 of 4 (75.0%) | 1 of 2 |" in book.markdown()


def test_the_matrix_has_a_cell_for_every_requirement_of_a_fault(book) -> None:
    write(book.folder, proof(trial(), SURVIVED))
    (table,) = book.page().by_id("proof").all("table", "matrix")
    head, *rows = table.rows()
    assert head == ["fault", ALSO, CAUGHT, MISSED]
    assert rows == [["gate-missing", "·", "●", ""], ["late", "", "✗"]]
    widths = [[int(cell.attributes.get("colspan", 1)) for cell in row.all("td")] for row in table.all("tr")[1:]]
    assert widths == [[1, 1, 1], [2, 1]]


def test_everything_that_must_not_be_is_said(book) -> None:
    wrong = ["SURVIVED  idefics3 late (taps)"]
    write(book.folder, proof(trial(), SURVIVED, wrong=wrong, unproven=["IDEFICS3-VIS-009"], doubtful=["COMPONENT x"]))
    for text in (book.page().by_id("proof").text, book.markdown()):
        for said in ("failed", "SURVIVED", "late", "IDEFICS3-VIS-009", "0.6.0", "2027-01-10"):
            assert said in text
    assert "the gate is not there" in book.page().by_id("proof").text


def test_a_proof_that_failed_fails_the_report(book, make_verdict, capsys) -> None:
    book.write(book.header(), [make_verdict("a")])
    path = write(book.folder / "proof", proof(trial()))
    assert run(book.folder) == 0
    assert f"{path}: as required" in capsys.readouterr().out
    write(book.folder / "proof", proof(trial(), unproven=["IDEFICS3-VIS-009"]))
    assert run(book.folder) == 1
    assert "proof of idefics3: failed" in (book.folder / "report.html").read_text("utf-8")


def test_a_proof_is_found_in_its_folder_in_the_folder_above_and_by_its_name(tmp_path) -> None:
    path = write(tmp_path / "results" / "proof", proof(trial()))
    for place in (path, path.parent, path.parent.parent):
        assert [each.path for each in load([place]).proofs] == [path]


def test_a_page_may_be_about_a_proof_alone(book) -> None:
    write(book.folder, proof(trial()))
    page = book.page()
    assert page.by_id("proof").text
    assert not [node for node in page.walk() if node.attributes.get("id") == "levels"]
    assert "# Qualification report" in book.markdown()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no proof, it is not JSON"),
        ("[" * 100_000, "no proof, it is not JSON"),
        ("[1]", "no proof, it has no format and trials"),
        ({"name": "another tool's"}, "no proof, it has no format and trials"),
        (proof(trial(), format=1), "its format is 1; this report reads format 2"),
        (proof(trial(caught="yes")), "damaged"),
        (proof(trial(by="all")), "damaged"),
        (proof({"family": "idefics3"}), "damaged"),
        (proof(trial(), trials=3), "damaged"),
        (proof(trial(), comparison={"idefics3": [{"title": "x"}]}), "damaged"),
        (proof(trial(), comparison=[]), "damaged"),
        (proof(trial(), variants=["x"]), "damaged"),
        (proof(trial(), wrong=[1]), "damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path, content, says) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UsageError, match=re.escape(str(path))) as raised:
        proofs.read(path)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_wrong_with_a_proof_stands_in_the_summary_and_the_run_is_incomplete(book, make_verdict) -> None:
    path = write(book.folder, proof(trial(), trials=3))
    with pytest.raises(UsageError) as raised:
        proofs.read(path)
    book.write(book.header(), [make_verdict("a")])
    assert str(raised.value) in book.page().by_id("summary").text
    assert run(book.folder) == 3


def test_text_of_a_proof_is_shown_as_text(book) -> None:
    values = dict.fromkeys(("variant", "level", "component", "expected", "reason", "profile", "family"), HOSTILE)
    lists = {name: [HOSTILE] for name in ("by", "missed", "expected_by")}
    rule = {"title": HOSTILE, "faults": 1, "caught": 1, "honest": 1, "rejected": 1}
    facts = {"suite": HOSTILE, "command": HOSTILE, "machine": {HOSTILE: HOSTILE}}
    write(
        book.folder,
        proof(
            {**trial(), **values, **lists},
            comparison={HOSTILE: [rule]},
            variants={HOSTILE: {HOSTILE: HOSTILE}},
            wrong=[HOSTILE],
            doubtful=[HOSTILE],
            unproven=[HOSTILE],
            **facts,
        ),
    )
    page = book.page()
    assert page.all("script") == []
    assert "<script" not in book.html()
    assert "<script>alert(1)</script>" in page.by_id("proof").text
    text = book.markdown()
    assert "<script" not in text
    table = 0
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line))
        if not line.startswith("|"):
            table = 0
            continue
        table = table or cells
        assert cells == table, f"a name broke a table: {line}"
