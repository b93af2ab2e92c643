from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import vlmqual_conformance
from vlmqual_conformance.failures import load_known
from vlmqual_conformance.marks import NAME
from vlmqual_contract.requirement import load_requirements

PACKAGE = Path(vlmqual_conformance.__file__).parent
DOCUMENTED = PACKAGE / "requirements" / "idefics3.toml"
AREAS = {"CFG": 25, "MODEL": 33, "LM": 22, "IMG": 51, "PROC": 30, "CARD": 17}


@pytest.fixture(scope="module", autouse=True)
def known_mark(pytestconfig):
    pytestconfig.addinivalue_line("markers", f"{NAME}: what the suite's tests carry")


@pytest.fixture(scope="module")
def requirements():
    return load_requirements(sorted((PACKAGE / "requirements").glob("*.toml")))


@cache
def marked():
    """Test name, names of its fixtures and the ids of its marks, of every test in the suite."""
    found = []
    for path in sorted((PACKAGE / "suite").glob("test_*.py")):
        module = importlib.import_module(f"vlmqual_conformance.suite.{path.stem}")
        for name, test in vars(module).items():
            if name.startswith("test_"):
                arguments = set(inspect.signature(test).parameters)
                found.append((f"{path.name}::{name}", arguments, [*_ids(test.pytestmark)]))
    return found


def _ids(marks):
    for mark in marks:
        if mark.name == NAME:
            yield from mark.args
        if mark.name == "parametrize":
            for parameter in mark.args[1]:
                yield from _ids(getattr(parameter, "marks", ()))


def test_every_documented_statement_has_its_requirement():
    found = Counter()
    for name in load_requirements([DOCUMENTED]):
        match = re.fullmatch(r"IDEFICS3-([A-Z]+)-(\d{3})", name)
        assert match, f"{name} has another shape than IDEFICS3-AREA-NNN"
        found[match[1]] += 1
        assert 1 <= int(match[2]) <= AREAS[match[1]], f"{name} is outside of the numbers of its area"
    assert found == AREAS


def test_no_id_stands_in_two_files():
    found = Counter()
    for path in (PACKAGE / "requirements").glob("*.toml"):
        found.update(table["id"] for table in tomllib.loads(path.read_text("utf-8"))["requirement"])
    assert not [name for name, count in found.items() if count > 1]


def test_every_documented_statement_is_one_sentence_with_its_keyword():
    for item in load_requirements([DOCUMENTED]).values():
        assert len(re.findall(r"\bMUST\b|\bSHOULD\b", item.statement)) >= 1, f"{item.id} has no keyword"
        assert re.search(r"\b(MUST|SHOULD)\b", item.statement)[1] == item.keyword, item.id
        assert item.statement.endswith("."), f"{item.id} is no sentence"
        assert not re.search(r"\. [A-Z]", item.statement), f"{item.id} is more than one sentence"


def test_a_source_that_disagrees_says_what_it_says(requirements):
    for item in requirements.values():
        for citation in item.citations:
            assert citation.agrees or citation.note, f"{item.id}: {citation.document} disagrees without a note"


def test_every_requirement_is_cited_by_a_test_or_says_why_not(requirements):
    cited = {name for _, _, ids in marked() for name in ids}
    for item in requirements.values():
        if item.untested:
            assert item.id not in cited, f"{item.id} says why it has no test, but has one"
            assert len(item.untested.split()) > 2, f"{item.id}: {item.untested!r} is no reason"
        else:
            assert item.id in cited, f"{item.id} has no test and does not say why"


def test_every_test_cites_requirements_that_exist(requirements):
    names = []
    for name, _, ids in marked():
        names.append(name)
        assert ids, f"{name} cites no requirement"
        assert set(ids) <= set(requirements), f"{name} cites {sorted(set(ids) - set(requirements))}"
    assert len(names) > 100


def test_requirements_of_a_library_have_a_test_that_takes_the_library(requirements):
    # All but the first are fixtures that take the first.
    reached = {"library", "idefics", "idefics3", "mllama", "tf", "rbln", "processor", "default"}
    cited = {name for _, arguments, ids in marked() for name in ids if reached & arguments}
    assert {item.id for item in requirements.values() if item.subject == "library" and not item.untested} <= cited


def test_known_failures_of_the_library_name_tests_that_exist():
    tests = [name for name, _, _ in marked()]
    path = PACKAGE / "known" / "transformers_library.toml"
    entries = load_known([path])
    assert entries
    for entry in entries:
        name = entry.case.partition("[")[0].rstrip("*")
        assert name in tests, f"{entry.case} names no test"
        assert entry.library == "transformers"


def test_known_failures_in_the_other_files_name_tests_that_exist():
    tests = [name for name, _, _ in marked()]
    for file in ("transformers.toml", "mllama.toml", "mllama_library.toml", "idefics_library.toml"):
        for entry in load_known([PACKAGE / "known" / file]):
            pattern = entry.case.partition("[")[0]
            assert fnmatch.filter(tests, pattern), f"{file}: {entry.case} names no test"
            assert entry.library == "transformers"


def test_known_failures_of_rbln_name_requirements_and_tests_that_exist(requirements):
    tests = [name for name, _, _ in marked()]
    for entry in load_known([PACKAGE / "known" / "rbln.toml"]):
        assert entry.library == "optimum-rbln"
        if entry.case in requirements:
            continue
        assert entry.case.partition("[")[0] in tests, f"{entry.case} names no test"
        assert entry.reason.partition(":")[0] in requirements, f"{entry.case}: the reason begins with no requirement"
