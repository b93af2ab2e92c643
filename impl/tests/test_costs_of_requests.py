"""The cost model against torch's counter on requests as the bundled target runs them, tiny checkpoints and all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from vlmqual_contract import fixtures
from vlmqual_contract.records import Measurement
from vlmqual_contract.target import MARKERS, Inputs, Model, Options, Prompt
from vlmqual_impl.target import EagerTarget
from vlmqual_perf import costs
from vlmqual_perf.cards import card
from vlmqual_perf.costs_request import of_tensors
from vlmqual_perf.plan import config_of

CHECKPOINTS = {
    "idefics-tiny": "idefics",
    "idefics-resampler-tiny": "idefics",
    "idefics3-tiny": "idefics3",
    "mllama-tiny": "mllama",
}


def prompts(family: str, kind: str) -> list[Prompt]:
    """One row, text only, or two rows of unequal length with unequal numbers of images."""
    marker = MARKERS[family]
    photo, other = str(fixtures.image("astronaut.png")), str(fixtures.image("rocket.png"))
    short = Prompt(f"User:{marker}What is it?", (photo,))
    if kind == "photo":
        return [short]
    if kind == "text":
        return [Prompt("User: Name three things that can be seen in a harbour.")]
    return [short, Prompt(f"User:{marker}Compare this with{marker}and say in many words what differs.", (photo, other))]


@pytest.mark.parametrize("kind", ["photo", "text", "batch"])
@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS))
def test_flops_of_a_request_agree_with_torchs_counter(checkpoint: str, kind: str) -> None:
    family = CHECKPOINTS[checkpoint]
    model = Model(str(fixtures.checkpoint(checkpoint)), family)
    config = config_of(model)
    with EagerTarget(attention="eager").open(model, Options(max_length=2048, batch=2)) as session:
        session._runtime.model.requires_grad_(False)  # torch's counter fails on bare parameters that want gradients
        inputs = session.preprocess(prompts(family, kind))
        computed, _ = of_tensors(inputs, config)
        features = None
        if "pixel_values" in inputs:
            with FlopCounterMode(display=False) as vision:
                features = session.vision(inputs)
            assert costs.cost(config, computed, "vision", dtype="float32").total_flops == vision.get_total_flops()
        with FlopCounterMode(display=False) as prefill:
            step = session.prefill(inputs, features)
        assert costs.cost(config, computed, "prefill", dtype="float32").total_flops == prefill.get_total_flops()
        for index in range(2):
            with FlopCounterMode(display=False) as decode:
                step = session.decode(step)
            wanted = costs.cost(config, computed, "decode", dtype="float32", step=index).total_flops
            assert wanted == decode.get_total_flops(), f"step {index}"


def measured(phase: str, family: str, **shape: int) -> Measurement:
    values = ((0.5, 0.5),) if phase == "decode" else ((0.5,),)
    return Measurement("c", "s", family, phase, 1, 2, "float32", shape, values)


def mllama_inputs(tiles: list[list[int]], lengths: list[int]) -> Inputs:
    """Two image slots a row, with so many real tiles each; rows padded on the left."""
    longest = max(lengths)
    mask = np.array([[0] * (longest - one) + [1] * one for one in lengths])
    real = np.array([[[1] * count + [0] * (4 - count) for count in row] for row in tiles])
    return {
        "input_ids": mask,
        "attention_mask": mask,
        "pixel_values": np.zeros((2, 2, 4, 3, 56, 56), np.float32),
        "aspect_ratio_ids": np.array([[int(count > 0) for count in row] for row in tiles]),
        "aspect_ratio_mask": real,
    }


@pytest.fixture(scope="module")
def mllama() -> dict[str, object]:
    return config_of(Model(str(fixtures.checkpoint("mllama-tiny")), "mllama"))


def test_padded_tiles_and_tokens_are_a_share_of_the_work(mllama: dict[str, object]) -> None:
    full = mllama_inputs([[4, 4], [4, 4]], [9, 9])
    assert card(measured("vision", "mllama"), full, mllama)["padding_share"] == 0
    assert card(measured("prefill", "mllama"), full, mllama)["padding_share"] == 0
    half = mllama_inputs([[1, 4], [0, 4]], [9, 3])
    found = card(measured("vision", "mllama"), half, mllama)
    assert 7 / 16 < found["padding_share"] < 0.6, "7 of 16 tiles are padding, and attention grows faster than tiles"
    # After one of three steps: four layers read 10 positions of each row and write one, of the second row 4 are real;
    # two layers read 17 positions of each of 16 tiles, of which 9 are real.
    decode = card(measured("decode", "mllama", new_tokens=3), half, mllama)
    assert decode["kv_padding_share"] == pytest.approx(
        1 - (4 * (10 + 4 + 2) + 2 * 17 * 9) / (4 * (20 + 2) + 2 * 17 * 16)
    )


def test_a_card_has_what_was_counted_and_nothing_for_phases_without_cost(mllama: dict[str, object]) -> None:
    inputs = mllama_inputs([[4, 1], [2, 2]], [9, 5])
    assert card(measured("preprocess", "mllama"), inputs, mllama) == {}
    assert card(measured("load", "mllama"), inputs, mllama) == {}
    vision, prefill, both = (card(measured(phase, "mllama"), inputs, mllama) for phase in ("vision", "prefill", "ttft"))
    assert both["flops"] == vision["flops"] + prefill["flops"]
    assert both["weights_bytes"] == vision["weights_bytes"] + prefill["weights_bytes"]
    counted: Any = {name for name in prefill if name.endswith("bytes")}
    assert {"weights_bytes", "kv_write_bytes", "cross_kv_write_bytes", "all_reduce_bytes"} <= counted
