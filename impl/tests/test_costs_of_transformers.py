"""The cost model against torch's counter over transformers, an implementation of its own."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from vlmqual_contract import fixtures
from vlmqual_contract.discovery import make_target
from vlmqual_contract.target import MARKERS, Model, Options, Prompt
from vlmqual_perf import costs
from vlmqual_perf.costs_request import of_tensors
from vlmqual_perf.plan import config_of

CHECKPOINTS = {"idefics-resampler-tiny": "idefics", "idefics3-tiny": "idefics3", "mllama-tiny": "mllama"}


@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS))
def test_flops_agree_within_one_percent(checkpoint: str) -> None:
    family = CHECKPOINTS[checkpoint]
    model = Model(str(fixtures.checkpoint(checkpoint)), family)
    config = config_of(model)
    target = make_target("transformers:attn=eager")
    with target.open(model, Options(max_length=1024)) as session:
        loaded: Any = next(value for value in vars(session).values() if hasattr(value, "requires_grad_"))
        loaded.requires_grad_(False)  # torch's counter fails on bare parameters that want gradients
        inputs = session.preprocess(
            [Prompt(f"User:{MARKERS[family]}What is it?", (str(fixtures.image("astronaut.png")),))]
        )
        computed, _ = of_tensors(inputs, config)
        with FlopCounterMode(display=False) as vision:
            features = session.vision(inputs)
        with FlopCounterMode(display=False) as prefill:
            step = session.prefill(inputs, features)
        with FlopCounterMode(display=False) as decode:
            session.decode(step)
    counted = costs.cost(config, computed, "vision", dtype="float32")
    assert counted.total_flops == pytest.approx(vision.get_total_flops(), rel=0.01)
    # The adapter asks for the logits of every position.
    counted = costs.cost(config, computed, "prefill", dtype="float32", every_position=True)
    assert counted.total_flops == pytest.approx(prefill.get_total_flops(), rel=0.01)
    counted = costs.cost(config, computed, "decode", dtype="float32")
    # Idefics: transformers makes keys and values of images (6 features of width 32, for 48 in each of 4 blocks) anew in
    # every step, which need not be.
    anew = 4 * 2 * 2 * 6 * 32 * 48 if family == "idefics" else 0
    assert counted.total_flops + anew == pytest.approx(decode.get_total_flops(), rel=0.01)
