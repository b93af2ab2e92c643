"""The section of the harness's self-check."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from vlmqual_contract.errors import EXIT_OK, UsageError
from vlmqual_reports import selfchecks
from vlmqual_reports.command import command


def write(folder: Path, **changes: Any) -> Path:
    line = {"truth": "<b>calls wait</b>", "phase": "decode", "tp": 4, "samples": 1100}
    line |= {"mean_s": 1.25e-3, "true_mean_s": 1.24e-3, "p99_s": 2.02e-3, "true_p99_s": 2e-3}
    whole = {
        "format": 1,
        "right": False,
        "compared": [line, {**line, "phase": "vision", "samples": 44, "p99_s": None, "true_p99_s": None}],
        "accepted": {"disturbed": 90, "disturbed_valid": 3, "clean": 20, "clean_valid": 19},
        "overhead_s": 1.15e-5,
        **changes,
    }
    path = folder / "selfcheck.json"
    path.write_text(json.dumps(whole), "utf-8")
    return path


def test_errors_are_in_microseconds_and_percent(tmp_path):
    found = selfchecks.read(write(tmp_path))
    decode, vision = found.lines
    assert decode.error_us == pytest.approx(10.0)
    assert decode.p99_error == pytest.approx(0.01)
    assert (vision.p99_ms, vision.p99_error) == (None, None)
    assert found.overhead_us == pytest.approx(11.5)


def test_the_page_shows_every_phase_and_what_was_accepted(tmp_path):
    write(tmp_path)
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = parser.parse_args([str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert command.run(arguments) == EXIT_OK, "a busy machine's self-check is shown and fails no report"
    html, markdown = ((tmp_path / name).read_text("utf-8") for name in ("page.html", "page.md"))
    for text in (html, markdown):
        assert "3 were accepted as valid" in text
        assert "self-check of the harness: failed" in text
        assert "+1.00 %" in text
    assert "<b>calls wait</b>" not in html


@pytest.mark.parametrize("changes", [{"format": 9}, {"compared": [{}]}, {"accepted": {"disturbed": 1}}])
def test_a_damaged_file_is_named(tmp_path, changes):
    with pytest.raises(UsageError, match=r"selfcheck\.json"):
        selfchecks.read(write(tmp_path, **changes))
