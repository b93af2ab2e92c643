"""How long a run is said to take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vlmqual_contract.records import Header, Measurement, Writer
from vlmqual_contract.scenario import Scenario
from vlmqual_perf.forecast import Forecast, busy_s, earlier, shown
from vlmqual_perf.plan import cells

ONE = Scenario("one", "idefics3", "c", "", images=("a.png",))
TWO = replace(ONE, id="two")
PLAN = {"checkpoint": "", "repeats": 7, "cell_s": 1.5, "threads": 1}
ROW = Measurement(
    "one/decode/tp1", "one", "idefics3", "decode", 1, 1, "float32", {}, ((0.1, 0.1),) * 4, ((0.1, 0.1),) * 2
)


def write(folder: Path, *rows: Measurement, subject: str = "eager", **plan: object) -> None:
    header = Header("perf", subject, "1", {}, {}, "", {**PLAN, **plan})
    with Writer.start(folder, header, fresh=True) as writer:
        for row in rows:
            writer.add(row)


def test_a_cell_takes_what_it_took_before_else_what_its_phase_took_else_what_is_set() -> None:
    plan = cells([ONE, TWO], ["prefill", "decode"], [1])
    forecast = Forecast(plan, {"one/decode/tp1": 5.0}, 1.5)
    assert [forecast.seconds(cell) for cell in plan] == [1.5, 5.0, 1.5, 5.0]
    assert [forecast.knows(cell) for cell in plan] == [False, True, False, False]
    assert forecast.left_s() == pytest.approx(13.0)


def test_what_is_left_follows_what_was_measured() -> None:
    plan = cells([ONE, TWO], ["prefill", "decode"], [1])
    forecast = Forecast(plan, {}, 1.5)
    forecast.done("one/prefill/tp1", 4.0)
    assert forecast.left_s() == pytest.approx(1.5 + 4.0 + 1.5)
    for cell in plan:
        forecast.done(cell.case)
    assert forecast.left_s() == 0.0


def test_what_happens_once_is_not_guessed() -> None:
    assert Forecast(cells([ONE], ["load"], [1]), {}, 1.5).left_s() == 0.0


def test_a_row_took_all_of_its_repetitions_and_what_lies_between_them() -> None:
    assert busy_s(ROW) == pytest.approx(6 * 0.2)
    # A repetition begins every 0.5 s: 0.3 s of each are not timed.
    assert busy_s(replace(ROW, began_s=(1.0, 1.5, 2.0, 2.5))) == pytest.approx(6 * 0.5)


def test_earlier_runs_count_when_they_were_made_in_the_same_way(tmp_path: Path) -> None:
    assert earlier(tmp_path / "none", "eager", PLAN) == {}
    write(tmp_path, ROW)
    write(tmp_path, replace(ROW, case="other"), subject="openvino")
    write(tmp_path, replace(ROW, case="longer"), repeats=70)
    write(tmp_path, replace(ROW, case="failed", state="failed"))
    assert set(earlier(tmp_path, "eager", PLAN)) == {"one/decode/tp1"}


def test_times_are_read_as_on_a_clock() -> None:
    assert [shown(seconds) for seconds in (0.4, 59.6, 151, 3751)] == ["0:00", "1:00", "2:31", "1:02:31"]
