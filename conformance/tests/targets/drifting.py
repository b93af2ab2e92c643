"""A target that is wrong from one layer on, for five frames only, and ends for thirteen; MENDED=1 mends it.

Where CALLS names a file, the frames of every call are written to it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from honest import Honest, HonestSession, Seen  # the folder is no package

WRONG = ("vision.layers.1", "vision.layers.2", "vision.post_layernorm", "connector")


class DriftingSession(HonestSession):
    def vision(self, inputs: Any) -> Seen:
        frames = inputs["pixel_values"].shape[1]
        if calls := os.environ.get("CALLS"):
            with Path(calls).open("a") as file:
                file.write(f"{frames}\n")
        if frames == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        seen = super().vision(inputs)
        if frames != 5 or os.environ.get("MENDED"):
            return seen
        taps = {name: tap * (1.01 if name in WRONG else 1.0) for name, tap in seen.taps().items()}
        return Seen(seen.hidden * 1.01, taps)


class Drifting(Honest):
    session = DriftingSession
