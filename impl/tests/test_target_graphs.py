"""The targets over OpenVINO and ONNX Runtime: options, what they answer, and compiled functions that are moved."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_objects import CHECKPOINTS, slim

from vlmqual_contract import fixtures
from vlmqual_contract.discovery import make_target
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Capability, Costs, Model, Options
from vlmqual_impl.target_graphs import GraphSession, row_buckets

KINDS = [
    pytest.param(
        kind,
        id=kind,
        marks=pytest.mark.skipif(
            any(find_spec(name) is None for name in needed), reason=f"{' and '.join(needed)} is not installed"
        ),
    )
    for kind, needed in {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnx", "onnxscript"]}.items()
]
each_kind = pytest.mark.parametrize("kind", KINDS)
OPTIONS = Options(max_length=96, batch=1)
STEPS = 3


@dataclass(frozen=True)
class Answer:
    """What a target made of a request: tokens and logits of the prompt and every step."""

    tokens: list[list[int]]
    logits: np.ndarray
    costs: Costs
    cache: Path


@pytest.fixture(scope="module", autouse=True)
def _table_of_operators() -> Iterator[None]:
    """For every function torch reads the sources of all ONNX operators anew, a third of its time; here once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: slim(source, folder / family) for family, source in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def compiled(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Answer]:
    """What a target over a compiler answers, with the functions in `Answer.cache` that it had to compile."""

    @cache
    def answered(kind: str, family: str) -> Answer:
        folder = tmp_path_factory.mktemp("compiled")
        return answer(f"{kind}:cache={folder},chunk=16", family, checkpoints[family], folder)

    return answered


def request(family: str) -> dict[str, np.ndarray]:
    """The shorter prompt of two goldens' rows without its padding: more than one chunk of 16."""
    with np.load(fixtures.file(f"goldens/{family}/batch-right.npz"), allow_pickle=False) as file:
        inputs = {name.removeprefix("inputs/"): file[name][1:] for name in file.files if name.startswith("inputs/")}
    real = inputs["attention_mask"][0] != 0
    texts = {name for name in inputs if inputs[name].shape[1:2] == real.shape}
    return {name: array[:, real] if name in texts else array for name, array in inputs.items()}


def answer(text: str, family: str, checkpoint: Path, folder: Path = Path()) -> Answer:
    """Greedy tokens and logits of a prompt and the steps after it, and the costs where there are such."""
    with make_target(text).open(Model(str(checkpoint), family), OPTIONS) as session:
        step = session.prefill(request(family))
        tokens, logits = [step.tokens().tolist()], [step.logits()]
        for _ in range(STEPS):
            step = session.decode(step)
            tokens.append(step.tokens().tolist())
            logits.append(step.logits())
        costs = session.costs() if isinstance(session, GraphSession) else Costs()
    return Answer(tokens, np.stack(logits), costs, folder)


@each_kind
@pytest.mark.parametrize("family", list(CHECKPOINTS))
def test_tokens_and_logits_are_those_of_the_eager_target(
    kind: str, family: str, checkpoints: dict[str, Path], compiled: Callable[[str, str], Answer]
) -> None:
    found = compiled(kind, family)
    exact = answer("eager:dtype=float64", family, checkpoints[family])
    honest = answer("eager", family, checkpoints[family])
    noise = np.abs(honest.logits - exact.logits).max()
    assert found.tokens == exact.tokens
    assert np.abs(found.logits - exact.logits).max() < 8 * noise, "further from float64 than float32 can explain"


@each_kind
@pytest.mark.parametrize("family", list(CHECKPOINTS))
def test_costs_tell_bucket_padding_and_the_time_of_every_function(
    kind: str, family: str, compiled: Callable[[str, str], Answer]
) -> None:
    costs = compiled(kind, family).costs
    prompt = len(request(family)["input_ids"][0])
    assert prompt > 16, "one chunk is not enough"
    assert (costs.calls["prefill"].asked, costs.calls["prefill"].computed) == (prompt, -(-prompt // 16) * 16)
    assert (costs.calls["decode"].asked, costs.calls["decode"].computed) == (1, 1)
    assert {name for call in costs.calls.values() for name in call.programs} == set(costs.programs)
    assert all(program.compile_s > 0 for program in costs.programs.values())
    assert all(program.load_s > 0 for program in costs.programs.values())


@each_kind
def test_compiled_functions_that_are_moved_give_the_same_tokens_and_nothing_is_compiled(
    kind: str, checkpoints: dict[str, Path], compiled: Callable[[str, str], Answer], tmp_path: Path
) -> None:
    first = compiled(kind, "idefics3")
    here, there = tmp_path / "here", tmp_path / "else" / "where"
    shutil.copytree(first.cache, there)
    checkpoint = shutil.copytree(checkpoints["idefics3"], tmp_path / "checkpoint")
    found = answer(f"{kind}:cache={there},chunk=16,reuse=only", "idefics3", checkpoint)
    assert found.tokens == first.tokens
    assert np.array_equal(found.logits, first.logits)
    assert all(program.compile_s == 0 for program in found.costs.programs.values()), "something was compiled again"
    with pytest.raises(ValueError, match="holds no compiled vision-112x112, and nothing may be compiled"):
        answer(f"{kind}:cache={here},chunk=16,reuse=only", "idefics3", checkpoint)
    model = next(there.glob("text-b1-s1-*")) / ("model.xml" if kind == "openvino" else "model.onnx")
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{model.name} is truncated or was changed"):
        answer(f"{kind}:cache={there},chunk=16,reuse=only", "idefics3", checkpoint)


@each_kind
def test_a_target_says_what_it_is(kind: str, tmp_path: Path) -> None:
    info = make_target(f"{kind}:cache={tmp_path},dtype=float16").info
    assert (info.name, info.dtype, info.device, info.processes) == (kind, "float16", "CPU", "one")
    assert info.fixed_shapes
    assert not info.emulated
    assert not {Capability.TAPS, Capability.TENSOR_PARALLEL} & info.capabilities


@each_kind
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("dtype=int8", "dtype 'int8' is not known; valid are float32, float16"),
        ("attention=flash", "attention 'flash' is not known; valid are sdpa, eager"),
        ("reuse=never", "reuse 'never' is not known; valid are yes, no, only"),
        ("chunk=0", "chunk '0' is no positive number of tokens"),
        ("chunk=many", "chunk 'many' is no positive number of tokens"),
        ("threads=-1", "threads '-1' is no positive number"),
        ("device=TPU", "device 'TPU' is not here; there are .*CPU"),
        ("cache=/dev/null", "cache /dev/null is no directory"),
        ("colour=red", "colour"),
    ],
)
def test_a_wrong_option_is_refused_by_name_value_and_what_is_valid(kind: str, options: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_target(f"{kind}:{options}")


@pytest.mark.parametrize("kind", KINDS[:1])
def test_openvino_is_asked_for_its_own_device_names(kind: str) -> None:
    with pytest.raises(UsageError, match=r"OpenVINO device 'NPU\.7' is not here; there are CPU"):
        make_target(f"{kind}:device=NPU.7")


@pytest.mark.parametrize("kind", KINDS[:1])
def test_openvino_is_loaded_without_its_telemetry(kind: str, tmp_path: Path) -> None:
    make_target(f"{kind}:cache={tmp_path}")
    assert sys.modules.get("openvino_telemetry") is None


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_execution_provider_is_named_with_or_without_its_ending(kind: str) -> None:
    from vlmqual_impl.runtime.onnx_engine import provider

    assert provider("CPU") == provider("CPUExecutionProvider") == "CPUExecutionProvider"
    with pytest.raises(ValueError, match=r"ONNX Runtime device 'QNN' is not here; there are .*CPU"):
        provider("QNN")


@each_kind
def test_several_ranks_are_not_offered_and_another_family_is_refused(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    target: Any = make_target(f"{kind}:cache={tmp_path}")
    model = Model(str(checkpoints["idefics3"]), "idefics3")
    for ask in (target.check, lambda *given: target.open(*given).__enter__()):
        with pytest.raises(Unsupported, match=f"tp 2: {kind} runs the model on one device; 1 is valid"):
            ask(model, Options(tp=2))
        with pytest.raises(UsageError, match="is a checkpoint of 'idefics3', not 'mllama'"):
            ask(Model(model.path, "mllama"), Options())
    assert not list(tmp_path.iterdir()), "refusing costs nothing"


@each_kind
def test_threads_are_those_that_were_asked_for(kind: str, tmp_path: Path) -> None:
    from vlmqual_impl.artifacts import Shelf

    target: Any = make_target(f"{kind}:cache={tmp_path},threads=3")
    assert target.engine(Shelf(tmp_path, tmp_path), OPTIONS)._threads == 3
    target = make_target(f"{kind}:cache={tmp_path}")
    assert target.engine(Shelf(tmp_path, tmp_path), OPTIONS)._threads == torch.get_num_threads()


def test_row_buckets_are_powers_of_two_and_the_largest_number() -> None:
    assert [row_buckets(most) for most in (1, 2, 3, 4, 6)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 4, 6)]
