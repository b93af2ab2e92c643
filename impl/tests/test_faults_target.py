"""The faulty target is the bundled one but for what is wrong on purpose."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.target import Capability, Model, Options, Target
from vlmqual_faults.catalogue import variant
from vlmqual_faults.nursery import Nursery
from vlmqual_faults.surgery import Change
from vlmqual_faults.target import FaultyTarget
from vlmqual_impl.target import EagerTarget

MODEL = Model(str(fixtures.checkpoint("idefics3-tiny")), "idefics3")
OPTIONS = Options(max_length=32, batch=1)
INPUTS = {"input_ids": np.array([[7, 40, 11, 90, 3]]), "attention_mask": np.ones((1, 5), np.int64)}


def logits(target: Target) -> np.ndarray:
    with target.open(MODEL, OPTIONS) as session:
        found: np.ndarray = session.decode(session.prefill(INPUTS)).logits()
        return found


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return logits(EagerTarget(threads=1))


def test_a_fault_is_there_while_a_model_is_open_and_gone_afterwards(truth: np.ndarray) -> None:
    assert np.abs(logits(FaultyTarget("rms-epsilon", threads=1)) - truth).max() > 1e-3
    assert np.array_equal(logits(EagerTarget(threads=1)), truth)


def test_an_honest_variant_gives_the_same_up_to_rounding(truth: np.ndarray) -> None:
    found = logits(FaultyTarget("honest-mlp-split", threads=1))
    assert np.allclose(found, truth, rtol=1e-4, atol=1e-5)


def test_the_target_says_what_it_is_and_declares_the_variants_dtype() -> None:
    info = FaultyTarget("honest-bfloat16").info
    assert (info.name, info.dtype, info.library) == ("faulty", "bfloat16", "")
    assert "honest-bfloat16" in info.runtime
    assert FaultyTarget("shuffle-missing").info.families == ("idefics3",)


def test_a_profile_takes_away_what_a_device_does_not_show() -> None:
    everything, logits_only, least = (
        FaultyTarget("rms-epsilon", offers=offers).info.capabilities for offers in ("taps", "all-logits", "last-logits")
    )
    assert everything - logits_only == {Capability.TAPS}
    assert everything - least == {Capability.TAPS, Capability.ALL_LOGITS}


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="fault 'rms' is not known"):
        FaultyTarget("rms")
    with pytest.raises(UsageError, match="offers 'all' is not known"):
        FaultyTarget("rms-epsilon", offers="all")
    with (
        pytest.raises(UsageError, match="'tiles-apart' is none of idefics3"),
        FaultyTarget("tiles-apart").open(MODEL, OPTIONS),
    ):
        pass


def test_a_fault_whose_place_has_moved_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = replace(variant("mllama", "tiles-apart"), changes=(Change("layers:rotate", "what is not there", "x"),))
    monkeypatch.setattr("vlmqual_faults.target.variant", lambda family, name: moved)
    with pytest.raises(UsageError, match="mllama tiles-apart: layers:rotate has 0 times 'what is not there', not once"):
        FaultyTarget("tiles-apart")


# workers that are copies ----------------------------------------------------------------------------------------------


def test_a_worker_of_the_nursery_answers_as_any_other(nursery: Nursery, truth: np.ndarray) -> None:
    target = RemoteTarget("eager:threads=1", python=nursery.python, threads=1)
    try:
        session = target.open(MODEL, OPTIONS)
        assert np.array_equal(session.decode(session.prefill(INPUTS)).logits(), truth)
    finally:
        target.stop()
    wrong = RemoteTarget("faulty:fault=rms-epsilon,threads=1", python=nursery.python, threads=1)
    try:
        session = wrong.open(MODEL, OPTIONS)
        assert np.abs(session.decode(session.prefill(INPUTS)).logits() - truth).max() > 1e-3
    finally:
        wrong.stop()


def test_a_worker_of_the_nursery_says_what_is_wrong_with_its_target(nursery: Nursery) -> None:
    with pytest.raises(UsageError, match="fault 'rms' is not known"):
        RemoteTarget("faulty:fault=rms", python=nursery.python)


def test_a_worker_of_the_nursery_ends_with_what_was_started_in_its_place(nursery: Nursery) -> None:
    number = nursery._process.pid
    copies = Path(f"/proc/{number}/task/{number}/children")
    command = [nursery.python, "-c", "", "", "--target", "eager"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        wait_until(lambda: copies.read_text() != "")
        started.kill()
        wait_until(lambda: copies.read_text() == "")  # although its input is still open


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "nothing has changed in a minute"
        time.sleep(0.05)
