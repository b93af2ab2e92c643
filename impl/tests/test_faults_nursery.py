"""Copies of one process that stand for interpreters: they do what those would, and end with what started them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vlmqual_faults.nursery import Nursery

#: Says who it is and who its child is, then waits far longer than a test.
WAITS = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery("bare") as made:
        yield made


def test_a_copy_reads_prints_and_ends_as_an_interpreter_would(nursery: Nursery, tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.getcwd(), sys.stdin.read()); sys.exit(7)"
    ended = subprocess.run(
        [nursery.python, "-c", code, "one"], input="said", text=True, capture_output=True, cwd=tmp_path, timeout=60
    )
    assert ended.stdout.split() == ["['-c',", "'one']", str(tmp_path), "said"]
    assert ended.returncode == 7


@pytest.mark.parametrize("how", ["end", "kill"])
def test_copies_and_what_they_started_end_with_the_nursery_or_with_who_asked(nursery: Nursery, how: str) -> None:
    asked = subprocess.Popen([nursery.python, "-c", WAITS], stdout=subprocess.PIPE)
    assert asked.stdout is not None
    made = [psutil.Process(int(number)) for number in asked.stdout.readline().split()]
    try:
        if how == "end":
            nursery.end()
        else:
            asked.kill()
        assert asked.wait(30) != 0
        _, alive = psutil.wait_procs(made, timeout=30)
        assert not alive
    finally:
        for process in (asked, *made):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        asked.stdout.close()
