"""Targets that behave badly on some inputs only, so that one run shows every kind of bad behaviour."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from honest import Honest, HonestSession, Seen  # the folder is no package

from vlmqual_contract.errors import Unsupported
from vlmqual_contract.target import Capability


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


class Openings(Honest):
    """Opens both families, over any number of ranks, writes down which, and answers nothing."""

    def __init__(self, file: str) -> None:
        super().__init__(families="idefics3+mllama")
        kept = {Capability.BATCH, Capability.PADDING, Capability.FORCED_TOKENS, Capability.TENSOR_PARALLEL}
        self.info = replace(self.info, capabilities=frozenset(kept))
        self._file = Path(file)

    @contextmanager
    def open(self, model: Any, options: Any) -> Iterator[Any]:
        with self._file.open("a") as file:
            file.write(Path(model.path).name + (f"-over-{options.tp}" if options.tp > 1 else "") + "\n")
        yield Silent()


class Silent:
    def synchronize(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise Unsupported(f"no {name} here")


class Stillborn(Honest):
    def __init__(self) -> None:
        os._exit(9)


class Odd(Honest):
    """Declares a compute dtype that no golden has noise for."""

    def __init__(self) -> None:
        super().__init__(dtype="int3")
