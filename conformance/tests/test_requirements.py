from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import vlmqual_conformance
from vlmqual_conformance.failures import load_known
from vlmqual_contract.requirement import load_requirements

PACKAGE = Path(vlmqual_conformance.__file__).parent
DOCUMENTED = PACKAGE / "requirements" / "idefics3.toml"
AREAS = {"CFG": 25, "MODEL": 33, "LM": 21, "IMG": 51, "PROC": 30, "CARD": 17}


@pytest.fixture(scope="module")
def requirements():
    return load_requirements(sorted((PACKAGE / "requirements").glob("*.toml")))


def marked():
    """Test name, its arguments and the ids of its marks, of every test in the suite."""
    for path in sorted((PACKAGE / "suite").glob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
                continue
            ids = []
            for decorator in node.decorator_list:
                for call in ast.walk(decorator):
                    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "requirement":
                        ids += [item.value for item in call.args if isinstance(item, ast.Constant)]
            yield f"{path.name}::{node.name}", [item.arg for item in node.args.args], ids


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


def test_every_statement_is_one_sentence_with_its_keyword(requirements):
    for item in requirements.values():
        if item.id not in load_requirements([DOCUMENTED]):
            continue
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


def test_every_documented_requirement_has_a_test_that_takes_the_library():
    documented = load_requirements([DOCUMENTED])
    cited = {
        name for _, arguments, ids in marked() for name in ids if {"library", "idefics3", "processor"} & {*arguments}
    }
    assert {name for name, item in documented.items() if not item.untested} <= cited | _through_fixtures()


def _through_fixtures():
    """Ids of tests that reach the library through a fixture of their module."""
    return {name for _, arguments, ids in marked() for name in ids if "default" in arguments}


def test_known_failures_of_the_library_name_tests_that_exist():
    tests = [name for name, _, _ in marked()]
    path = PACKAGE / "known" / "transformers_library.toml"
    entries = load_known([path])
    assert entries
    for entry in entries:
        name = entry.case.partition("[")[0].rstrip("*")
        assert name in tests, f"{entry.case} names no test"
        assert entry.library == "transformers"
