"""Compiled forms on disk: found again, refused when damaged, never half there."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifact_makers import entry, hang, race, write

from vlmqual_impl import artifacts
from vlmqual_impl.artifacts import RECORD, Shelf

# Processes of their own that need not import torch again.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "vlmqual_impl.artifacts"])


def forbidden(folder: Path) -> None:
    raise AssertionError(f"something was made in {folder}")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}", "utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def shelf(tmp_path: Path, checkpoint: Path) -> Shelf:
    return Shelf(tmp_path / "shelf", checkpoint, (("attention", "sdpa"),))


def again(shelf: Shelf, reuse: str = "yes", folder: Path | None = None) -> Shelf:
    return Shelf(folder or shelf.folder, shelf.checkpoint, shelf.settings, reuse)


def test_what_was_made_is_found_by_the_next_session_and_after_a_move(shelf: Shelf, tmp_path: Path) -> None:
    made = shelf.place(entry(), "engine 1", write())
    assert list(shelf.made_s) == ["text-s4"]
    assert shelf.made_s["text-s4"] > 0
    later = again(shelf)
    assert later.place(entry(), "engine 1", forbidden) == made
    assert not later.made_s, "what was found was not made"
    moved = tmp_path / "elsewhere" / "shelf"
    shutil.copytree(shelf.folder, moved)
    shutil.rmtree(shelf.folder)
    found = again(shelf, "only", moved).place(entry(), "engine 1", forbidden)
    assert (found / "model.bin").read_text("utf-8") == "compiled" * 100


def test_another_weight_engine_shape_or_setting_never_finds_it(shelf: Shelf) -> None:
    places = {shelf.place(entry(), "engine 1", write())}
    places.add(shelf.place(entry(), "engine 2", write()))
    places.add(shelf.place(entry(8, "text-s4"), "engine 1", write()))
    places.add(Shelf(shelf.folder, shelf.checkpoint, (("attention", "eager"),)).place(entry(), "engine 1", write()))
    (shelf.checkpoint / "model.safetensors").write_bytes(b"Weights")
    places.add(again(shelf).place(entry(), "engine 1", write()))
    (shelf.checkpoint / "config.json").write_text("{ }", "utf-8")
    places.add(again(shelf).place(entry(), "engine 1", write()))
    assert len(places) == 6


def test_files_of_the_checkpoint_that_no_function_reads_do_not_matter(shelf: Shelf) -> None:
    made = shelf.place(entry(), "engine 1", write())
    (shelf.checkpoint / "tokenizer.json").write_text("{}", "utf-8")
    assert again(shelf).place(entry(), "engine 1", forbidden) == made


def damage(folder: Path, how: str) -> None:
    file = folder / "model.bin"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "changed":
        file.write_bytes(b"C" + file.read_bytes()[1:])
    elif how == "missing":
        file.unlink()
    elif how == "no record":
        (folder / RECORD).unlink()
    elif how == "cut record":
        text = (folder / RECORD).read_text("utf-8")
        (folder / RECORD).write_text(text[: len(text) // 2], "utf-8")
    elif how == "foreign":
        (folder / RECORD).write_text('{"model": "of somebody else"}', "utf-8")
    else:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        (folder / RECORD).write_text(json.dumps({**record, how: "another"}), "utf-8")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "model.bin is truncated or was changed; delete the directory"),
        ("changed", "model.bin is truncated or was changed; delete the directory"),
        ("missing", "model.bin is missing; delete the directory"),
        ("no record", "is no artefact of vlmqual: artifact.json cannot be read"),
        ("cut record", "is no artefact of vlmqual: artifact.json cannot be read"),
        ("foreign", "is no artefact of vlmqual: artifact.json names no files"),
        ("engine", 'engine is "another"; here it has to be "engine 1"'),
        ("torch", f'torch is "another"; here it has to be "{torch.__version__}"'),
        ("weights", 'weights is "another"; here it has to be'),
        ("tensors", 'tensors is "another"; here it has to be ["x float32'),
    ],
)
@pytest.mark.parametrize("reuse", ["yes", "only"])
def test_damaged_and_foreign_artefacts_are_refused_in_one_sentence(
    shelf: Shelf, how: str, said: str, reuse: str
) -> None:
    folder = shelf.place(entry(), "engine 1", write())
    damage(folder, how)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        again(shelf, reuse).place(entry(), "engine 1", forbidden)
    assert str(folder) in str(caught.value), "the sentence names where it is"
    assert "\n" not in str(caught.value)


def test_a_damaged_artefact_is_made_anew_when_that_is_asked_for(shelf: Shelf) -> None:
    folder = shelf.place(entry(), "engine 1", write())
    damage(folder, "truncated")
    assert again(shelf, "no").place(entry(), "engine 1", write("new")) == folder
    assert (folder / "model.bin").read_text("utf-8") == "new" * 100
    assert [path.name for path in shelf.folder.iterdir()] == [folder.name]


def test_where_nothing_may_be_made_the_difference_is_named(shelf: Shelf) -> None:
    with pytest.raises(ValueError, match="holds no compiled text-s4, and nothing may be compiled"):
        again(shelf, "only").place(entry(), "engine 1", forbidden)
    shelf.place(entry(), "engine 1", write())
    with pytest.raises(ValueError, match=r'that fits, .*: engine is "engine 1", here "engine 2"$'):
        again(shelf, "only").place(entry(), "engine 2", forbidden)
    with pytest.raises(ValueError, match=r"holds no compiled text-s9, .*there are text-s4$"):
        again(shelf, "only").place(entry(9), "engine 1", forbidden)
    (shelf.checkpoint / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r'weights is "[0-9a-f]+\.*.*, here "'):
        again(shelf, "only").place(entry(), "engine 1", forbidden)


@pytest.mark.parametrize("error", [RuntimeError("compiler"), KeyboardInterrupt()])
def test_making_that_ends_early_leaves_nothing(shelf: Shelf, error: BaseException) -> None:
    def make(folder: Path) -> None:
        write()(folder)
        raise error

    with pytest.raises(type(error)):
        shelf.place(entry(), "engine 1", make)
    assert not list(shelf.folder.iterdir())
    assert not shelf.made_s


def _wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline, "the other process did not get so far"
        time.sleep(0.01)


def test_a_killed_maker_leaves_no_artefact_and_its_draft_is_swept_by_the_next(shelf: Shelf) -> None:
    process = FORKS.Process(target=hang, args=(shelf,))
    process.start()
    _wait(lambda: bool(list(shelf.folder.glob(".*/model.bin"))))
    assert not list(shelf.folder.glob("[!.]*")), "an unfinished artefact has its name already"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    made = again(shelf).place(entry(), "engine 1", write())
    assert list(shelf.folder.iterdir()) == [made]


def test_processes_that_make_the_same_at_once_end_up_with_one_whole_artefact(shelf: Shelf) -> None:
    start, places = FORKS.Barrier(2), FORKS.Queue()
    processes = [FORKS.Process(target=race, args=(shelf, number, start, places)) for number in range(2)]
    for process in processes:
        process.start()
    found = {places.get(timeout=120)[1] for _ in processes}
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 2
    assert len(found) == 1
    folder = Path(found.pop())
    assert list(shelf.folder.iterdir()) == [folder], "drafts are left over"
    artifacts.check(folder, shelf.record(entry(), "engine 1"))
    assert len(set((folder / "model.bin").read_text("utf-8"))) == 1, "files of several makers are mixed"


def test_a_maker_that_comes_second_takes_what_the_first_one_finished(shelf: Shelf) -> None:
    def make(folder: Path) -> None:
        again(shelf).place(entry(), "engine 1", write("first"))
        write("second")(folder)

    folder = shelf.place(entry(), "engine 1", make)
    assert (folder / "model.bin").read_text("utf-8") == "first" * 100
    assert list(shelf.folder.iterdir()) == [folder]
