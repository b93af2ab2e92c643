"""The truth target in time that a test makes, and the harness held against its log."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_contract.errors import UsageError
from vlmqual_contract.records import Measurement
from vlmqual_contract.target import Model, Options, Prompt
from vlmqual_perf import selfcheck, truth_clock
from vlmqual_perf.plan import model_of
from vlmqual_perf.selfcheck import Accepted, Checked, Compared, Known, compare, true_s
from vlmqual_perf.truth import Truth
from vlmqual_perf.truth_clock import Clock, Entry, Pace

SECONDS = {"preprocess": 0.002, "vision": 0.003, "prefill": 0.004, "decode": 0.001}


class Time:
    """Stands still until somebody sleeps or looks; a look takes a microsecond."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def moment(monkeypatch):
    clock = Time()
    monkeypatch.setattr(truth_clock, "time", clock)
    return clock


def taken(clock):
    return [(entry.phase, round(entry.seconds, 5)) for entry in clock.log]


def test_a_call_that_waits_takes_its_time_before_it_returns(moment):
    clock = Clock(Pace(SECONDS), 0, 1, queued=False)
    before = moment.now
    clock.book("prefill", clock.now())
    clock.leave()
    assert moment.now - before == pytest.approx(0.004, abs=1e-5)
    assert taken(clock) == [("prefill", 0.004)]


def test_queued_work_follows_the_work_before_it_and_is_done_when_waited_for(moment):
    clock = Clock(Pace(SECONDS), 0, 1, queued=True)
    before = moment.now
    for phase in ("vision", "prefill"):
        clock.book(phase, clock.now())
        clock.leave()
    assert moment.now - before < 1e-5, "queued calls return at once"
    clock.wait()
    assert moment.now - before == pytest.approx(0.007, abs=1e-5)
    assert taken(clock) == [("vision", 0.003), ("prefill", 0.004)]
    assert clock.log[1].began_s == pytest.approx(clock.log[0].ended_s, abs=1e-5)


def test_a_call_that_waits_ends_when_the_host_first_asks_after_it(moment):
    clock = Clock(Pace(SECONDS), 0, 1, queued=False)
    clock.book("decode", clock.now())
    clock.leave()
    moment.now += 0.5
    clock.wait()
    moment.now += 0.25
    clock.wait()
    assert taken(clock) == [("decode", 0.501)]


def test_one_rank_another_at_every_call_is_the_straggler(moment):
    pace = Pace(SECONDS, straggler=2.0, seed=3)
    clocks = [Clock(pace, rank, 4, queued=False) for rank in range(4)]
    slow = []
    for _ in range(40):
        for clock in clocks:
            clock.book("decode", clock.now())
            clock.wait()
        took = [clock.log[-1].seconds for clock in clocks]
        assert sorted(round(value, 5) for value in took) == [0.001, 0.001, 0.001, 0.002]
        slow.append(int(np.argmax(took)))
    assert set(slow) == {0, 1, 2, 3}


def test_misses_take_twice_as_long_and_cold_starts_their_time_on_all_ranks_alike(moment):
    pace = Pace(SECONDS, bucket_miss=0.3, cold=0.2, cold_s=0.05, seed=1)
    logs = []
    for rank in range(2):
        clock = Clock(pace, rank, 2, queued=False)
        for _ in range(50):
            clock.book("decode", clock.now())
            clock.wait()
        logs.append(clock.log)
    usual = {"": (0.001,), "miss": (0.002,), "cold": (0.051, 0.052)}
    for first, second in zip(*logs, strict=True):
        assert first.disturbed == second.disturbed
        assert round(first.seconds, 5) in usual[first.disturbed]
    assert {entry.disturbed for entry in logs[0]} == {"", "miss", "cold"}
    assert logs[0][0].disturbed == "cold", "the first call of a phase is one"


def test_throttling_is_reached_after_two_seconds_of_work(moment):
    clock = Clock(Pace({"decode": 0.5}, throttle=0.2), 0, 1, queued=False)
    for _ in range(8):
        clock.book("decode", clock.now())
        clock.wait()
    took = [entry.seconds for entry in clock.log]
    assert took[0] == pytest.approx(0.5, abs=1e-4)
    assert took == sorted(took)
    assert took[-1] == pytest.approx(0.6, abs=1e-4)


def test_a_log_is_read_as_it_was_written(tmp_path):
    logs = {rank: [Entry("decode", rank, 1.5 + rank, 2.25 + rank, "miss")] for rank in range(2)}
    for entries in logs.values():
        truth_clock.write(tmp_path / "log", entries)
    assert truth_clock.read(tmp_path / "log") == logs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps_ms": "1"}, "no option 'steps_ms'"),
        ({"step_ms": "fast"}, "step_ms=fast"),
        ({"jitter": "-1"}, "jitter=-1"),
        ({"async": "2"}, "async=2"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_valid(options, said):
    with pytest.raises(UsageError, match=said):
        Truth(**options)


def test_it_opens_every_family_and_knows_the_largest_size():
    target = Truth(tp="2", preprocess_ms="0", prefill_ms="0", load_ms="0", step_ms="0", vision_ms="0")
    names = {"idefics": "pixel_values", "idefics3": "pixel_values", "mllama": "cross_attention_mask"}
    for family, name in names.items():
        model = Model(model_of(selfcheck._SCENARIO, None).path, family)
        with target.open(model, Options()) as session:
            inputs = session.preprocess([Prompt("x", ("a.png", "b.png"))] * 3)
            assert inputs[name].shape[0] == 3
            step = session.decode(session.prefill(inputs, session.vision(inputs)))
            assert step.tokens().shape == (3,)
    with pytest.raises(UsageError, match="size 3 is larger than 2"):
        target.check(model, Options(tp=3))


# the harness against the log -----------------------------------------------------------------------------------------


def row(phase, values, began):
    return Measurement("case", "s", "idefics3", phase, 2, 1, "float32", {}, values_s=values, began_s=began)


def test_a_counted_step_is_held_against_the_slowest_rank_of_the_same_call():
    log = {
        0: [Entry("decode", 0, 10.0, 10.1), Entry("decode", 0, 11.0, 11.2), Entry("decode", 0, 12.0, 12.3)],
        1: [Entry("decode", 1, 10.0, 10.9), Entry("decode", 1, 11.0, 11.1), Entry("decode", 1, 12.0, 12.4)],
    }
    found = true_s(row("decode", ((0.0, 0.0),), (10.5,)), log)
    assert found == [[pytest.approx(0.2), pytest.approx(0.4)]], "the call before counting began is left out"


def test_time_to_first_token_is_from_the_request_to_the_end_of_its_prefill():
    log = {
        0: [
            Entry("preprocess", 0, 1.0, 2.0),
            Entry("vision", 0, 2.0, 4.0),
            Entry("prefill", 0, 4.0, 7.0),
            Entry("preprocess", 0, 11.0, 12.0),
            Entry("prefill", 0, 12.0, 13.5),
        ]
    }
    assert true_s(row("ttft", ((0.0,), (0.0,)), (0.9, 10.9)), log) == [[6.0], [2.5]]


def test_every_measured_value_contains_the_true_one_whatever_the_machine_does():
    known = Known("", "jitter=0.1,async=1,straggler=2,step_ms=0.2,prefill_ms=0.5,preprocess_ms=0.5", tp=2)
    for one in compare(known, ("decode", "ttft"), repeats=5):
        assert one.samples >= 5
        assert one.mean_s >= one.true_mean_s >= 2e-4 * 0.5


def test_what_is_allowed_is_half_a_percent_or_fifty_microseconds():
    def compared(mean, true, p99=None, true_p99=None):
        return Compared("", "decode", 1, 1000, mean, true, p99, true_p99).right

    assert compared(1.049e-3, 1e-3)
    assert not compared(1.051e-3, 1e-3)
    assert compared(0.1004, 0.1)
    assert not compared(0.1006, 0.1)
    assert compared(1e-3, 1e-3, 2.019e-3, 2e-3)
    assert not compared(1e-3, 1e-3, 2.021e-3, 2e-3)


def test_one_disturbed_run_that_is_called_valid_or_dear_watching_is_wrong():
    assert Checked((), Accepted(10, 0, 2, 0), 1e-6).right
    assert not Checked((), Accepted(10, 1, 2, 2), 1e-6).right
    assert not Checked((), Accepted(10, 0, 2, 2), 21e-6).right
