"""Text functions over pages, with the attention operators of RBLN's SDK: sequences equal to those run eagerly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from graph_objects import CHECKPOINTS, held, network, repeated, request
from torch import Tensor

import vlmqual_rebel
from vlmqual_impl.entries import Entry
from vlmqual_impl.families import family
from vlmqual_impl.graphs import GRAPHS
from vlmqual_impl.runtime.graphs import GraphRuntime, Shapes, text_entries

FAMILIES = list(CHECKPOINTS)
STEPS = 3
Call = tuple[str, dict[str, Tensor]]


@pytest.fixture(scope="module", autouse=True)
def _operators() -> Iterator[None]:
    vlmqual_rebel.install()
    yield
    vlmqual_rebel.uninstall()


class InPlaceEngine:
    """Runs entries as they are over buffers that they change in place, and keeps the calls of text entries."""

    name = "in place 1"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.made_s: dict[str, float] = {}
        self.states: list[Tensor] = []

    def program(self, entry: Entry, mates: Sequence[Entry] = ()) -> InPlaceProgram:
        return InPlaceProgram(self, entry)

    def new_states(self, entry: Entry) -> list[Tensor]:
        """Not zeros, so that a slot that nobody wrote shows where it is read."""
        self.states = [torch.full(spec.shape, 7.0, dtype=spec.dtype) for spec in entry.states]
        return self.states


class InPlaceProgram:
    def __init__(self, engine: InPlaceEngine, entry: Entry) -> None:
        self.engine, self.entry = engine, entry

    def __call__(self, inputs: Sequence[Tensor], states: Any = None) -> tuple[list[Tensor], Any]:
        entry = self.entry
        held(entry.inputs, inputs)
        if entry.states:
            names = [spec.name for spec in entry.inputs]
            self.engine.calls.append((entry.name, dict(zip(names, inputs, strict=True))))
        with torch.no_grad():
            made = entry.module(*inputs, *(states or ()))
        held(entry.outputs, made)
        return list(made), states


def run(runtime: Any, inputs: Mapping[str, Tensor], steps: int = STEPS) -> Tensor:
    """Logits (1 + steps, B, V) of a prompt and of greedy steps after it."""
    made = runtime.prefill(inputs, max_length=96)
    logits = [made.logits]
    for _ in range(steps):
        made = runtime.decode(made, made.logits.argmax(-1))
        logits.append(made.logits)
    return torch.stack(logits)


def paged(model: tuple[str, Any], shapes: Shapes) -> tuple[GraphRuntime, InPlaceEngine]:
    engine = InPlaceEngine()
    return GraphRuntime(GRAPHS[model[0]](model[1], "eager", paged=True), engine, shapes), engine


SHAPES = Shapes(chunk=16, max_length=96, rows=(1, 4), images=(1, 2))


@pytest.mark.parametrize("case", ["batch-left", "batch-right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_rows_over_pages_give_what_they_give_eagerly(name: str, case: str) -> None:
    model = network(CHECKPOINTS[name])
    inputs = request(name, case)
    runtime, _ = paged(model, SHAPES)
    wanted = run(family(name).runtime(model[1], "eager"), inputs)
    torch.testing.assert_close(run(runtime, inputs), wanted, rtol=1e-9, atol=1e-9)


def test_prompts_run_row_by_row_and_steps_in_the_bucket_over_the_same_pages() -> None:
    model = network(CHECKPOINTS["idefics3"])
    inputs = repeated(request("idefics3", "text-only"), [0, 0])
    tokens = inputs["input_ids"].shape[1]
    runtime, engine = paged(model, SHAPES)
    run(runtime, inputs, steps=1)
    chunks = -(-tokens // 16)
    assert [name for name, _ in engine.calls] == ["text-b1-s16-k96-of4"] * 2 * chunks + ["text-b4-s1-k96-of4"]
    assert [call["table"].tolist() for _, call in engine.calls] == [[0], [1]] * chunks + [[[0], [1], [2], [3]]]
    starts = [[[16 * index]] for index in range(chunks) for _ in range(2)]
    assert [call["start"].tolist() for _, call in engine.calls[:-1]] == starts
    assert engine.calls[-1][1]["start"].flatten().tolist() == [tokens] * 4
    assert runtime.waste["prefill"].computed == 2 * 16 * chunks


def test_all_bucket_sizes_share_the_states_of_one_prefill() -> None:
    graphs = GRAPHS["mllama"](network(CHECKPOINTS["mllama"])[1], "eager", paged=True)
    made = text_entries(graphs, SHAPES, 1, 0)
    assert [entry.name for entry in made] == ["text-b1-s16-k96-of4", "text-b1-s1-k96-of4", "text-b4-s1-k96-of4"]
    assert len({entry.states for entry in made}) == 1
    assert made[0].states[0].shape[0] == 4, "a page for each row of the largest bucket"


def test_more_rows_than_the_largest_bucket_have_pages_of_their_own() -> None:
    model = network(CHECKPOINTS["idefics3"])
    inputs = repeated(request("idefics3", "text-only"), [0] * 3)
    runtime, engine = paged(model, Shapes(chunk=16, max_length=96, rows=(1, 2)))
    found = run(runtime, inputs, steps=1)
    assert engine.states[0].shape[0] == 3
    for row in (1, 2):
        torch.testing.assert_close(found[:, row], found[:, 0])
