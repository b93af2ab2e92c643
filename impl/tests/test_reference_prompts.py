"""The prompts of a reference, and what its command says of wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmqual_contract import cli, fixtures
from vlmqual_contract.errors import EXIT_USAGE, UsageError
from vlmqual_reference.prompts import read_prompts

PHOTO = str(fixtures.image("coffee.png"))


def checkpoint(family: str) -> Path:
    return Path(fixtures.checkpoint(f"{family}-tiny"))


def test_text_is_taken_as_it_is_and_images_stand_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "cup.png").write_bytes(Path(PHOTO).read_bytes())
    file = tmp_path / "prompts.toml"
    file.write_text('[[prompt]]\nname = "cup"\ntext = "User:<image>What?"\nimages = ["cup.png"]\n', "utf-8")
    (found,) = read_prompts(file, "idefics3", checkpoint("idefics3"))
    assert (found.name, found.prompt.text) == ("cup", "User:<image>What?")
    assert found.prompt.images == (str(tmp_path / "cup.png"),)


def test_questions_and_messages_go_through_the_checkpoints_chat_template(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    rows = ({"question": "What?", "images": [PHOTO]}, {"messages": messages, "images": [PHOTO]})
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    one, other = read_prompts(file, "mllama", checkpoint("mllama"))
    assert (one.name, other.name) == ("prompt-1", "prompt-2")
    assert one.prompt == other.prompt
    assert one.prompt.text.count("<|image|>") == 1
    assert "<|start_header_id|>user<|end_header_id|>" in one.prompt.text
    assert one.prompt.text.rstrip().endswith("assistant<|end_header_id|>")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "no image", "images": [PHOTO]}, "has 0 markers <image> for 1 images"),
        ({"text": "<image>", "images": ["gone.png"]}, "image file .*gone.png does not exist"),
        ({"images": [PHOTO]}, "has no text; it needs one of text, question, messages"),
        ({"text": "a", "question": "b"}, "has text and question; it needs one of"),
        ({"text": "a", "picture": "b"}, "unknown key picture"),
        ({"text": 7}, "text is 7; it has to be text"),
        ({"text": "a", "images": "b.png"}, "images is 'b.png'; it has to be a list"),
        ({"name": "a/b", "text": "a"}, "a name has letters, digits"),
        ({"question": "What?"}, "IdeficsProcessor has no chat template"),
    ],
)
def test_a_wrong_prompt_is_told_in_one_sentence(tmp_path: Path, row: dict[str, object], said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row), "utf-8")
    with pytest.raises(UsageError, match=said) as caught:
        read_prompts(file, "idefics", checkpoint("idefics"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[[prompt]\n", "[1, 2]", '{"text": "a"}\n{"text": '])
def test_a_damaged_prompts_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / ("prompts.toml" if text.startswith("[[") else "prompts.jsonl")
    file.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=r"prompts\.(toml|jsonl)"):
        read_prompts(file, "idefics", checkpoint("idefics"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "nowhere"], "nowhere: there is no such checkpoint directory"),
        (["--dtypes", "float32,int8"], "--dtypes int8 is unknown; valid are float32, bfloat16, float16"),
        (["--dtypes", "bfloat16"], "--dtypes bfloat16 lacks float32"),
        (["--tokens", "0"], "--tokens 0 is not at least 1"),
        (["--arms", "9"], "--arms 9 is not 2 to 5"),
        (["--memory", "-1"], "--memory -1 is no memory"),
        (["--memory", "0.0001"], "--memory 0.0001 GiB is too little"),
        (["--prompts", "nothing.toml"], "prompts file nothing.toml: No such file"),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["reference", "--checkpoint", str(checkpoint("mllama")), *arguments]
    assert cli.main(given) == EXIT_USAGE
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.png").write_bytes(b"no picture")
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"text": "<|image|>What?", "images": ["noise.png"]}), "utf-8")
    given = ["reference", "--checkpoint", str(checkpoint("mllama")), "--prompts", str(file)]
    assert cli.main([*given, "--output", str(tmp_path / "out")]) == EXIT_USAGE
    assert "noise.png cannot be read: its format is not known" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
