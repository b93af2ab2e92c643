from __future__ import annotations

import pytest

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.requirement import load_requirements
from vlmqual_contract.scenario import load_catalogue, load_scenarios

REQUIREMENT = """
[[requirement]]
id = "IDEFICS3-IMG-016"
family = "idefics3"
level = "images"
keyword = "MUST"
subject = "library"
statement = "The longest edge MUST be exact."
needs = ["vision"]
citation = [{document = "d", version = "1", section = "s"}]
"""
SCENARIO = """
[[scenario]]
id = "one"
family = "idefics3"
checkpoint = "tiny"
prompt = "<image>What?"
images = ["a.png"]
suites = ["smoke"]
"""


def write(tmp_path, text):
    path = tmp_path / "file.toml"
    path.write_text(text)
    return path


def test_a_requirement_reads_back(tmp_path):
    found = load_requirements([write(tmp_path, REQUIREMENT)])
    assert found["IDEFICS3-IMG-016"].needs == {"vision"}
    assert found["IDEFICS3-IMG-016"].citations[0].agrees


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("IDEFICS3-IMG-016", "img16", "ids look like"),
        ('"images"', '"pictures"', "valid are api, images"),
        ('"MUST"', '"must"', "valid are MUST, SHOULD"),
        ('["vision"]', '["sight"]', "sight"),
        ('section = "s"', 'section = "s", agrees = false', "no source that agrees"),
        ("statement", "sentence", "unknown keys sentence"),
        ("The longest edge MUST be exact.", " ", "no statement"),
        ("[[requirement]]", "[[requirement", "cannot be read"),
    ],
)
def test_a_damaged_requirement_is_refused_by_name(tmp_path, old, new, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_requirements([write(tmp_path, REQUIREMENT.replace(old, new))])


def test_an_id_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(UsageError, match="stands twice"):
        load_requirements([write(tmp_path, REQUIREMENT * 2)])


def test_scenarios_are_chosen_by_suite_or_by_id(tmp_path):
    found = load_catalogue(write(tmp_path, SCENARIO))
    assert [s.id for s in found.select("smoke")] == ["one"]
    assert [s.id for s in found.select("one")] == ["one"]
    with pytest.raises(UsageError, match="suites are smoke; scenarios are one"):
        found.select("none")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('["a.png"]', "[]", "1 markers <image> for 0 images"),
        ('"idefics3"', '"mllama"', r"0 markers <\|image\|> for 1 images"),
        ('"idefics3"', '"clip"', "valid are idefics"),
        ("checkpoint", "model", "unknown keys model"),
        ('id = "one"', 'id = "one"\nbatch = 0', "at least 1"),
    ],
)
def test_a_damaged_scenario_is_refused_by_name(tmp_path, old, new, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_scenarios(write(tmp_path, SCENARIO.replace(old, new)))


def test_every_fixture_is_what_the_manifest_says():
    for name in fixtures.names():
        assert fixtures.file(name).is_file(), name
    present = {str(p.relative_to(fixtures.root())) for p in fixtures.root().rglob("*") if p.is_file()}
    assert present - set(fixtures.names()) == {"manifest.toml"}, "every fixture file must be in the manifest"


def test_unknown_fixtures_are_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=r"astronaut\.png"):
        fixtures.image("no-such-image.png")
    with pytest.raises(UsageError, match="idefics3-tiny"):
        fixtures.checkpoint("no-such-checkpoint")


def test_a_changed_fixture_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("changed")
    (tmp_path / "manifest.toml").write_text('[files]\n"a.txt" = "00"\n"b.txt" = "00"\n')
    monkeypatch.setattr(fixtures, "root", lambda: tmp_path)
    for cached in (fixtures.manifest, fixtures.file):
        cached.cache_clear()
    try:
        with pytest.raises(UsageError, match="digest"):
            fixtures.file("a.txt")
        with pytest.raises(UsageError, match="missing"):
            fixtures.file("b.txt")
    finally:
        fixtures.manifest.cache_clear()
        fixtures.file.cache_clear()
