import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmqual_faults.nursery import Nursery

sys.path.insert(0, str(Path(__file__).parent))  # for processor_objects, which several test modules share


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Workers that it starts are copies of one process that has imported the implementation."""
    with Nursery("worker") as worker:
        yield worker
