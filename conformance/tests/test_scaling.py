"""Speed-ups and their intervals, against draws whose true ratio is known."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_contract.records import Measurement
from vlmqual_contract.scaling import scaling, short


def cell(tp: int, values: list[list[float]], state: str = "valid") -> Measurement:
    more = {"state": state, "values_s": tuple(map(tuple, values))}
    return Measurement("c", "s", "idefics", "decode", tp, 1, "float32", {}, **more)


def test_a_speedup_is_the_ratio_of_medians_over_repetitions_of_a_repetitions_median_step() -> None:
    one = cell(1, [[9.0, 8.0, 80.0], [7.0, 7.0, 7.0], [12.0, 10.0, 11.0]])  # medians 9, 7, 11
    four = cell(4, [[3.0], [4.0], [2.0]])
    found = scaling(one, four)
    assert found is not None
    assert found.speedup == 3.0
    assert found.efficiency == 0.75
    assert found.interval is None, "three repetitions say nothing of their spread"


def test_an_interval_grows_with_the_noise_and_holds_the_speedup() -> None:
    widths = []
    for spread in (0.001, 0.01, 0.1):
        one = cell(1, [[1.0 + spread * step] for step in range(-4, 5)])
        found = scaling(one, cell(2, [[0.5 + spread * step / 2] for step in range(-4, 5)]))
        assert found is not None
        assert found.interval is not None
        assert found.interval[0] < found.speedup < found.interval[1]
        assert found.speedup == pytest.approx(2.0)
        assert found.efficiency_interval == pytest.approx([edge / 2 for edge in found.interval])
        widths.append(found.interval[1] - found.interval[0])
    assert widths == sorted(widths)


@pytest.mark.parametrize("repetitions", [7, 20])
@pytest.mark.parametrize("shape", ["normal", "heavy"])
def test_intervals_hold_the_true_ratio_about_as_often_as_they_say(repetitions: int, shape: str) -> None:
    rng = np.random.default_rng(20270301)
    trials, held = 1000, 0
    for _ in range(trials):
        draws = rng.standard_normal((2, repetitions)) if shape == "normal" else rng.standard_t(2, (2, repetitions))
        times = np.exp(0.03 * draws) * np.array([[3.0], [1.0]])
        found = scaling(cell(1, times[0, :, None].tolist()), cell(4, times[1, :, None].tolist()))
        assert found is not None
        assert found.interval is not None
        held += found.interval[0] <= 3.0 <= found.interval[1]
    assert 0.93 <= held / trials <= 0.995, f"{held} of {trials} intervals hold the ratio that was drawn"


def test_nothing_is_claimed_over_a_failed_cell_or_one_without_values() -> None:
    good = cell(1, [[1.0]] * 5)
    assert scaling(good, cell(2, [[1.0]] * 5, state="failed")) is None
    assert scaling(cell(1, [[1.0]] * 5, state="failed"), good) is None
    assert scaling(good, cell(2, [])) is None


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("text_config: 12 attention heads do not divide by 8 ranks (q_proj)", "heads % 8"),
        ("target 'openvino' does not split a model over devices: it lacks tensor-parallel", "one device"),
        ("the scenario's time limit of 3 s is over; no answer to repeat within 0.4 s", "time limit"),
        ("no answer to repeat within 120 s", "no answer"),
        ("the target's process ended (signal SIGKILL)", "crashed"),
        (
            "logits of decode under forced tokens are 0.1 from TP=1's, more than the budget of 1e-6",
            "not TP=1's",
        ),
        ("cannot be compared with TP=1: the target's process ended (exit status 9)", "no TP=1"),
        ("something that nobody has seen before", "failed"),
    ],
)
def test_reasons_are_told_in_a_few_letters(reason: str, words: str) -> None:
    assert short(reason) == words
