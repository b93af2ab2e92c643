"""What a measurement says of itself."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_perf.verdicts import Seen, judge, stray

QUIET = np.random.Generator(np.random.PCG64(5)).normal(1e-2, 5e-5, (40, 16)).tolist()


def changed(repetition, step, factor):
    values = [list(steps) for steps in QUIET]
    values[repetition][step] *= factor
    return values


def test_quiet_repetitions_are_valid():
    assert judge(Seen(QUIET)) == ("valid", "")


@pytest.mark.parametrize(
    ("seen", "state", "said"),
    [
        (Seen(QUIET[:4]), "too-few", "4 repetitions"),
        (Seen(QUIET, buckets=[["b16"]] * 39 + [["b16", "b32"]]), "wrong-bucket", "b16, b32"),
        (Seen(QUIET, compiled=2), "wrong-bucket", "2 functions were compiled"),
        (Seen(QUIET, before={"frequency_hz": 3e9}, after={"frequency_hz": 2.7e9}), "throttled", "fell by 10%"),
        (Seen(QUIET, warm=False), "not-steady", "warm-up"),
        (Seen([[1e-2 * (1 + place / 200)] for place in range(40)]), "throttled", "slower by 19%"),
        (Seen([[1e-2 * (1 - place / 200)] for place in range(40)]), "not-steady", "faster"),
        (Seen(changed(20, 3, 2.0)), "noisy", "1 of 640 values"),
        (Seen([[1e-2 * (1 + 0.6 * (place % 2 > 0))] for place in range(8)]), "noisy", ""),
    ],
)
def test_the_reason_for_which_figures_may_not_be_used_is_named(seen, state, said):
    found, reason = judge(seen)
    assert found == state
    assert said in reason


def test_equal_frequencies_and_unreadable_ones_are_no_throttling():
    same = {"frequency_hz": 3e9}
    assert judge(Seen(QUIET, before=same, after=same))[0] == "valid"
    assert judge(Seen(QUIET, before=same, after={}))[0] == "valid"


def test_later_steps_that_are_always_slower_do_not_stand_far_off():
    values = [[1e-3, 2e-3, 9e-3]] * 6
    assert stray(values) == []
    assert stray([*values, [1e-3, 6e-3, 9e-3]]) == [pytest.approx(3.0)]


def test_microseconds_of_the_host_on_a_short_step_do_not_stand_far_off():
    assert stray([[1e-5]] * 6 + [[9e-5]]) == []
