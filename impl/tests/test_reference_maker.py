"""References of checkpoints: the streaming run is the model, within its bound of memory, and can be interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmqual_contract import checkpoint, fixtures
from vlmqual_contract.distance import error
from vlmqual_contract.errors import UsageError
from vlmqual_contract.questions import Question, question
from vlmqual_reference.folder import RECORD, Folder
from vlmqual_reference.lockstep import Run
from vlmqual_reference.maker import Opened, Told, Wanted, make
from vlmqual_reference.passes import walk

SILENT = Told(lambda words, blocks: None, lambda name, runs: None)
PROMPTS = (
    question("mllama", "photo", "What is it?", "chelsea.png"),
    question("mllama", "text", "Name three rivers."),
)


def wanted(family: str = "mllama", prompts: tuple[Question, ...] = PROMPTS, memory: int = 1 << 30) -> Wanted:
    directory = Path(fixtures.checkpoint(f"{family}-tiny"))
    return Wanted(
        directory=directory,
        family=family,
        digest=checkpoint.digest(directory),
        prompts=prompts,
        steps=2,
        dtypes=("float32", "bfloat16"),
        arms=2,
        memory=memory,
        together=4,
    )


def stored(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference")
    assert make(wanted(), Folder(path), SILENT)
    return path


@pytest.mark.parametrize(
    ("family", "case"), [("idefics", "two-images"), ("idefics3", "photo-whole"), ("mllama", "photo-one-tile")]
)
def test_a_streamed_run_is_that_of_transformers_in_float64(family: str, case: str) -> None:
    with np.load(fixtures.file(f"goldens/{family}/{case}.npz")) as file:
        gold = {key: file[key] for key in file.files if not key.startswith(("taps/", "arms/"))}
    inputs = {key.removeprefix("inputs/"): value for key, value in gold.items() if key.startswith("inputs/")}
    opened = Opened(wanted(family), "float32", SILENT)
    found: dict[str, np.ndarray] = {}
    session = opened.session(inputs["input_ids"].shape[1] + 4)
    opened.lockstep.go([Run(lambda: found.update(walk(session, inputs, 4, gold)))])
    (features,) = (key for key in found if key.startswith("features/"))
    for name, right in (
        (features, gold[features]),
        ("prefill/logits", gold["prefill/logits"]),
        ("chain/logits", gold["prefill/logits"]),
        ("decode/logits", gold["decode/logits"][:4]),
    ):
        assert error(found[name], right) <= 2 * gold[f"noise/float32/{name}"], name


def test_prompts_that_go_together_give_what_they_give_alone(made: Path, tmp_path: Path) -> None:
    make(replace(wanted(), together=1), Folder(tmp_path), SILENT)
    for item in PROMPTS:
        one, other = stored(made, item.name), stored(tmp_path, item.name)
        for name in ("prefill/logits", "decode/logits", "noise/bfloat16/decode/logits"):
            assert np.array_equal(one[name], other[name]), name


def test_blocks_are_read_once_for_all_prompts_and_once_in_all_where_memory_allows() -> None:
    def reads(prompts: tuple[Question, ...], memory: int) -> int:
        opened = Opened(wanted(memory=memory), "float32", SILENT)
        sessions = [opened.session(64) for _ in prompts]
        inputs = [s.preprocess([item.prompt]) for s, item in zip(sessions, prompts, strict=True)]
        opened.lockstep.go([Run(lambda s=s, i=i: walk(s, i, 2)) for s, i in zip(sessions, inputs, strict=True)])
        return opened.shelf.reads

    units = len(Opened(wanted(), "float32", SILENT).shelf.units)
    assert reads(PROMPTS, 1 << 30) == units
    least = bound()
    alone, both = reads(PROMPTS[:1], least), reads(PROMPTS, least)
    assert alone == both > 2 * units, "the text prompt passes no block that the photograph's does not pass"


def bound() -> int:
    shelf = Opened(wanted(), "float32", SILENT).shelf
    return shelf.outside_bytes + max(unit.bytes for unit in shelf.units)


def test_a_bound_below_the_largest_block_is_refused_and_the_bound_itself_is_kept() -> None:
    with pytest.raises(UsageError, match=r"--memory .* is too little: in float32 .* take"):
        Opened(wanted(memory=bound() - 1), "float32", SILENT)
    shelf = Opened(wanted(memory=bound()), "float32", SILENT).shelf
    for unit in shelf.units:
        with shelf.loaded(unit):
            here = sum(other.bytes for other in shelf.units if other.here)
            assert here + shelf.outside_bytes <= bound()
            assert all(bool(torch.isfinite(value).all()) for value in unit.module.parameters())
        assert all(bool(torch.isnan(value).all()) for value in unit.module.parameters()), "a dropped block is NaN"


def test_a_reference_has_the_arrays_of_a_golden_file_and_says_how_it_was_made(made: Path) -> None:
    arrays, record = stored(made, "photo"), json.loads((made / RECORD).read_text())
    prompt, vocabulary = arrays["inputs/input_ids"].shape[1], 600
    assert prompt > 10
    assert arrays["prefill/logits"].shape == (1, vocabulary)
    assert arrays["decode/logits"].shape == (2, 1, vocabulary)
    assert arrays["decode/tokens"][0, 0] == arrays["prefill/logits"][0].argmax()
    assert {arrays[name].dtype.name for name in ("prefill/logits", "features/cross_attention_states")} == {"float32"}
    for dtype in ("float64", "float32", "bfloat16"):
        for name in ("features/cross_attention_states", "prefill/logits", "chain/logits", "decode/largest"):
            assert arrays[f"noise/{dtype}/{name}"] > 0
    assert arrays["noise/bfloat16/prefill/logits"] > 100 * arrays["noise/float32/prefill/logits"]
    assert record["maker"]["name"] == "vlmqual_impl"
    assert (record["dtype"], record["checkpoint"]["digest"]) == ("float32", wanted().digest)
    assert record["peak_bytes"] > 0
    assert [len(names) for names in record["arms"].values()] == [2, 2]


def test_the_same_command_finds_a_reference_and_remakes_a_damaged_file_alone(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    assert not make(wanted(), Folder(tmp_path), SILENT), "nothing is to be done"
    (tmp_path / "text.npz").write_bytes((tmp_path / "text.npz").read_bytes()[:500])
    kept = (tmp_path / "photo.npz").stat().st_mtime_ns
    assert make(wanted(), Folder(tmp_path), SILENT)
    assert (tmp_path / "photo.npz").stat().st_mtime_ns == kept
    assert np.array_equal(stored(tmp_path, "text")["decode/logits"], stored(made, "text")["decode/logits"])


def test_an_interrupted_run_leaves_whole_files_and_goes_on_with_them(made: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def stop(words: str, blocks: int) -> None:
        stages.append(words)
        if words.startswith("bfloat16"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(wanted(), Folder(tmp_path), Told(stop, SILENT.block))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.npz", "text.npz"], "no record, nothing half"
    stages.clear()
    assert make(wanted(), Folder(tmp_path), Told(lambda words, blocks: stages.append(words), SILENT.block))
    assert stages == ["bfloat16, photo, text"], "gold and the arms in float32 were there"
    assert np.array_equal(
        stored(tmp_path, "photo")["noise/bfloat16/prefill/logits"],
        stored(made, "photo")["noise/bfloat16/prefill/logits"],
    )


def test_an_interruption_inside_a_block_ends_every_run(tmp_path: Path) -> None:
    def stop(name: str, runs: int) -> None:
        if "layers.3" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(wanted(), Folder(tmp_path), Told(SILENT.stage, stop))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_keeps_the_reference_of_its_checkpoint(made: Path) -> None:
    with pytest.raises(UsageError, match="holds the reference of another checkpoint"):
        make(replace(wanted(), digest="0" * 64), Folder(made), SILENT)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = Path(fixtures.checkpoint("mllama-tiny"))
    for path in source.glob("*.json"):
        shutil.copy(path, tmp_path)
    index = {"weight_map": {"language_model.lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"model-00001-of-00001.safetensors: the index names this file"):
        Opened(replace(wanted(), directory=tmp_path), "float32", SILENT)
