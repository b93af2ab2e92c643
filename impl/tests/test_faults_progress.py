"""How far a long run is, where nobody sees a bar."""

from __future__ import annotations

import io

from vlmqual_faults.progress import Steps


def test_a_file_gets_a_line_for_every_tenth() -> None:
    stream = io.StringIO()
    with Steps("mutants", 30, stream) as steps:
        for number in range(30):
            steps.made(1, f"number {number}")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "mutants: 0 of 30"
    assert lines[1:] == [f"{3 * tenth} of 30: number {3 * tenth - 1}" for tenth in range(1, 11)]


def test_several_steps_at_once_and_fewer_than_ten_are_counted() -> None:
    stream = io.StringIO()
    with Steps("trials", 3, stream) as steps:
        steps.made(2)
        steps.say("[one] is lost")
        steps.made(1)
    assert stream.getvalue().splitlines() == ["trials: 0 of 3", "2 of 3", "[one] is lost", "3 of 3"]
