"""Targets that behave badly on some inputs only, so that one run shows every kind of bad behaviour."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from honest import Honest, HonestSession, Seen  # the folder is no package


class MixedSession(HonestSession):
    """Crashes on 13 frames, hangs on 3, gives NaN for one, a wrong shape for two rows of one."""

    def vision(self, inputs: Any) -> Seen:
        rows, frames = inputs["pixel_values"].shape[:2]
        if frames == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        if frames == 3:
            time.sleep(3600)
        seen = super().vision(inputs)
        if (rows, frames) == (1, 1):
            seen.hidden[0, 0, 0] = np.nan
        if (rows, frames) == (2, 1):
            seen.hidden = seen.hidden[:, :-1]
        return seen


class Mixed(Honest):
    session = MixedSession


class SlowSession(HonestSession):
    def vision(self, inputs: Any) -> Seen:
        time.sleep(0.05)
        return super().vision(inputs)


class Slow(Honest):
    session = SlowSession


class Stillborn(Honest):
    def __init__(self) -> None:
        os._exit(9)


class Odd(Honest):
    """Declares a compute dtype that no golden has noise for."""

    def __init__(self) -> None:
        super().__init__(dtype="int3")
