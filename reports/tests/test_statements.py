from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from vlmqual_reports.statements import installed_statements

TABLE = """
[[requirement]]
id = "IDEFICS3-IMG-001"
family = "idefics3"
level = "images"
keyword = "MUST"
subject = "target"
statement = "Images are resized."
citation = [{ document = "a", version = "1", section = "b" }]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "suite_for_statements" / "requirements"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('the suite was imported')\n")
    (folder / "idefics3.toml").write_text(TABLE)
    monkeypatch.syspath_prepend(tmp_path)
    points = {"idefics3": EntryPoint("idefics3", "suite_for_statements.requirements", "vlmqual.requirements")}
    monkeypatch.setattr("vlmqual_reports.statements.installed", lambda group: points)
    return folder


def test_sentences_are_found_without_importing_the_suite(package):
    found = installed_statements()
    assert found.text("IDEFICS3-IMG-001") == "Images are resized."
    assert found.problems == ()
    assert "suite_for_statements" not in sys.modules


def test_an_unknown_id_has_no_sentence(package):
    assert installed_statements().text("IDEFICS3-IMG-999") == ""


def test_a_damaged_file_costs_its_own_sentences_only(package):
    (package / "mllama.toml").write_text("[[requirement]\n")
    found = installed_statements()
    assert list(found.by_id) == ["IDEFICS3-IMG-001"]
    assert len(found.problems) == 1
    assert "mllama.toml" in found.problems[0]


def test_a_package_that_is_not_there_is_one_sentence(monkeypatch):
    points = {"x": EntryPoint("x", "no_such_package.requirements", "vlmqual.requirements")}
    monkeypatch.setattr("vlmqual_reports.statements.installed", lambda group: points)
    found = installed_statements()
    assert dict(found.by_id) == {}
    assert found.problems == ("requirements x: the package 'no_such_package.requirements' is not installed",)
