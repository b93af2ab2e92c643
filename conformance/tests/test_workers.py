from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlmqual_contract import wire
from vlmqual_contract.errors import TargetCrashed, TargetHung, TargetMisspoke, TargetRaised, Unsupported, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.target import Call, Costs, Model, Options, Program, Prompt

TOY = f"{Path(__file__).with_name('toy_target.py')}:Toy"
MODEL = Model("nowhere", "idefics3")
INPUTS = {"input_ids": np.array([[3, 4], [1, 1]]), "attention_mask": np.ones((2, 2), np.int64)}


def test_a_session_answers_every_phase_across_the_process_border():
    with RemoteTarget(TOY) as target, target.open(MODEL) as session:
        ids = session.preprocess([Prompt("abcde")])["input_ids"]
        assert ids.tolist() == [[5]], "preprocess of the toy gives the length of the text"
        features = session.vision({"pixel_values": np.ones((1, 1, 3, 1, 1), np.float32)})
        assert features.arrays()["image_hidden_states"].sum() == 6.0
        step = session.prefill(INPUTS, features)
        assert step.dtype == "bfloat16", "the device's dtype is reported although numpy cannot name it"
        assert step.tokens().tolist() == [(7 + 6) % 11, (2 + 6) % 11]
        assert session.decode(step).tokens().tolist() == [(13 + 2) % 11, (8 + 8) % 11]
        assert session.decode(step, np.array([1, 2])).tokens().tolist() == [14 % 11, 10]


def test_features_made_elsewhere_can_be_injected():
    with RemoteTarget(TOY) as target, target.open(MODEL) as session:
        step = session.prefill(INPUTS, {"image_hidden_states": np.ones((1, 1, 2), np.float32)})
        assert step.tokens().tolist() == [9, 4]


def test_costs_of_fixed_shapes_cross_the_border_as_they_are():
    with RemoteTarget(f"{TOY}:bad=fixed") as target, target.open(MODEL) as session:
        assert target.info.fixed_shapes
        assert session.costs() == Costs({"decode": Call("b1", 1, 2, ("write",))}, {"write": Program(0.5, 0.25)})


@pytest.mark.parametrize("bad", ["costs-unknown", "costs-less", "costs-none"])
def test_costs_that_cannot_be_true_are_an_error_of_the_target(bad):
    with RemoteTarget(f"{TOY}:bad={bad}") as target, target.open(MODEL) as session:
        with pytest.raises(TargetMisspoke, match="costs: "):
            session.costs()
        assert target.alive


def test_a_session_without_costs_says_so():
    with RemoteTarget(TOY) as target, target.open(MODEL) as session:
        assert not target.info.fixed_shapes
        with pytest.raises(Unsupported, match="no costs of fixed shapes"):
            session.costs()


def test_a_crash_is_reported_with_its_signal_and_later_requests_fail_at_once():
    with RemoteTarget(f"{TOY}:bad=crash") as target, target.open(MODEL) as session:
        with pytest.raises(TargetCrashed, match="SIGSEGV"):
            session.prefill(INPUTS)
        assert not target.alive
        with pytest.raises(TargetCrashed, match="ended before"):
            session.prefill(INPUTS)


def test_a_hang_ends_at_its_time_limit_and_the_process_is_gone():
    with RemoteTarget(f"{TOY}:bad=hang", limits=Limits(call_s=0.3)) as target, target.open(MODEL) as session:
        with pytest.raises(TargetHung, match=r"prefill within 0\.3 s"):
            session.prefill(INPUTS)
        assert not target.alive


def test_an_exception_of_the_target_keeps_its_type_and_the_worker_stays():
    with RemoteTarget(f"{TOY}:bad=raise") as target, target.open(MODEL) as session:
        with pytest.raises(TargetRaised, match="row 7") as caught:
            session.prefill(INPUTS)
        assert caught.value.type_name == "IndexError"
        assert "LookupError" in caught.value.bases
        assert session.preprocess([Prompt("a")])["input_ids"].tolist() == [[1]]


def test_an_answer_that_is_no_plain_data_is_an_error_of_the_target():
    with RemoteTarget(f"{TOY}:bad=object") as target, target.open(MODEL) as session:
        step = session.prefill(INPUTS)
        with pytest.raises(TargetRaised):
            step.tokens()


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [("list", "answered list"), ("lists", "input_ids: the target answered list"), ("no-mask", "attention_mask")],
)
def test_inputs_of_another_kind_than_documented_are_named(bad, sentence):
    with RemoteTarget(f"{TOY}:bad={bad}") as target, target.open(MODEL) as session:
        with pytest.raises(TargetMisspoke, match=sentence):
            session.preprocess([Prompt("a")])
        assert target.alive


def test_logits_that_are_no_array_are_named():
    with (
        RemoteTarget(f"{TOY}:bad=none") as target,
        target.open(MODEL) as session,
        pytest.raises(TargetMisspoke, match="logits: the target answered NoneType"),
    ):
        session.prefill(INPUTS).logits()


def test_an_unknown_capability_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"telepathy; known are preprocess"):
        RemoteTarget(f"{TOY}:bad=capability")


def test_a_signal_without_a_name_is_reported_by_its_number():
    with (
        RemoteTarget(f"{TOY}:bad=signal") as target,
        target.open(MODEL) as session,
        pytest.raises(TargetCrashed, match=f"signal {signal.SIGRTMIN + 1}"),
    ):
        session.vision({"pixel_values": np.ones(1)})


def test_a_crash_is_no_hang_although_a_child_of_the_target_holds_the_pipe():
    with (
        RemoteTarget(f"{TOY}:bad=fork", limits=Limits(call_s=100)) as target,
        target.open(MODEL) as session,
        pytest.raises(TargetCrashed, match="exit status 7"),
    ):
        session.vision({"pixel_values": np.ones(1)})


def test_children_of_a_target_end_with_it():
    with RemoteTarget(f"{TOY}:bad=child") as target, target.open(MODEL) as session:
        session.vision({"pixel_values": np.ones(1)})
        assert wait_until(sleepers), "the toy starts a child process"
    assert wait_until(lambda: not sleepers()), "the child outlived its target"


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def sleepers():
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and b"654321" in (process / "cmdline").read_bytes():
                found.append(process)
        except OSError:  # it has just ended
            continue
    return found


def test_an_answer_that_is_too_large_ends_the_worker_instead_of_being_misread(monkeypatch):
    with RemoteTarget(TOY) as target, target.open(MODEL) as session:
        monkeypatch.setattr(wire, "ARRAYS_LIMIT_BYTES", 4)
        with pytest.raises(TargetMisspoke, match="at most 4 are read"):
            session.preprocess([Prompt("a")])
        assert not target.alive


def test_a_refused_option_arrives_as_the_users_mistake():
    with pytest.raises(UsageError, match="refused by the toy"):
        RemoteTarget(f"{TOY}:bad=usage")


def test_a_missing_interpreter_is_named():
    with pytest.raises(UsageError, match="no-such-python"):
        RemoteTarget(TOY, python="/no-such-python")


def test_another_interpreter_finds_our_packages_behind_its_own(tmp_path):
    own = tmp_path / "own"
    (own / "vlmqual_adapters").mkdir(parents=True)
    (own / "vlmqual_adapters" / "__init__.py").write_text("PINNED = True\n")  # hides ours, as a pinned package would
    (own / "numpy").symlink_to(Path(np.__file__).parent)
    for libraries in Path(np.__file__).parents[1].glob("numpy.libs"):
        (own / "numpy.libs").symlink_to(libraries)
    adapter = tmp_path / "adapter.py"
    adapter.write_text(
        "import importlib.util, sys\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "import vlmqual_adapters\n"
        "assert vlmqual_adapters.PINNED\n"
        "from toy_target import Toy\n"
    )
    python = tmp_path / "python"  # -S: without the packages that are installed beside this interpreter
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{own}"\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    with RemoteTarget(f"{adapter}:Toy", python=str(python)) as target:
        assert target.info.name == "toy"


def test_another_interpreter_is_told_where_an_installed_kind_comes_from(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "numpy").symlink_to(Path(np.__file__).parent)
    for libraries in Path(np.__file__).parents[1].glob("numpy.libs"):
        (own / "numpy.libs").symlink_to(libraries)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{own}"\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises((UsageError, TargetRaised), match="torch"):  # found, but there is no torch
        RemoteTarget("eager", python=str(python))


def test_ranks_are_asked_in_lock_step_and_the_slowest_counts():
    with RemoteTarget(f"{TOY}:ranks=many", tp=2) as target, target.open(MODEL, Options(tp=2)) as session:
        assert target.processes == 2
        assert target.probe("stream", (1,), "float32") == 2.0, "rank r of the toy reports r + 1 seconds"
        work = session.prepare("decode", inputs=INPUTS, steps=3)
        result = session.repeat(work, 2)
        assert [len(steps) for steps in result.seconds] == [3, 3]
        assert result.tokens is not None
        assert result.tokens.shape == (2, 4)
        assert result.digests[0] == result.digests[1] != ""


def test_one_process_is_enough_for_a_device_that_splits_the_work_itself():
    with RemoteTarget(f"{TOY}:ranks=one", tp=2) as target:
        assert target.processes == 1


def test_an_impossible_split_is_refused_with_the_layers_sentence():
    with RemoteTarget(f"{TOY}:ranks=many", tp=3) as target, pytest.raises(UsageError, match="4 attention heads"):
        target.open(MODEL, Options(tp=3))


def test_one_dead_rank_ends_the_whole_group_without_waiting_for_the_limit():
    start = time.monotonic()
    with RemoteTarget(f"{TOY}:ranks=many,bad=rank1", tp=2, limits=Limits(open_s=500)) as target:
        with pytest.raises(TargetCrashed, match="exit status 7"):
            target.open(MODEL, Options(tp=2))
        assert not target.alive
    assert time.monotonic() - start < 250, "the surviving rank must not be waited for until its limit of 500 s"


def test_ranks_that_all_refuse_the_same_go_on():
    with RemoteTarget(f"{TOY}:ranks=many", tp=2) as target, target.open(MODEL, Options(tp=2)) as session:
        with pytest.raises(Unsupported, match="collective"):
            session.prepare("prefill", inputs=INPUTS, collectives=True)
        assert target.alive
        assert len(session.repeat(session.prepare("prefill", inputs=INPUTS)).seconds) == 1


def test_the_clock_covers_the_synchronisation_of_the_target():
    with RemoteTarget(TOY) as target, target.open(MODEL) as session:
        work = session.prepare("prefill", inputs=INPUTS)
        (values,) = session.repeat(work).seconds
        assert values[0] >= 0.001, "synchronize() of the toy sleeps for a millisecond inside the interval"


def test_a_phase_that_does_not_exist_is_refused():
    with (
        RemoteTarget(TOY) as target,
        target.open(MODEL) as session,
        pytest.raises(UsageError, match="preprocess, vision"),
    ):
        session.prepare("training")


def test_the_worker_ends_when_its_parent_is_killed():
    script = (
        "import sys\n"
        "from vlmqual_contract.remote import RemoteTarget\n"
        f"target = RemoteTarget({TOY!r})\n"
        "print(target._group._workers[0]._process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists(), "the worker outlived its killed parent"
    with pytest.raises((ProcessLookupError, ChildProcessError)):
        os.waitpid(pid, os.WNOHANG)
