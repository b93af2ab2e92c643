"""The adapter over optimum-rbln: its options, and its phases against transformers on the same checkpoint.

optimum-rbln pins torch and transformers, so it wants an environment of its own: `nox -s conformance_optimum_rbln` runs
this file there, with the library in worker processes, over the emulator.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vlmqual_adapters.optimum_rbln import OptimumRblnTarget, device_ids, row_buckets
from vlmqual_adapters.optimum_rbln_session import padded_left
from vlmqual_conformance.goldens import Golden, golden
from vlmqual_contract import fixtures
from vlmqual_contract.errors import TargetFailure, Unsupported, UsageError
from vlmqual_contract.remote import RemoteSession, RemoteTarget
from vlmqual_contract.target import Array, Capability, FloatArray, Model, Options

INSTALLED = importlib.util.find_spec("optimum") is not None
vendor = pytest.mark.skipif(not INSTALLED, reason="optimum-rbln is not installed; see nox -s conformance_optimum_rbln")
MODEL = Model(str(fixtures.checkpoint("idefics3-tiny")), "idefics3")
EMULATED = "optimum-rbln:emulate=1"


# options ----------------------------------------------------------------------------------------------------------


def test_devices_are_an_id_or_a_range() -> None:
    assert [device_ids(text) for text in ("", "3", "0-3", "2-2")] == [(), (3,), (0, 1, 2, 3), (2,)]


def test_decode_is_compiled_for_powers_of_two_and_the_largest_number_of_rows() -> None:
    assert [row_buckets(most) for most in (1, 2, 3, 8)] == [[1], [2, 1], [3, 2, 1], [8, 4, 2, 1]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"emulate": "yes"}, "emulate 'yes' is unknown; valid are 0, 1"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; valid are float32, bfloat16, float16"),
        ({"attention": "sdpa"}, "attention 'sdpa' is unknown; valid are eager, flash"),
        ({"partition": "1024"}, "partition '1024' belongs to attention=flash; attention is 'eager'"),
        ({"numeric": "bfloat16"}, "numeric 'bfloat16' is a setting of the emulator; it needs emulate=1"),
        ({"chunk": "-64"}, "chunk '-64' is no positive number of tokens"),
        ({"device": "3-1"}, "device '3-1' is neither an id such as 0 nor a range of ids such as 0-3"),
        ({"device": "all"}, "device 'all' is neither an id such as 0 nor a range of ids such as 0-3"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_valid(options: Mapping[str, str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        OptimumRblnTarget(**options)
    assert str(caught.value) == sentence


@pytest.mark.skipif(INSTALLED, reason="optimum-rbln is installed")
def test_where_the_library_is_missing_the_error_says_what_to_install() -> None:
    with pytest.raises(UsageError, match=r"optimum-rbln is not installed here; .*pip install vlmqual\[rbln\]"):
        OptimumRblnTarget(emulate="1")


def test_padding_moves_to_the_left_of_each_row() -> None:
    ids = np.array([[5, 6, 7, 0], [0, 0, 8, 9], [1, 2, 3, 4]])
    mask = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]]) != 0
    moved, real = padded_left(ids, mask)
    assert moved.tolist() == [[0, 5, 6, 7], [0, 0, 8, 9], [1, 2, 3, 4]]
    assert real.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]


# in the vendor's environment --------------------------------------------------------------------------------------


@contextmanager
def opened(text: str, rows: int = 2) -> Iterator[RemoteSession]:
    target = RemoteTarget(text, threads=1)
    try:
        yield target.open(MODEL, Options(max_length=512, batch=rows))
    finally:
        target.stop()


def logits(session: RemoteSession, case: Golden, rows: list[int], steps: int = 3) -> FloatArray:
    """Logits (1 + steps, B, V) of rows of a golden case from its pixels, under its tokens."""
    inputs = {name: np.ascontiguousarray(array[rows]) for name, array in {**case.text, **case.pixels}.items()}
    return run(session, inputs, case.tokens[:steps, rows])


def run(session: RemoteSession, inputs: Mapping[str, Array], tokens: Array) -> FloatArray:
    step = session.prefill(inputs)
    found = [step.logits()]
    for given in tokens:
        step = session.decode(step, np.ascontiguousarray(given))
        found.append(step.logits())
    return np.stack(found)


@vendor
@pytest.mark.parametrize(
    "options",
    ["", ",attention=flash,partition=1024,chunk=64", ",npu=RBLN-CR13,attention=flash,partition=1024", ",device=3"],
)
def test_logits_are_those_of_transformers_whatever_the_order_of_the_rows(options: str) -> None:
    # With flash attention RBLN-CR takes rows in the order of their lengths only; here the shorter row comes first once.
    with opened("transformers") as reference, opened(EMULATED + options) as mine:
        for name, order in (("batch-left", [0, 1]), ("batch-right", [1, 0]), ("text-beside-image", [1, 0])):
            wanted, found = (logits(session, golden("idefics3", name), order) for session in (reference, mine))
            assert found.shape == wanted.shape
            # float32 in another order of summation; one position off shows 1e-1
            assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max(), f"{name} in the order {order}"


@vendor
def test_rows_that_nobody_asked_for_do_not_disturb_the_others() -> None:
    case = golden("idefics3", "text-only")
    ids = np.repeat(case.text["input_ids"], 3, axis=0)
    ids[1, 3], ids[2, 5] = 40, 41
    tokens = np.repeat(case.tokens[:3], 3, axis=1)
    with opened(EMULATED, rows=4) as session:  # decode of 3 rows goes to the program for 4
        whole = run(session, {"input_ids": ids}, tokens)
        alone = [run(session, {"input_ids": ids[row : row + 1]}, tokens[:, row : row + 1]) for row in range(3)]
    assert np.abs(whole - np.concatenate(alone, axis=1)).max() <= 2e-5 * np.abs(whole).max()


@vendor
def test_a_step_that_a_later_prefill_left_behind_is_refused() -> None:
    inputs = {"input_ids": golden("idefics3", "text-only").text["input_ids"]}
    with opened(EMULATED) as session:
        first = session.prefill(inputs)
        session.prefill(inputs)
        with pytest.raises(Unsupported, match="a later prefill has taken the cache of this step"):
            session.decode(first)


@vendor
def test_what_is_emulated_says_so_and_several_devices_are_not_offered() -> None:
    target = RemoteTarget(EMULATED, threads=1)
    try:
        info = target.info
        assert info.emulated
        assert "emulated" in info.device
        assert "emulated" in info.runtime
        assert info.library == EMULATED
        assert Capability.PIXEL_MASK in info.capabilities
        assert not {Capability.ALL_LOGITS, Capability.TAPS, Capability.TENSOR_PARALLEL} & info.capabilities
        with pytest.raises(Unsupported, match="tp 2: the emulator accounts for the memory of several devices"):
            target.open(MODEL, Options(tp=2))
    finally:
        target.stop()


@vendor
def test_without_the_sdk_and_without_the_emulator_the_error_names_both() -> None:
    with pytest.raises(UsageError, match=r"rebel-compiler is not installed here.*emulate=1 runs over an emulator"):
        RemoteTarget("optimum-rbln", threads=1)


@vendor
def test_a_compiled_model_is_found_again_also_in_a_moved_folder_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    case = golden("idefics3", "photo-whole")
    with opened(f"{EMULATED},cache={tmp_path / 'first'}") as session:
        before = logits(session, case, [0])
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*.rbln")}
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    with opened(f"{EMULATED},cache={moved}") as session:
        assert np.array_equal(logits(session, case, [0]), before)
    assert {path.name: path.stat().st_mtime_ns for path in moved.rglob("*.rbln")} == times, "compiled again"
    with opened(f"{EMULATED},cache={moved},dtype=bfloat16"):
        assert len(list(moved.iterdir())) == 2, "another dtype is another compiled model"
    for path in moved.rglob("prefill.rbln"):
        path.write_bytes(path.read_bytes()[:-100])
    with (
        pytest.raises((UsageError, TargetFailure), match=r"prefill\.rbln is cut short or damaged"),
        opened(f"{EMULATED},cache={moved}"),
    ):
        pass
