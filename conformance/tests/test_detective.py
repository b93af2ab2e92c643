"""The precision detective over made-up deviations, whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlmqual_conformance import detective
from vlmqual_conformance.detective import Finding, Seen
from vlmqual_contract import resemblance
from vlmqual_contract.resemblance import Fingerprints, Side, Trace
from vlmqual_contract.target import FloatArray

CASES = ("one", "two", "three", "four", "five", "six")
SHAPE = (len(CASES), 5, 40)
SIZES = {"float64": 1e-9, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
EVERY = tuple(SIZES)
KINDS = ("weights", "cache", "products")


def draw(seed: int, size: float, shape: tuple[int, ...] = SHAPE) -> FloatArray:
    """Normal numbers of some root mean square."""
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return size * drawn / np.sqrt(np.mean(drawn**2))


GOLD = draw(0, 1.0)
INT8 = draw(1, 0.03)
FP8 = draw(2, 0.15)
CACHE = draw(3, 0.08)
TF32 = draw(4, 1e-3)


@pytest.fixture
def prints() -> Fingerprints:
    """Fingerprints of four schemes, and honest arms of which none is like a scheme by more than 0.2."""
    traces = (
        Trace("int8-row", "weights", "int8, one scale per output row", EVERY, INT8),
        Trace("fp8-tensor", "weights", "fp8 (e4m3), one scale per tensor", EVERY, FP8),
        Trace("kv-fp8", "cache", "fp8 (e4m3), one scale per write", EVERY, CACHE),
        Trace("tf32", "products", "tf32", ("float64", "float32"), TF32),
    )
    side = Side(traces, {dtype: (0.8 * size, size) for dtype, size in SIZES.items()}, dict.fromkeys(KINDS, 0.2))
    moved = {name: draw(10 + index, 1.0, SHAPE[1:]) for index, name in enumerate(CASES)}
    return Fingerprints(CASES, "one", side, side, moved, dict.fromkeys(EVERY, (0.3, 0.5)))


def find(prints: Fingerprints, declared: str, deviation: FloatArray, cases: tuple[str, ...] = CASES) -> Finding:
    text = {name: (GOLD[index] + deviation[index], GOLD[index]) for index, name in enumerate(CASES) if name in cases}
    return detective.find(prints, declared, Seen(text))


def names(finding: Finding) -> list[str]:
    return [each.scheme for opinion in finding.opinions for each in opinion.named]


@pytest.mark.parametrize("dtype", EVERY)
def test_rounding_of_the_declared_dtype_is_not_accused(prints: Fingerprints, dtype: str) -> None:
    found = find(prints, dtype, draw(20, SIZES[dtype]))
    assert not found.accused
    assert str(found) == f"computes like {dtype}; declared {dtype}"


def test_a_finer_precision_is_said_and_not_accused(prints: Fingerprints) -> None:
    found = find(prints, "bfloat16", draw(21, SIZES["float32"]))
    assert not found.accused
    assert str(found) == "computes like float32, finer than declared; declared bfloat16"


def test_a_coarser_precision_is_accused(prints: Fingerprints) -> None:
    found = find(prints, "float32", draw(22, SIZES["float16"]))
    assert found.accused
    assert str(found) == "computes like float16; declared float32"


def test_int8_weights_are_named_where_bfloat16_hides_their_size(prints: Fingerprints) -> None:
    deviation = INT8 + draw(23, SIZES["bfloat16"])
    found = find(prints, "bfloat16", deviation)
    assert found.opinions[0].size < found.opinions[0].limit, "the size alone is within the budget"
    assert found.accused
    assert names(found) == ["int8-row"]
    (named,) = found.opinions[0].named
    assert abs(named.match.coefficient - 1.0) < 4 * named.match.error < 0.2
    assert str(found).endswith("what remains computes like bfloat16; declared bfloat16")
    assert str(found).startswith("weights look like int8, one scale per output row (coefficient ")


def test_weights_and_cache_are_named_together(prints: Fingerprints) -> None:
    assert sorted(names(find(prints, "float16", FP8 + CACHE + draw(24, 2e-3)))) == ["fp8-tensor", "kv-fp8"]


def test_half_of_the_weights_give_half_of_the_coefficient(prints: Fingerprints) -> None:
    (named,) = find(prints, "float32", 0.5 * INT8).opinions[0].named
    assert named.match.coefficient == pytest.approx(0.5)


def test_the_opposite_of_a_scheme_is_not_that_scheme(prints: Fingerprints) -> None:
    found = find(prints, "float32", -INT8)
    assert found.accused
    assert not names(found)


def test_what_is_like_nothing_is_said_to_be_like_nothing(prints: Fingerprints) -> None:
    found = find(prints, "float32", draw(25, 0.5))
    assert found.unclear
    assert not found.accused
    assert not names(found)
    assert "in a way that resembles no known precision" in str(found)


def test_a_wrong_table_of_the_size_of_a_coarser_dtype_is_no_precision(prints: Fingerprints) -> None:
    """Within the size of float16, but the same on inputs that differ, as rounding is not."""
    deviation = draw(30, 2e-3)
    text = {name: (GOLD[index] + deviation[index], GOLD[index]) for index, name in enumerate(CASES)}
    stays = {name: prints.moved[name] + deviation[index] for index, name in enumerate(CASES)}
    found = detective.find(prints, "float32", Seen(text, moved=stays))
    assert found.unclear
    assert "as wrong weights do" in str(found)


def test_tf32_is_no_news_of_a_target_that_declares_bfloat16(prints: Fingerprints) -> None:
    assert not find(prints, "bfloat16", TF32).accused
    assert names(find(prints, "float32", TF32 + draw(26, 1e-6))) == ["tf32"]


def test_products_are_not_named_where_all_is_as_coarse(prints: Fingerprints) -> None:
    """Rounded products are a part of bfloat16's error; the whole of it is bfloat16."""
    found = find(prints, "float32", TF32 + draw(27, 1.2e-3))
    assert not names(found)
    assert str(found) == "computes like float16; declared float32"


def test_few_cases_need_a_greater_likeness(prints: Fingerprints) -> None:
    deviation = INT8 + draw(28, 0.04)
    assert names(find(prints, "bfloat16", deviation)) == ["int8-row"]
    assert not names(find(prints, "bfloat16", deviation, CASES[:1]))


def test_an_error_that_stays_when_the_input_moves_is_said_and_not_accused(prints: Fingerprints) -> None:
    deviation = draw(29, 2e-2)
    text = {name: (GOLD[index] + deviation[index], GOLD[index]) for index, name in enumerate(CASES)}
    stays = {name: prints.moved[name] + deviation[index] for index, name in enumerate(CASES)}
    goes = {name: prints.moved[name] + draw(40 + index, 2e-2, SHAPE[1:]) for index, name in enumerate(CASES)}
    assert detective.find(prints, "bfloat16", Seen(text, moved=stays)).opinions[0].steady
    assert not detective.find(prints, "bfloat16", Seen(text, moved=stays)).accused
    assert not detective.find(prints, "bfloat16", Seen(text, moved=goes)).opinions[0].steady


def test_the_vision_side_is_named_by_itself(prints: Fingerprints) -> None:
    text = {name: (GOLD[index], GOLD[index]) for index, name in enumerate(CASES)}
    found = detective.find(prints, "bfloat16", Seen(text, vision=(GOLD + FP8, GOLD)))
    assert found.accused
    assert "vision: weights look like fp8 (e4m3), one scale per tensor" in str(found)


def test_without_a_case_nothing_is_said(prints: Fingerprints) -> None:
    found = detective.find(prints, "float32", Seen({}))
    assert not found.accused
    assert str(found) == "cannot tell: none of the cases could be run; declared float32"


def test_fingerprints_come_back_from_their_file(prints: Fingerprints, tmp_path: Path) -> None:
    np.savez(tmp_path / "family.npz", **resemblance.arrays(prints))
    back = resemblance.read(tmp_path / "family.npz")
    assert (back.cases, back.pictured, back.steadiness) == (prints.cases, prints.pictured, prints.steadiness)
    for one, other in zip(back.text.traces, prints.text.traces, strict=True):
        assert (one.name, one.kind, one.says, one.coarser_than) == (
            other.name,
            other.kind,
            other.says,
            other.coarser_than,
        )
        assert resemblance.cosine(one.deviation, other.deviation) > 0.999
    assert back.text.sizes == prints.text.sizes


def test_chance_counts_only_schemes_that_would_accuse() -> None:
    trace = Trace("tf32", "products", "tf32", ("float32",), TF32)
    assert resemblance.chance({"bfloat16": (TF32,)}, (trace,)) == {"products": 0.0}
    assert resemblance.chance({"float32": (-TF32,)}, (trace,)) == {"products": pytest.approx(1.0)}
