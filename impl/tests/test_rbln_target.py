"""The target over RBLN's SDK, run over its emulator: what it answers, options, compiled functions that are moved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from graph_objects import CHECKPOINTS, slim
from test_target_graphs import OPTIONS, answer, request

import vlmqual_rebel
from vlmqual_contract import fixtures
from vlmqual_contract.discovery import make_target
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Capability, Model, Options, Prompt


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    yield
    vlmqual_rebel.uninstall()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: slim(source, folder / family) for family, source in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def rbln(cache: Path, **options: str) -> str:
    given = {"emulate": "1", "cache": str(cache), "chunk": "16", **options}
    return "rbln:" + ",".join(f"{name}={value}" for name, value in given.items())


@pytest.mark.parametrize("family", list(CHECKPOINTS))
def test_tokens_and_logits_are_those_of_the_eager_target(
    family: str, checkpoints: dict[str, Path], cache: Path
) -> None:
    found = answer(rbln(cache), family, checkpoints[family])
    exact = answer("eager:dtype=float64", family, checkpoints[family])
    noise = np.abs(answer("eager", family, checkpoints[family]).logits - exact.logits).max()
    assert found.tokens == exact.tokens
    assert np.abs(found.logits - exact.logits).max() < 8 * noise, "further from float64 than float32 can explain"


def test_sequences_that_live_at_one_time_do_not_touch_each_other(checkpoints: dict[str, Path], cache: Path) -> None:
    family = "idefics3"
    alone = answer(rbln(cache), family, checkpoints[family])
    inputs = request(family)
    other = {**inputs, "input_ids": inputs["input_ids"].copy()}
    other["input_ids"][:, -3:] = 7
    vlmqual_rebel.uninstall()
    with make_target(rbln(cache)).open(Model(str(checkpoints[family]), family), OPTIONS) as session:
        first = session.prefill(inputs)
        second = session.prefill(other)
        tokens = [first.tokens().tolist()]
        for _ in range(3):
            first, second = session.decode(first), session.decode(second)
            tokens.append(first.tokens().tolist())
    assert tokens == alone.tokens


def test_compiled_functions_are_found_again_after_a_move_and_refused_when_damaged(
    checkpoints: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    family = "idefics3"
    before = answer(rbln(cache), family, checkpoints[family])
    vlmqual_rebel.uninstall()
    moved = tmp_path / "moved"
    shutil.copytree(cache, moved)
    after = answer(rbln(moved, reuse="only"), family, checkpoints[family])
    assert after.tokens == before.tokens
    np.testing.assert_array_equal(after.logits, before.logits)
    vlmqual_rebel.uninstall()
    with pytest.raises(ValueError, match=r"nothing may be compiled \(reuse=only\): engine is"):
        answer(rbln(moved, reuse="only", npu="RBLN-CR13"), family, checkpoints[family])
    vlmqual_rebel.uninstall()
    files = list(moved.glob("text-b1-s16-*/text-b1-s1-*.rbln"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"\.rbln is truncated or was changed"):
        answer(rbln(moved, reuse="only"), family, checkpoints[family])


def test_an_emulated_target_says_so_and_offers_no_tensor_parallelism(checkpoints: dict[str, Path], cache: Path) -> None:
    target = make_target(rbln(cache))
    assert target.info.emulated
    assert "emulated" in target.info.device
    assert "emulated" in target.info.runtime
    assert Capability.TENSOR_PARALLEL not in target.info.capabilities
    with (
        pytest.raises(Unsupported, match="the emulator accounts for tensor parallelism, it does not run it"),
        target.open(Model(str(checkpoints["idefics3"]), "idefics3"), Options(tp=2)),
    ):
        pass


def test_a_declared_rounding_is_the_declared_dtype(cache: Path) -> None:
    assert make_target(rbln(cache, numeric="bfloat16")).info.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"npu": "RBLN-XX9"}, "RBLN-XX9"),
        ({"device": "a"}, "device 'a' is no device number"),
        ({"device": "3-1"}, "device '3-1' is no device number"),
        ({"emulate": "2"}, "emulate '2'"),
        ({"numeric": "fp8"}, "numeric 'fp8'"),
        ({"emulate": "0", "numeric": "bfloat16"}, "it needs emulate=1"),
        ({"emulate": "0"}, "rebel-compiler cannot be found"),
        ({"dtype": "float64"}, "dtype 'float64'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, str], said: str, cache: Path) -> None:
    with pytest.raises(UsageError, match=said):
        make_target(rbln(cache, **options))


def test_several_devices_share_weights_and_cache_of_the_text_model(cache: Path) -> None:
    target = make_target(rbln(cache))
    model = Model(str(fixtures.checkpoint("idefics3-tiny")), "idefics3")
    prompts = [Prompt("<|begin_of_text|>User: Who?<end_of_utterance>\nAssistant:")]
    one, two = (target.footprint(model, Options(tp=tp, max_length=256), prompts, 3) for tp in (1, 2))
    assert [graph.name for graph in one.graphs] == ["text-b1-s16-k256-of1", "text-b1-s1-k256-of1"]
    assert one.weights_bytes == one.graphs[0].weights_bytes, "prefill and decode share their weights"
    assert two.weights_bytes == one.weights_bytes // 2
    assert two.cache_bytes == one.cache_bytes // 2 == 4 * 2 * 256 * 4 * 8 * 4 // 2
    assert one.memory_bytes == 16 * 2**30 - 288 * 2**20
    with pytest.raises(UsageError, match="tp 3"):
        target.footprint(model, Options(tp=3), prompts, 3)
