"""Level prefill: rope_type llama3 follows its settings, not those of the released checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmqual_conformance.goldens import golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper, options_for
from vlmqual_conformance.suite import checks
from vlmqual_contract.target import Info, Model

#: The rule compares the trained context over a wavelength with both limits, so all three may grow together.
GROWING = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
TIMES = 4


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("idefics3", marks=requirement("IDEFICS3-TEXT-004")),
        pytest.param("mllama", marks=requirement("MLLAMA-DECODER-003")),
    ],
)
def test_settings_of_the_same_frequencies_give_the_same_logits(
    model: Model, keeper: TargetKeeper, info: Info, judge: Judge, checkpoint_copies: Path, family: str
) -> None:
    config = json.loads((Path(model.path) / "config.json").read_text("utf-8"))
    grown = {name: config["text_config"]["rope_scaling"][name] * TIMES for name in GROWING}
    settings = {"text_config": {"rope_scaling": grown}}
    same = checks.with_settings(model, checkpoint_copies / f"{family}-rotary", "config.json", settings)
    checks.logits_at_the_end(keeper.session(same, options_for(info)), info, judge, golden(family, "text-long"))
