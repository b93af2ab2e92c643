"""Replay files: what is written is what is read, and what is none is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmqual_conformance import replays
from vlmqual_contract import cli
from vlmqual_contract.discovery import suite_version
from vlmqual_contract.records import Outcome

TARGETS = Path(__file__).with_name("targets")
DRIFTING, HONEST = f"{TARGETS / 'drifting.py'}:Drifting", f"{TARGETS / 'honest.py'}:Honest"
SMALL = "test_vision.py::test_image_features_are_within_budget[photo-small]"
GOOD = replays.Replay(
    case=SMALL,
    requirements=("IDEFICS3-VIS-001",),
    family="idefics3",
    level="vision",
    kind="target",
    subject=DRIFTING,
    python="",
    timeout_s=60.0,
    known=(),
    emulated=False,
    dtype="float64",
    outcome=Outcome.FAIL,
    reason="it is wrong",
    observed="",
    component="connector",
    worst=3.5,
    version=suite_version(),
    suite="0",
    fixtures="0",
    run="abc",
)


def vlmqual(*arguments: str | Path) -> int:
    return cli.main([str(item) for item in arguments])


def changed(path: Path, folder: Path, **values: Any) -> Path:
    made = folder / "changed.json"
    made.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return made


@pytest.fixture
def good(tmp_path: Path) -> Path:
    replays.write(tmp_path / "good.json", GOOD)
    return tmp_path / "good.json"


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert vlmqual("replay", *arguments) == 2
    (sentence,) = capfd.readouterr().err.strip().splitlines()
    return sentence


def test_what_is_written_is_what_is_read(good):
    assert replays.read(good) == GOOD


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"record": "verdict"}, "is no replay file of vlmqual"),
        ({"format": 2}, "format 2 is unknown; this version reads 1"),
        ({"case": 5}, "is damaged: case is 5"),
        ({"requirements": "IDEFICS3-VIS-001"}, "is damaged: requirements is"),
        ({"kind": "dog"}, 'is damaged: kind is "dog"'),
        ({"outcome": "so-so"}, 'is damaged: outcome is "so-so"'),
        ({"worst": "big"}, 'is damaged: worst is "big"'),
        ({"case": "test_visoin.py::test_a"}, "has no file 'test_visoin.py'; near it are test_vision.py"),
        ({"case": "../tests/test_replay.py::test_a"}, "the suite has no case"),
        ({"case": "zoo.toml::test_a", "requirements": []}, "no test stands behind 'zoo.toml::test_a'"),
        ({"subject": "nowhere.py:Toy"}, "target file nowhere.py does not exist"),
        ({"subject": "warp-drive"}, "target 'warp-drive' is not installed; installed are "),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_in_one_sentence(good, tmp_path, capfd, values, sentence):
    assert sentence in refused(capfd, changed(good, tmp_path, **values))


def test_what_is_no_replay_file_is_refused_in_one_sentence(good, tmp_path, capfd):
    text = good.read_text()
    assert "No such file" in refused(capfd, tmp_path / "nowhere.json")
    assert "Is a directory" in refused(capfd, tmp_path)
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    assert "is damaged or none at all" in refused(capfd, tmp_path / "cut.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "is damaged or none at all" in refused(capfd, tmp_path / "bytes.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    assert "is no replay file of vlmqual" in refused(capfd, tmp_path / "list.json")
    data = json.loads(text)
    del data["subject"]
    (tmp_path / "less.json").write_text(json.dumps(data))
    assert "is damaged: it lacks subject" in refused(capfd, tmp_path / "less.json")
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    assert "no results file of vlmqual" in refused(capfd, tmp_path / "foreign.jsonl", "--case", SMALL)


def test_target_and_library_exclude_each_other_and_time_is_above_0(good, capfd):
    with pytest.raises(SystemExit) as caught:
        vlmqual("replay", good, "--target", HONEST, "--library", "vlmqual_impl")
    assert caught.value.code == 2
    capfd.readouterr()
    assert "--timeout 0 is no time" in refused(capfd, good, "--timeout", "0")


def test_names_of_files_differ_where_cases_differ_and_fit_a_file_system():
    cases = [
        "a::b[c/d]",
        "a::b[c-d]",
        "a::b[c d]",
        "A::b[c d]",
        "a--b-c-d",
        "a::" + "x" * 400,
        "a::" + "x" * 401,
        "..",
        ".",
    ]
    names = [replays.slug(case) for case in cases]
    assert len({name.lower() for name in names}) == len(cases)
    for name in names:
        assert "/" not in name
        assert len(name) < 150
        assert name.strip(".") == name
    assert replays.slug("eager") == "eager"


def test_a_write_that_is_interrupted_leaves_the_old_file_and_nothing_else(good, monkeypatch):
    before = good.read_bytes()

    def interrupted(self: Path, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replays.write(good, GOOD)
    assert good.read_bytes() == before
    assert [path.name for path in good.parent.iterdir()] == ["good.json"]
