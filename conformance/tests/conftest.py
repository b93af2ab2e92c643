import signal
from collections.abc import Iterator
from functools import partial

import pytest

from vlmqual_conformance import sessions
from vlmqual_faults.nursery import Nursery

# Where pytest was started in the background, SIGINT is ignored, and whatever a test starts to interrupt inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery("bare") as worker, Nursery("suite", worker.python) as suite:
        yield suite


@pytest.fixture(scope="module")
def copied(nursery: Nursery) -> Iterator[None]:
    """Sessions that this process starts are copies of one that has collected the suite, which is most of their time.

    So are their workers, of one that has imported what any worker needs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "run", partial(sessions.run, python=nursery.python))
        yield
