from __future__ import annotations

import numpy as np
import pytest

from vlmqual_contract import fixtures
from vlmqual_contract.scenario import load_scenarios
from vlmqual_perf.judge import ROUNDOFF_RATIO, Reference, budgets, compare, error, in_dtype, stored_budgets
from vlmqual_perf.statistics import drift, medians, percentile, resolution, steady


def test_windows_that_agree_within_five_per_cent_are_steady():
    assert steady([9, 9, 9, 1.00, 1.00, 1.00, 1.04, 1.04, 1.04], 3)
    assert not steady([1.00, 1.00, 1.00, 1.06, 1.06, 1.06], 3)
    assert not steady([1.0] * 5, 3), "two whole windows are needed"


def test_one_outlier_does_not_unsettle_a_window():
    assert steady([1.0, 1.0, 1.0, 1.0, 50.0, 1.0], 3)


def test_a_rising_series_has_a_trend_and_a_flat_noisy_one_has_none():
    assert drift([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]) == pytest.approx(2 * (1.55 / 1.15 - 1))
    assert drift(np.linspace(2.0, 1.0, 20)) < 0
    assert drift(1.0 + 0.01 * np.random.Generator(np.random.PCG64(1)).standard_normal(40)) == 0
    assert drift([1.0, 2.0, 3.0]) == 0


def test_a_jump_back_and_forth_is_no_trend():
    assert drift([1.0, 1.2] * 10) == 0


def test_a_percentile_is_given_when_ten_values_stand_behind_what_it_leaves_out():
    values = np.arange(1000.0)
    assert percentile(values, 0.99) == np.quantile(values, 0.99)
    assert percentile(values[:999], 0.99) is None
    assert percentile(values[:200], 0.95) is not None
    assert percentile(values[:199], 0.95) is None


def test_the_resolution_shrinks_with_more_values_and_is_zero_without_spread():
    values = np.random.Generator(np.random.PCG64(7)).lognormal(0.0, 0.3, 400)
    assert resolution(values) < resolution(values[:10])
    assert resolution([2.0] * 9) == 0.0


def test_a_change_of_the_size_of_the_resolution_is_seen_in_about_eight_of_ten_pairs():
    draws = np.random.Generator(np.random.PCG64(3))
    spread, count = 0.1, 40
    truth = 1.2533 * spread / count**0.5  # standard error of the median of normal values
    change = (1.96 + 0.84) * 2**0.5 * truth
    pairs = [(1 + spread * draws.standard_normal(count), 1 + spread * draws.standard_normal(count)) for _ in range(200)]
    said = float(np.median([resolution(first) for first, _ in pairs]))
    assert 0.7 * change < said < 1.3 * change, f"resolution says {said:.4f}; by the textbook it is {change:.4f}"
    seen = sum(np.median(second) + change - np.median(first) > 1.96 * 2**0.5 * truth for first, second in pairs)
    assert 140 <= seen <= 180, f"a change of that size was seen in {seen} of 200 pairs"


def test_a_repetition_is_the_median_of_its_steps():
    assert medians([[1.0, 2.0, 9.0], [4.0]]).tolist() == [2.0, 4.0]


def reference() -> Reference:
    limits = {"prefill": 0.1, "decode": 0.1}
    return Reference(np.zeros((1, 2), np.int64), "digest", np.ones((2, 1, 4)), limits, "test")


def test_the_error_is_the_worst_vectors_distance_by_golds_scale():
    gold = np.array([[3.0, 4.0], [0.0, 5.0]])  # both vectors have norm 5
    assert error(gold + np.array([[0.0, 0.0], [0.0, 1.0]]), gold) == pytest.approx(0.2)
    assert error(gold * np.nan, gold) == float("inf")
    assert error(gold[:1], gold) == float("inf")


@pytest.mark.parametrize(
    ("logits", "digest", "dtype", "sentence"),
    [
        (1.0, "digest", "float32", ""),
        (1.05, "digest", "float32", ""),
        (1.2, "digest", "float32", "budget of 0.1"),
        (np.nan, "digest", "float32", "not finite"),
        (1.0, "other", "float32", "tokens differ"),
        (1.0, "other", "bfloat16", ""),
    ],
)
def test_a_size_is_judged_by_logits_and_in_exact_dtypes_by_tokens(logits, digest, dtype, sentence):
    checks, wrong = compare(reference(), "decode", np.full((2, 1, 4), logits), digest, dtype)
    assert sentence in wrong
    assert bool(sentence) == bool(wrong)
    assert checks["tp1_tokens_equal"] == (digest == "digest")


def test_a_wrong_decode_step_is_not_held_against_the_prefill():
    logits = np.ones((2, 1, 4))
    logits[1] = 2.0
    assert compare(reference(), "prefill", logits, "digest", "float32")[1] == ""
    assert compare(reference(), "ttft", logits, "digest", "float32")[1] == ""
    assert "decode" in compare(reference(), "decode", logits, "digest", "float32")[1]


def test_budgets_are_twice_the_measured_noise_of_each_phase():
    gold = np.ones((3, 1, 4))
    own = gold * np.array([1.01, 1.02, 1.0])[:, None, None]
    assert budgets(own, gold, "bfloat16") == pytest.approx({"prefill": 0.02, "decode": 0.04})
    scaled = budgets(gold, own, "float64")
    assert scaled == pytest.approx({"prefill": 0.02 * ROUNDOFF_RATIO, "decode": 0.04 * ROUNDOFF_RATIO})


def test_an_arm_that_is_not_finite_gives_no_budget():
    gold = np.ones((2, 1, 4))
    assert budgets(gold * np.nan, gold, "float32") == {}
    assert budgets(gold, gold * np.nan, "float32") == {}


def test_the_target_of_the_other_arm_is_the_same_one_in_another_dtype():
    assert in_dtype("eager", "float64") == "eager:dtype=float64"
    assert in_dtype("eager:device=cuda,dtype=bfloat16", "float64") == "eager:device=cuda,dtype=float64"
    assert in_dtype("dir/my.py:Mine:a=1", "float64") == "dir/my.py:Mine:a=1,dtype=float64"


def test_stored_budgets_are_twice_the_worst_noise_of_the_checkpoints_goldens():
    scenario = load_scenarios(fixtures.file("scenarios.toml"))["idefics3-photo"]
    found = stored_budgets(scenario, "bfloat16")
    noise = {"prefill": 0.0, "decode": 0.0}
    for name in fixtures.names("goldens/idefics3/"):
        if name.endswith(".npz"):
            with np.load(fixtures.file(name)) as golden:
                for phase in noise:
                    noise[phase] = max(noise[phase], float(golden[f"noise/bfloat16/{phase}/logits"]))
    assert found == {phase: 2 * value for phase, value in noise.items()}
    assert stored_budgets(scenario, "int4") == {}
