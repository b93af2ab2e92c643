from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlmqual_perf.gate_forecast import Noise, forecast, forecast_unpaired
from vlmqual_perf.gate_statistics import (
    FEWEST,
    IMPROVED,
    REGRESSED,
    UNCHANGED,
    UNDECIDED,
    Rule,
    decide,
    estimate,
    launch_value,
    orders,
    paired,
    unpaired,
)

RULE = Rule()


def normal(*shape, seed=1):
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def test_the_shares_of_all_looks_sum_to_one():
    for pairs in (6, 20, 34, 100, 400):
        rule = Rule(pairs=pairs)
        spent = [rule.spent(count) for count in range(pairs + 1)]
        assert spent == sorted(spent), "what was spent cannot be had back"
        assert spent[FEWEST - 1] == 0 < spent[FEWEST]
        assert spent[-1] == 1.0
        assert rule.spent(pairs + 10) == 1.0, "more log-ratios than were planned bring no further error"


def test_a_single_look_is_students_t_test_and_the_larger_of_two_shifted_ones():
    ratios, rule = 0.01 * normal(12) + 0.004, Rule(pairs=12)
    slower, faster, same = paired(ratios, [12], rule)[0]
    assert slower == pytest.approx(stats.ttest_1samp(ratios, 0.0, alternative="greater").pvalue, rel=1e-9)
    assert faster == pytest.approx(stats.ttest_1samp(ratios, 0.0, alternative="less").pvalue, rel=1e-9)
    edge = np.log(1.03)
    above = stats.ttest_1samp(ratios, -edge, alternative="greater").pvalue
    below = stats.ttest_1samp(ratios, edge, alternative="less").pvalue
    assert same == pytest.approx(max(above, below), rel=1e-9)


def test_a_look_divides_by_its_share_and_the_smallest_p_value_so_far_counts():
    ratios = 0.01 * normal(10) + 0.01
    alone = [stats.ttest_1samp(ratios[:count], 0.0, alternative="greater").pvalue for count in (6, 8, 10)]
    shares = np.diff([0.0, *(RULE.spent(count) for count in (6, 8, 10))])
    expected = np.minimum.accumulate(np.array(alone) / shares)
    assert paired(ratios, [2, 4, 6, 8, 10], RULE)[2:, 0] == pytest.approx(expected, rel=1e-9)
    assert (paired(ratios, [2, 4, 6, 8, 10], RULE)[:2] == 1.0).all(), "before the first look nothing is said"


def test_a_block_without_a_new_log_ratio_is_no_look():
    ratios = 0.01 * normal(8) + 0.01
    with_gaps = paired(ratios, [2, 2, 4, 6, 6, 6, 8], RULE)[[0, 2, 3, 6]]
    assert (with_gaps == paired(ratios, [2, 4, 6, 8], RULE)).all()


def test_welch_is_what_an_unpaired_look_is():
    a, b = 0.01 * normal(9, seed=2), 0.02 * normal(12, seed=3) + 0.01
    slower, faster, _ = unpaired(a, b, [12], Rule(pairs=12), 0.0)[0]
    assert slower == pytest.approx(stats.ttest_ind(b, a, equal_var=False, alternative="greater").pvalue, rel=1e-9)
    assert faster == pytest.approx(stats.ttest_ind(b, a, equal_var=False, alternative="less").pvalue, rel=1e-9)


def test_a_known_difference_of_sessions_widens_an_unpaired_look_as_a_normal_one():
    # Arms without any spread of their own: what is left is a normal variable with sqrt(2) times the session's spread.
    a, b = np.zeros(10) + [0, 1e-9] * 5, np.full(10, 0.03)
    slower = unpaired(a, b, [10], Rule(pairs=10), 0.01)[0, 0]
    assert slower == pytest.approx(stats.norm.sf(0.03 / (2**0.5 * 0.01)), rel=1e-3)


def test_arms_that_change_places_change_the_word():
    ratios = np.cumsum(0.005 * normal(200, 20, seed=4), axis=1) / 4 + 0.02 * normal(200, 1, seed=5)
    codes, looks = decide(paired(ratios, RULE.ends(), RULE)[:, None], RULE)
    swapped, at = decide(paired(-ratios, RULE.ends(), RULE)[:, None], RULE)
    other = np.array([UNDECIDED, UNCHANGED, IMPROVED, REGRESSED])
    assert len(set(codes.ravel())) > 2, "the drawn log-ratios have to lead to several words"
    assert (swapped == other[codes]).all()
    assert (at == looks).all()


def test_what_both_arms_share_does_not_matter():
    times = 0.01 * normal(2, 20, seed=6)
    values = paired(times[1] - times[0], RULE.ends(), RULE)
    faster_machine = times + np.log(7.0)
    assert paired(faster_machine[1] - faster_machine[0], RULE.ends(), RULE) == pytest.approx(values, rel=1e-6)


def test_a_steady_drift_leaves_the_mean_of_a_block_alone():
    for order in orders(10, seed=3):
        drift = np.arange(4.0)
        pairs = [order[:2], order[2:]]
        signs = [[1.0 if name == "B" else -1.0 for name in pair] for pair in pairs]
        first, second = (np.dot(sign, part) for sign, part in zip(signs, (drift[:2], drift[2:]), strict=True))
        assert first == -second != 0


def test_blocks_are_abba_or_baab_with_one_of_either_in_each_two():
    for seed in range(5):
        found = orders(11, seed)
        assert set(found) <= {("A", "B", "B", "A"), ("B", "A", "A", "B")}
        assert all(one != other for one, other in zip(found[::2], found[1::2], strict=False))
    assert orders(11, 1) == orders(11, 1)
    assert len({tuple(orders(11, seed)) for seed in range(20)}) > 5, "the seed decides"


def test_over_a_matrix_the_thresholds_are_benjamini_and_hochbergs():
    # Their example (1995), 15 p-values; at 5 % the first four are rejected, the fourth at its threshold of 0.0133.
    example = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    example += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000]
    values = np.ones((15, 1, 3))
    values[:, 0, 0] = example
    codes, _ = decide(values, Rule(alpha=0.10))  # half of it for each direction
    assert (codes == REGRESSED).tolist() == [True] * 4 + [False] * 11
    values[:, 0] = values[:, 0][:, [1, 0, 2]]
    codes, _ = decide(values, Rule(alpha=0.10))
    assert (codes == IMPROVED).tolist() == [True] * 4 + [False] * 11


def test_a_cell_is_never_called_changed_above_its_own_level_however_many_others_changed():
    values = np.ones((50, 1, 3))
    values[:49, 0, 0] = 1e-9
    for p, word in ((0.0049, REGRESSED), (0.0051, UNDECIDED)):
        values[49, 0, 0] = p
        assert decide(values, RULE)[0][49] == word


def test_a_decided_cell_stays_decided_and_names_its_look():
    values = np.ones((2, 3, 3))
    values[0, :, 2] = [1.0, 0.001, 0.001]
    values[0, :, 0] = [1.0, 1.0, 1e-9]
    values[1, :, 1] = [1.0, 1.0, 1e-9]
    codes, looks = decide(values, RULE)
    assert codes.tolist() == [UNCHANGED, IMPROVED]
    assert looks.tolist() == [1, 2]


def test_a_slowdown_within_the_margin_is_unchanged():
    ratios = np.log(1.01) + 1e-4 * normal(20, seed=7)
    codes, _ = decide(paired(ratios, RULE.ends(), RULE)[None], RULE)
    assert codes[0] == UNCHANGED


def test_launches_that_are_all_equal_leave_no_doubt():
    for change, word in ((0.0, UNCHANGED), (0.01, UNCHANGED), (0.5, REGRESSED), (-0.5, IMPROVED)):
        codes, looks = decide(paired(np.full(20, change), RULE.ends(), RULE)[None], RULE)
        assert (codes[0], looks[0]) == (word, 2), f"equal log-ratios of {change} are decided at the first look"


def test_few_launches_say_nothing():
    codes, looks = decide(paired(np.full(4, 9.0), [2, 4], RULE)[None], RULE)
    assert (codes[0], looks[0]) == (UNDECIDED, -1)
    assert estimate(np.full(4, 9.0), [2, 4], RULE) is None


def test_the_interval_is_students_at_the_level_of_its_look():
    ratios = 0.01 * normal(8, seed=8) + 0.02
    found = estimate(ratios, [2, 4, 6, 8], RULE)
    share = RULE.spent(8) - RULE.spent(6)
    low, high = stats.t.interval(1 - RULE.alpha * share, 7, ratios.mean(), stats.sem(ratios))
    assert (found.low, found.high) == pytest.approx((np.expm1(low), np.expm1(high)), rel=1e-9)
    assert found.change == pytest.approx(np.expm1(ratios.mean()))
    assert (found.pairs, found.noise) == (8, pytest.approx(ratios.std(ddof=1)))


def test_the_value_of_a_launch_is_the_logarithm_of_its_median():
    assert launch_value([[1.0, 2.0], [3.0, 100.0, 4.0]]) == pytest.approx(np.log(3.0))
    for values in ([], [[0.0, 0.0]]):
        with pytest.raises(ValueError, match="median"):
            launch_value(values)


@pytest.mark.parametrize(("change", "word"), [(0.0, UNCHANGED), (0.03, REGRESSED), (-0.03, IMPROVED)])
def test_errors_stay_below_their_level_by_simulation(change, word):
    # 4,000 gates with a launch's noise of 1.36 % (1 % of launches, 2 % of 7 repetitions); everything is seeded. An
    # error of 1 % would be seen at most 59 times in 4,000 with probability 0.999.
    ratios = 2**0.5 * 0.0136 * normal(4000, 20, seed=11) + (1 if change >= 0 else -1) * np.log1p(abs(change))
    codes, looks = decide(paired(ratios, RULE.ends(), RULE)[:, None], RULE)
    wrong = np.isin(codes, [UNCHANGED, REGRESSED, IMPROVED]) & (codes != word)
    assert wrong.sum() <= 59
    assert (codes == word).mean() >= 0.99
    assert 2 * (looks[looks >= 0] + 1).mean() < 14, "it has to stop early"


def test_the_largest_launch_number_and_the_noise_decide_what_is_seen():
    usual = forecast(0.0136, RULE, runs=500)
    assert 0.02 < usual.smallest < 0.03
    assert forecast(0.0136, Rule(pairs=40), runs=500).smallest < usual.smallest
    assert forecast(0.0272, RULE, runs=500).smallest > 1.5 * usual.smallest
    assert forecast(0.0136, RULE, cells=60, runs=500).smallest > usual.smallest
    assert FEWEST <= usual.launches_same <= 20
    assert forecast(2.0, RULE, runs=100).smallest == float("inf")


def test_recorded_launches_show_less_than_launches_side_by_side():
    usual = forecast(0.0136, RULE, runs=500)
    apart = forecast_unpaired(0.0136, 20, 0.01, RULE, runs=500)
    assert apart.smallest > 2 * usual.smallest
    assert forecast_unpaired(0.0136, 20, 0.0, RULE, runs=500).smallest < apart.smallest / 2


def test_the_noise_of_a_launch_is_that_of_launches_and_of_a_median():
    draws = 0.01 * normal(40000, seed=12) + np.median(0.02 * normal(40000, 7, seed=13), axis=1)
    assert Noise().value(7) == pytest.approx(draws.std(), rel=0.02)
    assert Noise().value(1) == pytest.approx(np.hypot(0.01, 0.02))
