from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from graph_objects import ModuleEngine, both
from safetensors import safe_open

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.footprint import Footprint
from vlmqual_contract.target import Model, Options, Prompt
from vlmqual_impl.families import family
from vlmqual_impl.runtime.graphs import GraphRuntime, Shapes
from vlmqual_impl.target import EagerSession, EagerTarget
from vlmqual_impl.target_footprint import outline

PHOTO = str(fixtures.image("astronaut.png"))
CASES = {
    "idefics": ("idefics-tiny", "User: Compare<image>with<image>now.", 2),
    "idefics3": ("idefics3-tiny", "<|begin_of_text|>User:<image>What is it?<end_of_utterance>\nAssistant:", 1),
    "mllama": ("mllama-tiny", "<|begin_of_text|><|image|>What is it?", 1),
}


def asked(name: str, rows: int = 1) -> tuple[Model, list[Prompt]]:
    checkpoint, text, images = CASES[name]
    return Model(str(fixtures.checkpoint(checkpoint)), name), [Prompt(text, (PHOTO,) * images)] * rows


def eager(name: str, tp: int = 1, rows: int = 1, dtype: str = "float32", max_length: int = 512) -> Footprint:
    model, prompts = asked(name, rows)
    return EagerTarget(dtype=dtype).footprint(model, Options(tp=tp, max_length=max_length, batch=rows), prompts, 4)


class Counting(ModuleEngine):
    """Counts the calls of every function that is really run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def program(self, entry, mates=()):
        run = super().program(entry, mates)

        def counted(inputs, states=None):
            self.calls[entry.name] += 1
            return run(inputs, states)

        return counted


@pytest.mark.parametrize("name", CASES)
def test_an_outline_calls_what_the_model_calls(name: str) -> None:
    model, prompts = asked(name, rows=3)
    shapes = Shapes(64, 512, (1, 2, 4))
    options = Options(max_length=512, batch=3)
    told = outline(model, options, prompts, 4, dtype=torch.float32, attention="sdpa", shapes=shapes)
    graphs, _ = both(CASES[name][0], torch.float32)
    engine = Counting()
    kind = family(name)
    directory = fixtures.checkpoint(CASES[name][0])
    session = EagerSession(GraphRuntime(graphs, engine, shapes), kind, "", directory, options)
    step = session.prefill(session.preprocess(prompts))
    for _ in range(3):
        step = session.decode(step)
    assert {graph.name: graph.calls for graph in told.graphs()} == dict(engine.calls)
    assert [graph.name for graph in told.graphs()] == list(dict.fromkeys(engine.calls))


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_file(name: str) -> None:
    path = fixtures.checkpoint(CASES[name][0]) / "model.safetensors"
    with safe_open(str(path), "np") as file:
        count = sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    assert eager(name).weights_bytes == count * 4
    assert eager(name, dtype="bfloat16").weights_bytes == count * 2


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_its_part(name: str) -> None:
    one, two, four = (eager(name, tp=tp) for tp in (1, 2, 4))
    assert (two.cache_bytes, four.cache_bytes) == (one.cache_bytes // 2, one.cache_bytes // 4)
    # What is cut shrinks as 1/n, what every rank holds whole stays: w(n) = whole + cut / n.
    assert one.weights_bytes - two.weights_bytes == 2 * (two.weights_bytes - four.weights_bytes) > 0
    assert (two.devices, four.devices) == (2, 4)


def test_the_cache_is_what_the_configuration_says() -> None:
    config = json.loads((fixtures.checkpoint("idefics3-tiny") / "config.json").read_text("utf-8"))["text_config"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    each = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * 4
    assert eager("idefics3").cache_bytes == each * 512
    assert eager("idefics3", rows=2, max_length=1024).cache_bytes == each * 1024 * 2


def test_a_function_counts_the_weights_that_it_reads() -> None:
    for name in CASES:
        graphs, _ = both(CASES[name][0], torch.float32)
        entry = graphs.text(1, 4, 8, 17 if name != "idefics3" else 0)
        rest = [p.requires_grad_(False) for p in entry.module.parameters()]
        inputs = [spec.zeros() for spec in (*entry.inputs, *entry.states)]
        reads = {id(weight) for weight in entry.weights()}
        for weight in rest:
            weight.requires_grad_(True)
        outputs = entry.module(*inputs)
        (outputs[0].sum() + sum(one.sum() for one in outputs[1:] if one.requires_grad)).backward()
        touched = {id(weight) for weight in rest if weight.grad is not None}
        assert reads == touched, name


def test_a_configuration_without_weights_is_enough() -> None:
    model = Model(str(fixtures.checkpoint("idefics-9b-processor")), "idefics")
    prompts = [Prompt("User:<image>What is it?", (PHOTO,))]
    found = EagerTarget(dtype="bfloat16").footprint(model, Options(tp=4, max_length=2048), prompts, 16)
    text = 32 * 2 * 2048 * 4096 * 2  # 32 layers, keys and values, width 4096
    images = 8 * 2 * 64 * 4096 * 2  # 8 blocks, 64 latents
    assert found.cache_bytes == (text + images) // 4


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    model, prompts = asked("idefics3")
    with pytest.raises(UsageError, match="16"):
        EagerTarget().footprint(model, Options(max_length=16), prompts, 4)
