"""Files of scenarios and suites: the bundled one, the user's, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.scenario import Catalogue, load_catalogue
from vlmqual_contract.target import FAMILIES

FILE = """
text = "one two three"

[[suite]]
id = "mine"
title = "my requests"
tp = [1, 4]
time_limit_s = 60
cell_s = 0.5

[[scenario]]
id = "first"
title = "the first one"
family = "idefics3"
checkpoint = "idefics3-tiny"
prompt = "<image>What? {words}"
words = 5
images = ["a.png"]
suites = ["mine"]

[[scenario]]
id = "second"
base = "first"
batch = 2
words = [1, 4]
suites = ["mine"]
"""


def load(tmp_path: Path, text: str = FILE, *, own: bool = True) -> Catalogue:
    path = tmp_path / "requests.toml"
    path.write_text(text)
    (tmp_path / "a.png").write_bytes(b"")
    return load_catalogue(path, own=own)


def test_rows_have_so_many_words_of_the_text_again_from_its_start_where_it_ends(tmp_path: Path) -> None:
    found = load(tmp_path).scenarios
    assert [prompt.text for prompt in found["first"].prompts()] == ["<image>What? one two three one two"]
    assert [prompt.text for prompt in found["second"].prompts()] == [
        "<image>What? one",
        "<image>What? one two three one",
    ]


def test_a_scenario_takes_what_it_leaves_out_from_its_base_but_for_title_and_suites(tmp_path: Path) -> None:
    found = load(tmp_path).scenarios["second"]
    assert (found.family, found.checkpoint, found.images) == ("idefics3", "idefics3-tiny", ("a.png",))
    assert found.title == ""


def test_images_of_an_own_file_are_found_beside_it_and_bundled_checkpoints_by_name(tmp_path: Path) -> None:
    scenario = load(tmp_path).scenarios["first"]
    assert scenario.prompts()[0].images == (str(tmp_path.resolve() / "a.png"),)
    assert scenario.model().path == str(fixtures.checkpoint("idefics3-tiny"))


def test_an_own_checkpoint_may_lie_beside_an_own_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    scenario = load(tmp_path, FILE.replace("idefics3-tiny", "model")).scenarios["first"]
    assert scenario.model().path == str(tmp_path.resolve() / "model")


def test_a_suite_says_its_sizes_and_limit_and_a_scenario_stands_for_itself(tmp_path: Path) -> None:
    found = load(tmp_path)
    suite = found.suite("mine")
    assert (suite.tp, suite.time_limit_s, suite.cell_s) == ((1, 4), 60, 0.5)
    assert [one.id for one in found.select("mine")] == ["first", "second"]
    assert [one.id for one in found.select("second")] == ["second"]
    assert found.suite("second").tp == (1,)


def test_an_unknown_suite_is_answered_with_the_known_ones_and_a_missing_family_with_those_there(tmp_path: Path) -> None:
    found = load(tmp_path)
    with pytest.raises(UsageError, match=r"suite 'night' is unknown in requests\.toml; suites are mine; .* first, sec"):
        found.select("night")
    with pytest.raises(UsageError, match="suite 'mine' has no scenario for mllama; it has idefics3"):
        found.select("mine", ["mllama"])


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"a.png"', '"b.png"', "requests.toml: first: images has 'b.png'; there is no such file beside"),
        ('"idefics3-tiny"', '"nowhere"', "first: checkpoint is 'nowhere'; valid are a folder .*idefics3-tiny"),
        ('"idefics3"\n', '"clip"\n', "first: family is 'clip'; valid are idefics, idefics3, mllama"),
        ("words = 5", 'words = "five"', "first: words is 'five'; it has to be a whole number"),
        ("words = 5", "", r"first: words and \{words\} in the prompt belong together"),
        ("words = 5", "new_tokens = 0\nwords = 5", "first: new_tokens is 0; it has to be a whole number of at least 1"),
        ("words = 5", "time_limit_s = -1\nwords = 5", "first: time_limit_s is -1; it has to be a number of seconds"),
        ("words = 5", "colour = 1\nwords = 5", "first has the unknown keys colour; valid are id, family, .*base"),
        ("[1, 4]\nsuites", "[1, 2, 3]\nsuites", "second: words has 3 numbers for a batch of 2"),
        ('base = "first"', 'base = "third"', "second: base is 'third'; scenarios above it are first"),
        ('suites = ["mine"]', 'suites = ["yours"]', "first: suites has 'yours'; valid are mine"),
        ("tp = [1, 4]", "tp = [0]", r"mine: tp is \[0\]; it has to be a list of whole numbers"),
        ('text = "one two three"', "", "first: words are taken from the file's text, which is missing"),
        ('id = "second"', 'id = "mine"', "mine is the name of a suite and of a scenario"),
        ("[[suite]]", "[suite]", "suite is no list of tables"),
        ("[[suite]]", "[[suites]]", r"unknown keys suites; valid are text, \[\[suite\]\] and \[\[scenario\]\]"),
        ('prompt = "<image>', 'prompt = "', "prompt has 0 markers <image> for 1 images"),
    ],
)
def test_a_damaged_file_is_refused_with_scenario_key_and_what_is_valid(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    assert old in FILE
    with pytest.raises(UsageError, match=sentence) as refused:
        load(tmp_path, FILE.replace(old, new))
    assert str(refused.value).startswith("requests.toml: ")


def test_the_bundled_suites_have_what_they_are_for() -> None:
    found = load_catalogue(fixtures.file("scenarios.toml"))
    assert list(found.suites) == ["smoke", "default", "qualification"]
    assert all(suite.title and suite.purpose and suite.time_limit_s for suite in found.suites.values())
    assert found.suite("default").tp == (1, 2)
    for name in found.suites:
        assert {one.family for one in found.select(name)} == set(FAMILIES)
    for family in FAMILIES:
        wide = found.select("qualification", [family])
        assert {0, 1, 2, 4, 8} <= {len(one.images) for one in wide}, family
        assert {1, 2, 4, 8} <= {one.batch for one in wide}, family
        assert max(one.new_tokens for one in wide) > 1024, family
        assert any(len(set(one.words)) > 1 for one in wide), f"{family}: no scenario pads rows"
        assert len({len(one.prompts()[0].text.split()) for one in wide if one.words}) >= 3, family
