"""Honest orders of sums, and runs that go through a model together."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional

from vlmqual_reference import arms as arms_module
from vlmqual_reference.arms import ARMS, Arm, arms


def attention() -> torch.Tensor:
    make = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn((1, 2, size, 64), generator=make) for size in (9, 13, 13))
    bias = torch.zeros((1, 1, 9, 13)).masked_fill(torch.ones((9, 13), dtype=torch.bool).triu(5), -1e30)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


@pytest.mark.parametrize("arm", ARMS[1:], ids=lambda arm: arm.name)
def test_an_arm_gives_the_same_sums_up_to_rounding(arm: Arm) -> None:
    make = torch.Generator().manual_seed(5)
    x, weight = torch.randn((7, 256), generator=make), torch.randn((33, 256), generator=make)
    plain = (functional.linear(x, weight), attention())
    with arm.modes():
        other = (functional.linear(x, weight), attention())
    assert any(not torch.equal(one, two) for one, two in zip(plain, other, strict=True)), "it has to be another order"
    for one, two in zip(plain, other, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-4)


def test_attention_in_pieces_of_its_queries_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention()
    monkeypatch.setattr(arms_module, "_SCORES", 2 * 13 * 4)
    with Arm("spelled", spelled=True).modes():
        assert torch.allclose(attention(), plain, rtol=1e-5, atol=1e-6)


def test_golds_own_order_is_no_arm_of_its_dtype() -> None:
    assert [arm.name for arm in arms("bfloat16", 2)] == [arm.name for arm in ARMS[:2]]
    assert [arm.name for arm in arms("float32", 2)] == [arm.name for arm in ARMS[1:3]]


def test_no_thread_of_a_run_is_left_behind() -> None:
    from test_reference_maker import PROMPTS, SILENT, wanted

    from vlmqual_reference.lockstep import Run
    from vlmqual_reference.maker import Opened
    from vlmqual_reference.passes import walk

    opened = Opened(wanted(), "float32", SILENT)
    session = opened.session(64)
    inputs = session.preprocess([PROMPTS[1].prompt])

    def fails() -> None:
        raise ValueError("on purpose")

    before = threading.active_count()
    with pytest.raises(ValueError, match="on purpose"):
        opened.lockstep.go([Run(lambda: walk(session, inputs, 2)), Run(fails)])
    for thread in threading.enumerate()[before:]:
        thread.join(5)
    assert threading.active_count() == before
