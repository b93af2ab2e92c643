import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmqual_contract import launch
from vlmqual_faults.nursery import Nursery

sys.path.insert(0, str(Path(__file__).parent))  # for truth_target, which workers load by its path
# Where pytest was started in the background, SIGINT is ignored, and whatever a test starts to interrupt inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def copied() -> Iterator[None]:
    """Workers that this process starts are copies of one that has imported what they need, which is most of their time.

    Commands that tests start as processes of their own start theirs as users do.
    """
    real = launch._interpreter
    with Nursery("bare") as nursery, pytest.MonkeyPatch.context() as patch:
        copy = [nursery.python, "-m", "vlmqual_contract.worker"]
        patch.setattr(launch, "_interpreter", lambda python: real(python) if python else copy)
        yield
