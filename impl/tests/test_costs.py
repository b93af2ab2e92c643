"""The cost model against what torch counts: FLOPs, parameters, caches and sums over ranks, at published sizes."""

from __future__ import annotations

import pytest
from observed import PHASES, configuration, observe

from vlmqual_perf import costs
from vlmqual_perf.costs_request import Request

# Two rows, two pictures each: Mllama has four tiles in each, the others one picture or frame in each.
ROWS, TOKENS, PICTURES = 2, 24, 2
MODELS = ("idefics-9b", "idefics3-8b", "mllama-11b")
TILES = {"idefics": (1,) * PICTURES, "idefics3": (PICTURES,), "mllama": (4,) * PICTURES}
SIZES = (1, 2, 4)


def request_for(name: str) -> Request:
    return Request((TOKENS,) * ROWS, (TILES[str(configuration(name)["model_type"])],) * ROWS)


def cost(name: str, phase: str, ranks: int) -> costs.Cost:
    return costs.cost(configuration(name, shallow=True), request_for(name), phase, tp=ranks, dtype="bfloat16")


@pytest.fixture(params=[(name, ranks) for name in MODELS for ranks in SIZES], ids=lambda pair: f"{pair[0]}-tp{pair[1]}")
def pair(request: pytest.FixtureRequest) -> tuple[str, int]:
    name, ranks = request.param
    return str(name), int(ranks)


def test_flops_agree_with_torchs_counter(pair: tuple[str, int]) -> None:
    name, ranks = pair
    seen = observe(name, ranks, ROWS, TOKENS, PICTURES)
    for phase in PHASES:
        found = cost(name, phase, ranks).total_flops
        assert found == seen.phases[phase].flops, f"{phase} on {ranks} ranks"


def test_weights_are_the_parameters_that_a_rank_holds(pair: tuple[str, int]) -> None:
    name, ranks = pair
    found = costs.weights_bytes(configuration(name, shallow=True), tp=ranks, dtype="bfloat16")
    assert found == observe(name, ranks, ROWS, TOKENS, PICTURES).weights_bytes


def test_weights_read_are_the_parameters_that_a_phase_touches(pair: tuple[str, int]) -> None:
    name, ranks = pair
    seen = observe(name, ranks, ROWS, TOKENS, PICTURES)
    for phase in PHASES:
        found, read = cost(name, phase, ranks).weights_bytes, seen.phases[phase].read_bytes
        # Idefics: the bundled model looks every token up in both tables, of which one is needed.
        assert found == (pytest.approx(read, rel=1e-4) if name.startswith("idefics-") else read), phase


def test_keys_and_values_are_the_caches_tensors(pair: tuple[str, int]) -> None:
    name, ranks = pair
    seen = observe(name, ranks, ROWS, TOKENS, PICTURES)
    first, then = cost(name, "prefill", ranks), cost(name, "decode", ranks)
    prefill, decode = seen.phases["prefill"], seen.phases["decode"]
    assert (first.kv_write_bytes, first.cross_kv_write_bytes) == (prefill.written_bytes, prefill.cross_written_bytes)
    assert (first.kv_read_bytes, first.cross_kv_read_bytes) == (0, 0)
    assert (then.kv_read_bytes, then.cross_kv_read_bytes) == (decode.cached_bytes, decode.cross_cached_bytes)
    assert (then.kv_write_bytes, then.cross_kv_write_bytes) == (decode.written_bytes, 0)
    assert first.kv_write_bytes > 0
    assert (then.cross_kv_read_bytes > 0) == (not name.startswith("idefics3"))


def test_all_reduces_are_those_of_the_row_modules(pair: tuple[str, int]) -> None:
    name, ranks = pair
    seen = observe(name, ranks, ROWS, TOKENS, PICTURES)
    for phase in PHASES:
        found, wanted = cost(name, phase, ranks), seen.phases[phase]
        if ranks == 1:  # a plan for one rank still has its sums, which are nothing then
            assert (found.all_reduces, found.all_reduce_bytes) == (0, 0)
        else:
            assert (found.all_reduces, found.all_reduce_bytes) == (wanted.sums, wanted.summed_bytes), phase


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("idefics-80b", 80.0, 0.01),
        ("idefics-9b", 9.0, 0.01),
        ("idefics3-8b", 8.46, 0.001),
        ("mllama-11b", 10.67, 0.001),
        ("mllama-90b", 88.8, 0.01),
    ],
)
def test_weights_agree_with_published_parameter_counts(name: str, billions: float, tolerance: float) -> None:
    parameters = costs.weights_bytes(configuration(name), dtype="int8")
    assert parameters == pytest.approx(billions * 1e9, rel=tolerance)


def test_logits_of_every_position_cost_the_head_for_each() -> None:
    values, request = configuration("mllama-11b"), request_for("mllama-11b")
    last = costs.cost(values, request, "prefill", dtype="bfloat16").flops["head"]
    every = costs.cost(values, request, "prefill", dtype="bfloat16", every_position=True).flops["head"]
    assert (last, every) == (ROWS * 2 * 4096 * 128256, ROWS * TOKENS * 2 * 4096 * 128256)
