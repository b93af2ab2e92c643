"""Level decode: the last position of the cache is as good as any other."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import MAX_LENGTH, demand
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import FAMILIES, Array, Info


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=requirement(f"{name.upper()}-DEC-001")) for name in FAMILIES]
)
def test_a_step_into_the_last_position_of_the_cache_gives_what_the_prompt_gives(
    session: RemoteSession, info: Info, judge: Judge, family: str
) -> None:
    text, long = golden(family, "text-only"), golden(family, "across-blocks")
    demand(info, text.needs())
    whole = {name: _repeated(array, MAX_LENGTH) for name, array in text.text.items()}
    shorter = {name: np.ascontiguousarray(array[:, :-1]) for name, array in whole.items()}
    at_once = session.prefill(whole, text.features).logits()
    step = session.decode(session.prefill(shorter, text.features), whole["input_ids"][:, -1])
    noises = (long.noise("decode/logits", info.dtype), long.noise("prefill/logits", info.dtype))
    judge.same(f"decode/logits at position {MAX_LENGTH - 1}", step.logits(), at_once, noises)
    judge.verdict()


def _repeated(array: Array, length: int) -> Array:
    """An input (1, S, ...) again and again up to (1, length, ...)."""
    return np.ascontiguousarray(np.take(array, np.arange(length) % array.shape[1], axis=1))
