"""The section of a gate: verdicts, what could have been seen, and launches that did not count."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, UsageError
from vlmqual_reports import gates
from vlmqual_reports.command import command
from vlmqual_reports.load import load

HOSTILE = "<script>alert(1)</script>\"'&amp;</td></table>| **x** `y` {{ 7*7 }} \ud800 \n# h"


def cell(verdict: str = "unchanged", **changes: Any) -> dict[str, Any]:
    values = {
        "case": f"idefics3-photo/{verdict}/tp1",
        "verdict": verdict,
        "reason": "",
        "change": 0.031,
        "low": 0.012,
        "high": 0.05,
        "pairs": 12,
        "excluded": [],
        "notes": [],
        "launches": [],
    }
    return {**values, **changes}


def gate(*cells: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = {
        "format": 1,
        "kind": "vlmqual gate",
        "suite": "0.7.0",
        "made": "2027-01-10T08:00:00+00:00",
        "machine": {"host": "bench", "processor": "a processor"},
        "paired": True,
        "arms": {"A": {"subject": "eager"}, "B": {"subject": "eager:attention=eager"}},
        "differs": [],
        "notes": [],
        "rule": {"pairs": 20, "margin": 0.03, "alpha": 0.01},
        "blocks": 6,
        "cells": list(cells),
        "forecast": {"source": "assumed", "launch_spread": 0.0136, "alone": {"smallest": 0.029}},
        "exit": 0,
    }
    return {**values, **changes}


def page(tmp_path: Path, content: dict[str, Any], code: int) -> tuple[str, str]:
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "gate.json").write_text(json.dumps(content))
    assert command.run(argparse.Namespace(results=[tmp_path], output=None, markdown=None)) == code
    return (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()


def test_both_pages_show_verdicts_changes_and_what_could_have_been_seen(tmp_path: Path) -> None:
    cells = [cell(), cell("regressed", excluded=["B 1.2 throttled: slower by 9 %"]), cell("cannot tell", reason="why")]
    for text in page(tmp_path, gate(*cells, exit=1), EXIT_FAILED):
        assert "1 regressed, 1 cannot tell, 1 unchanged" in text
        assert text.index("idefics3-photo/regressed/tp1") < text.index("idefics3-photo/unchanged/tp1"), "worst first"
        for words in ("+3.1 %", "+1.2 to +5.0 %", "B 1.2 throttled", "why", "+2.9 % in one cell is called regressed"):
            assert words in text.replace("\\", ""), words


def test_a_gate_alone_is_a_report_and_its_exit_code_is_the_reports(tmp_path: Path) -> None:
    page(tmp_path, gate(cell(), cell("improved")), EXIT_OK)
    (found,) = load([tmp_path / "gate"]).gates
    assert found.fine
    assert found.counts == {"improved": 1, "unchanged": 1}


def test_a_cell_that_was_never_looked_at_has_no_figures(tmp_path: Path) -> None:
    bare = {key: value for key, value in cell("cannot tell").items() if key not in ("change", "low", "high", "pairs")}
    html, _ = page(tmp_path, gate(bare), EXIT_OK)
    assert "nan" not in html.lower().replace("nanosecond", "")


def test_nothing_of_a_gate_file_becomes_markup(tmp_path: Path) -> None:
    bad = cell("regressed", case=HOSTILE, reason=HOSTILE, excluded=[HOSTILE], notes=[HOSTILE])
    arms = {"A": {"subject": HOSTILE}, "B": {"subject": HOSTILE}}
    content = gate(bad, arms=arms, notes=[HOSTILE], differs=[HOSTILE], exit=1, machine={"host": HOSTILE})
    html, markdown = page(tmp_path, content, EXIT_FAILED)
    assert "<script>" not in html
    assert "<script>" not in markdown
    assert "49" not in html.split('id="gate"')[1].split("</section>")[0].replace("249", "")
    rows = [line for line in markdown.splitlines() if "alert" in line and line.startswith("|")]
    assert len(rows) == 1, "a hostile name must not start a row of its own"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 9}, "its format is 9"),
        ({"kind": "else"}, "no gate"),
        ({"cells": [{}]}, "damaged"),
        ({"cells": [cell("fine")]}, "damaged"),
        ({"arms": {}}, "damaged"),
        ({"notes": "text"}, "damaged"),
    ],
)
def test_a_damaged_gate_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(gate(**changes)))
    with pytest.raises(UsageError, match=sentence):
        gates.read(path)
