"""Changes of the implementation are exact, and gone afterwards."""

from __future__ import annotations

import pytest
import torch

from vlmqual_faults.surgery import Change, SurgeryError, changed
from vlmqual_impl import layers
from vlmqual_impl.layers import RMSNorm
from vlmqual_impl.models import mllama_vision
from vlmqual_impl.weights import wanted_name

NORM = "layers:RMSNorm.forward"


def normed() -> float:
    return float(RMSNorm(1, 0.0)(torch.tensor([[4.0]])).detach())


def test_a_change_holds_inside_the_block_and_is_taken_back() -> None:
    code = RMSNorm.forward.__code__
    assert normed() == 1.0
    with changed(Change(NORM, "+ self.eps", "+ 48.0")):
        assert normed() == 0.5
    assert RMSNorm.forward.__code__ is code
    assert normed() == 1.0


def test_whoever_held_the_function_before_sees_the_change() -> None:
    held = layers.rotate
    x, one = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    with changed(Change("layers:rotate", "torch.cat((-second, first), dim=-1)", "0 * x")):
        assert held(x, one, one).flatten().tolist() == [1.0, 2.0]
    assert held(x, one, one).flatten().tolist() == [-1.0, 3.0]


def test_a_change_is_taken_back_when_the_block_or_a_further_change_fails() -> None:
    code = RMSNorm.forward.__code__
    with pytest.raises(KeyError), changed(Change(NORM, "+ self.eps", "+ 1.0")):
        raise KeyError
    with (
        pytest.raises(SurgeryError),
        changed(Change(NORM, "+ self.eps", "+ 1.0"), Change("layers:nothing", "a", "b")),
    ):
        pass
    assert RMSNorm.forward.__code__ is code


def test_a_constant_is_changed_and_set_back() -> None:
    with changed(Change("models.mllama_vision:_MULTIPLE", "8", "old * 2")):
        assert mllama_vision._MULTIPLE == 16
    assert mllama_vision._MULTIPLE == 8


def test_several_lines_can_take_the_place_of_one() -> None:
    with changed(Change("weights:wanted_name", "    for pattern, replacement in rename:", "    for _ in ():")):
        assert wanted_name("a.b", {}, [("b", "c")]) == "a.b"
    assert wanted_name("a.b", {}, [("b", "c")]) == "a.c"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Change(NORM, "+ self.epsilon", ""), "RMSNorm.forward has 0 times '+ self.epsilon', not once"),
        (Change(NORM, "wide", "x"), "RMSNorm.forward has 5 times 'wide', not once"),
        (Change("layers:RMSNorm.backward", "a", "b"), "layers:RMSNorm.backward does not exist"),
        (Change("layer:RMSNorm.forward", "a", "b"), "layer:RMSNorm.forward"),
        (Change("layers", "a", "b"), "'layers' names no place"),
        (Change(NORM, "+ self.eps)", "+ self.eps"), "does not compile"),
        (Change("models.mllama_vision:_MULTIPLE", "7", "1"), "_MULTIPLE is 8, not 7"),
    ],
    ids=["another text", "several times", "no function", "no module", "no place", "no Python", "another value"],
)
def test_a_place_that_is_not_as_expected_is_refused_by_name(change: Change, says: str) -> None:
    with pytest.raises(SurgeryError) as refused, changed(change):
        pass
    assert says in str(refused.value)
