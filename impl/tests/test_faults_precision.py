"""The precision detective over the bundled implementation: silent schemes are named, honest dtypes are not accused."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlmqual_conformance import detective
from vlmqual_conformance.detective import Finding, Seen
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite.looks import look
from vlmqual_contract import fixtures
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info, Model, Options
from vlmqual_faults.target import FaultyTarget
from vlmqual_impl.target import EagerTarget

# In this process goldens reach the target as they are kept: read-only.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

FAMILY = "idefics3"
PRINTS = detective.fingerprints(FAMILY)
MODEL = Model(str(fixtures.checkpoint("idefics3-tiny")), FAMILY)


@dataclass
class Keeper:
    """As much of a keeper as `look` needs."""

    info: Info
    memory: dict[Hashable, object] = field(default_factory=dict)


class Tf32(TorchFunctionMode):
    """What a GPU's tf32 does: ten bits of mantissa are left of what goes into a product."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (functional.linear, torch.matmul, torch.Tensor.matmul, functional.conv2d):
            args = (kept(args[0]), kept(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def kept(x: Tensor) -> Tensor:
    """Rounded to eleven significant bits, by way of the exponent and not of the bits."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(fraction * 2048), exponent - 11)


def seen(target: FaultyTarget | EagerTarget, *, tf32: bool = False) -> Seen:
    keeper = cast(TargetKeeper, Keeper(target.info))
    with Tf32() if tf32 else nullcontext(), target.open(MODEL, Options(max_length=256, batch=2)) as session:
        return look(FAMILY, PRINTS, keeper, cast(RemoteSession, session))


def found(target: FaultyTarget | EagerTarget) -> Finding:
    return detective.find(PRINTS, target.info.dtype, seen(target))


def named(finding: Finding) -> dict[str, set[str]]:
    return {opinion.side: {each.scheme for each in opinion.named} for opinion in finding.opinions}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_honest_dtype_is_named_and_not_accused(dtype: str) -> None:
    finding = found(EagerTarget(dtype=dtype, threads=1))
    assert not finding.accused, str(finding)
    assert str(finding).startswith(f"computes like {dtype}")


@pytest.mark.parametrize(
    ("fault", "scheme"),
    [("weights-in-fp8", "fp8-tensor"), ("weights-in-int8", "int8-row"), ("weights-in-int4", "int4-row")],
)
def test_silent_weights_are_named_under_bfloat16(fault: str, scheme: str) -> None:
    finding = found(FaultyTarget(fault, dtype="bfloat16", threads=1))
    assert finding.accused
    assert named(finding) == {"text": {scheme}, "vision": {scheme}}, str(finding)


def test_a_silent_cache_in_fp8_is_named_and_the_weights_are_not_accused() -> None:
    finding = found(FaultyTarget("kv-in-fp8", dtype="float32", threads=1))
    assert finding.accused
    assert named(finding) == {"text": {"kv-fp8"}, "vision": set()}, str(finding)


def test_tf32_products_are_seen_and_the_weights_are_not_accused() -> None:
    made = seen(EagerTarget(dtype="float32", threads=1), tf32=True)
    as_float32 = detective.find(PRINTS, "float32", made)
    assert as_float32.accused
    assert all(schemes <= {"tf32"} for schemes in named(as_float32).values()), str(as_float32)
    assert not detective.find(PRINTS, "bfloat16", made).accused, "tf32 is finer than bfloat16"
