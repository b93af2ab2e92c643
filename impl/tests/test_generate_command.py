"""`vlmqual generate` on the bundled tiny checkpoint and photographs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from vlmqual_contract import fixtures
from vlmqual_contract.cli import main
from vlmqual_impl.api.auto import AutoModelForVision2Seq, AutoProcessor
from vlmqual_impl.command import _Printer
from vlmqual_impl.image_files import read_image


@pytest.fixture(scope="module")
def checkpoint() -> str:
    return str(fixtures.checkpoint("idefics3-tiny"))


@pytest.fixture
def photo() -> str:
    return str(fixtures.image("chelsea.png"))


def run(*arguments: str) -> int:
    return main(["generate", *arguments])


def test_text_goes_to_stdout_and_timings_to_stderr(
    checkpoint: str, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "What is this?"
    assert run("--checkpoint", checkpoint, "--image", photo, "--prompt", question, "--max-new-tokens", "8") == 0
    out, errors = capsys.readouterr()
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForVision2Seq.from_pretrained(checkpoint)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=[[read_image(photo)]], text=[prompt], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert out == processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True) + "\n"
    for phase in ("load", "preprocess", "vision", "prefill"):
        assert re.search(rf"^{phase} +\d+\.\d+ s$", errors, re.MULTILINE), f"no time for {phase} in:\n{errors}"
    assert re.search(r"^decode +\d+\.\d+ s per token$", errors, re.MULTILINE)
    assert re.search(r"^rate +\d+\.\d+ tokens/s$", errors, re.MULTILINE)
    tokens = re.search(r"^tokens +(\d+) in the prompt, (\d+) generated$", errors, re.MULTILINE)
    assert tokens
    assert [int(n) for n in tokens.groups()] == [inputs["input_ids"].shape[1], len(ids)]


def test_a_text_only_prompt_has_no_vision_phase(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--checkpoint", checkpoint, "--prompt", "Hello", "--max-new-tokens", "2") == 0
    errors = capsys.readouterr().err
    assert "vision" not in errors
    assert "prefill" in errors


@pytest.mark.parametrize("name", ["idefics-tiny", "idefics-resampler-tiny"])
def test_a_family_without_chat_template_gets_its_images_before_the_text(
    name: str, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, question = str(fixtures.checkpoint(name)), "What is this?"
    processor, model = AutoProcessor.from_pretrained(place), AutoModelForVision2Seq.from_pretrained(place)
    inputs = processor(text=[read_image(photo), read_image(photo), question])
    ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    two = ["--checkpoint", place, "--image", photo, "--image", photo, "--max-new-tokens", "4"]
    for more in (["--prompt", question], ["--prompt", f"<image><image>{question}", "--raw-prompt"]):
        assert run(*two, *more) == 0
        out, errors = capsys.readouterr()
        assert out == processor.decode(ids.tolist(), skip_special_tokens=True) + "\n"
        assert f"{inputs['input_ids'].shape[1]} in the prompt" in errors
    assert run("--checkpoint", place, "--prompt", "Hello", "--max-new-tokens", "2") == 0, "a text alone"


def test_a_seed_makes_sampling_repeatable(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        options = ["--sample", "--temperature", "3", "--top-k", "0", "--seed", seed, "--max-new-tokens", "12"]
        assert run("--checkpoint", checkpoint, "--prompt", "Hello", *options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_raw_prompt_is_taken_as_it_is(checkpoint: str, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--checkpoint", checkpoint, "--image", photo, "--max-new-tokens", "1", "--raw-prompt"]
    assert run(*common, "--prompt", "<image>A") == 0
    count = re.search(r"tokens +(\d+) in", capsys.readouterr().err)
    processor = AutoProcessor.from_pretrained(checkpoint)
    ids = processor(images=[[read_image(photo)]], text=["<image>A"], return_tensors="pt")["input_ids"]
    assert count
    assert int(count[1]) == ids.shape[1]


def test_mistakes_end_with_one_sentence_and_exit_code_2(
    checkpoint: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(photo).read_bytes()[:3000])
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (bare / name).write_bytes((Path(checkpoint) / name).read_bytes())
    (bare / "model.safetensors").write_bytes((Path(checkpoint) / "model.safetensors").read_bytes()[:5000])
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "flamingo"}')
    whole = ["--checkpoint", checkpoint, "--prompt", "Hello"]
    for arguments, words in [
        ([*whole, "--image", str(tmp_path / "none.png")], "none.png does not exist"),
        ([*whole, "--image", str(cut)], "cut.png cannot be read"),
        ([*whole, "--seed", "3"], "--seed changes nothing without --sample"),
        ([*whole, "--top-p", "0.5"], "--top-p changes nothing without --sample"),
        ([*whole, "--sample", "--temperature", "0"], "temperature is 0"),
        ([*whole, "--max-new-tokens", "0"], "max_new_tokens is 0"),
        ([*whole, "--device", "npu"], "device 'npu'"),
        ([*whole, "--raw-prompt", "--image", photo], "<image>"),
        (["--checkpoint", str(tmp_path / "nowhere"), "--prompt", "Hello"], "nowhere"),
        (["--checkpoint", str(unknown), "--prompt", "Hello"], "'flamingo'"),
        (["--checkpoint", str(bare), "--prompt", "Hello"], "truncated"),
    ]:
        assert run(*arguments) == 2, f"{arguments} did not end with 2"
        out, errors = capsys.readouterr()
        assert words in errors, f"{words!r} is not in: {errors}"
        assert len(errors.strip().splitlines()) == 1, f"more than one line: {errors}"
        assert "Traceback" not in out + errors


def test_bytes_of_an_unfinished_character_wait(capsys: pytest.CaptureFixture[str]) -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    import sys

    printer = _Printer(Bytes(), sys.stdout)
    shown = []
    for byte in "aé!".encode():
        printer.put(torch.tensor([byte]))
        shown.append(capsys.readouterr().out)
    printer.put(torch.tensor([0xC3]))
    printer.end()
    assert shown == ["a", "", "é", "!"]
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize(
    ("file", "path", "value", "sentence"),
    [
        ("config.json", ("text_config", "rope_theta"), "abc", "text_config.rope_theta is 'abc'"),
        ("config.json", ("text_config", "rope_scaling"), [1, 2], "it has to be a mapping"),
        ("config.json", ("text_config", "rms_norm_eps"), None, "rms_norm_eps"),
        ("config.json", ("vision_config", "layer_norm_eps"), "x", "layer_norm_eps"),
        ("generation_config.json", ("temperature",), "x", "temperature is 'x'"),
        ("generation_config.json", ("bad_words_ids",), [5], "bad_words_ids"),
        ("chat_template.json", ("chat_template",), "{% for", "the chat template cannot be rendered"),
    ],
)
def test_a_wrong_value_in_a_file_of_the_checkpoint_is_one_sentence(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    path: tuple[str, ...],
    value: object,
    sentence: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    content = json.loads((copy / file).read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (copy / file).write_text(json.dumps(content))
    assert run("--checkpoint", str(copy), "--prompt", "Hello", "--max-new-tokens", "2") == 2
    errors = capsys.readouterr().err
    assert sentence in errors
    assert "Traceback" not in errors
