"""Runs that are narrowed down to requirements."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmqual_conformance import catalogue
from vlmqual_contract import cli
from vlmqual_contract.records import Run, read

pytestmark = pytest.mark.usefixtures("copied")
HONEST = f"{Path(__file__).with_name('targets') / 'honest.py'}:Honest"


def vlmqual(*arguments: str | Path) -> int:
    return cli.main([str(item) for item in arguments])


def last_run(folder: Path) -> Run:
    return max((read(path) for path in folder.glob("*.jsonl")), key=lambda run: run.path.stat().st_mtime_ns)


def test_a_run_can_be_narrowed_down_to_requirements_and_is_another_run(tmp_path, capfd):
    ids = ("--requirement", "IDEFICS3-VIS-008", "--requirement", "IDEFICS3-VIS-002")
    assert vlmqual("conformance", "--target", HONEST, "--family", "idefics3", *ids, "--results", tmp_path) == 0
    run = last_run(tmp_path)
    assert len(run.verdicts) >= 3
    assert all({"IDEFICS3-VIS-008", "IDEFICS3-VIS-002"} & set(row.requirements) for row in run.verdicts)
    assert {name for row in run.verdicts for name in row.requirements} >= {"IDEFICS3-VIS-008", "IDEFICS3-VIS-002"}
    plan = run.header.plan
    assert plan["requirements"] == ["IDEFICS3-VIS-002", "IDEFICS3-VIS-008"]
    assert plan["select"] == "requirement IDEFICS3-VIS-002 or IDEFICS3-VIS-008", "a report says that it is a part"
    run.path.write_bytes(run.path.read_bytes().rpartition(b'{"record": "footer"')[0])
    only = ("--requirement", "IDEFICS3-VIS-008")
    assert vlmqual("conformance", "--target", HONEST, "--family", "idefics3", *only, "--results", tmp_path) == 0
    assert len(list(tmp_path.glob("*.jsonl"))) == 2, "an unfinished run of other requirements is not continued"
    assert {row.case for row in last_run(tmp_path).verdicts} < {row.case for row in run.verdicts}


def test_an_unknown_requirement_is_refused_with_those_near_it(tmp_path, capfd):
    assert vlmqual("conformance", "--target", HONEST, "--requirement", "IDEFICS3-VIS-0O8", "--results", tmp_path) == 2
    (sentence,) = capfd.readouterr().err.strip().splitlines()
    assert "--requirement IDEFICS3-VIS-0O8: there is no such requirement; near it are IDEFICS3-VIS-008" in sentence


def test_a_requirement_of_another_kind_of_subject_selects_nothing(tmp_path, capfd):
    library = next(item for item in catalogue.requirements().values() if item.subject == "library")
    arguments = ("--target", HONEST, "--no-library", "--requirement", library.id, "--results", tmp_path)
    assert vlmqual("conformance", *arguments) == 2
    assert "nothing is selected" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_requirements_that_are_asked_for(tmp_path, capfd):
    arguments = ("--target", HONEST, "--no-library", "--requirement", "IDEFICS3-VIS-008", "--results", tmp_path)
    assert vlmqual("conformance", "--dry-run", *arguments) == 0
    assert f"{HONEST}: 1 requirements" in capfd.readouterr().out
