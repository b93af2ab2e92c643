"""A target that does nothing but take known time, and writes down how much it really took.

Work is asynchronous: a call only books it, and `synchronize` waits for it, as on a device with a queue.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Call, Capability, Costs, Info, Program

VOCABULARY = 13
SECONDS = {"preprocess": 0.002, "vision": 0.003, "prefill": 0.004, "decode": 0.001}


class TruthFeatures:
    dtype = "float32"

    def arrays(self):
        return {}

    def taps(self):
        return {}


class TruthStep:
    dtype = "float32"

    def __init__(self, session, state):
        self.session, self.state = session, state

    def tokens(self):
        self.session.synchronize()
        return self.state % VOCABULARY

    def logits(self, all_positions=False):
        self.session.synchronize()
        rows = np.eye(VOCABULARY, dtype=np.float64)[self.state % VOCABULARY]
        noise = 1e-7 if self.session.dtype == "float32" else 0.0
        if self.session.bad == "nan64" and self.session.dtype == "float64":
            noise = np.nan
        error = 1e-3 if self.session.bad == "logits" and self.session.tp > 1 else 0.0
        return rows * (1.0 + noise) + error

    def taps(self):
        return {}


#: Seconds of compiling and loading: two functions of the text and one of vision; one of them was found on disk.
PROGRAMS = {
    "see": Program(0.5, 0.25),
    "read": Program(0.0, 0.125),
    "write": Program(1.0, 0.0625),
    "spare": Program(8, 8),
}


class TruthSession:
    def __init__(self, target, options):
        self.bad, self.dtype, self.log, self.tp = target.bad, target.dtype, target.log, options.tp
        self.max_length = options.max_length
        self.rank = int(os.environ["RANK"])
        self.booked: list[tuple[str, float]] = []
        self.calls = 0

    def book(self, phase):
        self.calls += 1
        slow = 3.0 if self.rank == 1 else 1.0
        if self.bad == "slow":
            slow = 20.0
        drift = 1.0 + 0.4 * self.calls if self.bad == "drift" else 1.0
        self.booked.append((phase, SECONDS[phase] * slow * drift))

    def synchronize(self):
        for phase, seconds in self.booked:
            start = time.perf_counter()
            time.sleep(seconds)
            if self.log:
                with Path(self.log).open("a") as file:
                    row = {"phase": phase, "rank": self.rank, "seconds": time.perf_counter() - start}
                    file.write(json.dumps(row) + "\n")
        self.booked = []

    def preprocess(self, prompts):
        self.book("preprocess")
        self.synchronize()
        length = 2400 if self.bad == "long" else 4
        ids = np.array([[1, 598, 598, *[len(p.text)] * (length - 3)] for p in prompts], dtype=np.int64)
        pixels = np.ones((len(prompts), 1, 3, 2, 2), np.float32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}

    def vision(self, inputs):
        self.book("vision")
        return TruthFeatures()

    def prefill(self, inputs, features=None):
        if self.bad == "crash" or (self.bad == "crash1" and self.tp == 1):
            os._exit(9)
        length = np.asarray(inputs["input_ids"]).shape[1] + 16
        if length > self.max_length:
            raise ValueError(f"a cache of {self.max_length} positions cannot hold {length}")
        self.book("prefill")
        return TruthStep(self, np.asarray(inputs["input_ids"]).sum(axis=1))

    def decode(self, step, tokens=None):
        if self.bad == "refuse":
            raise UsageError("the prompt is too long for the truth")
        self.book("decode")
        state = step.state + (step.state % VOCABULARY if tokens is None else tokens) + 1
        if self.bad == "tokens" and self.tp > 1:
            state = state + 1
        if self.bad == "unsteady-tokens":
            state = state + self.calls
        return TruthStep(self, state)


class FixedSession(TruthSession):
    """Tells what functions of fixed shapes cost; 4 prompt tokens go into a bucket of 16."""

    def costs(self):
        calls = {
            "vision": Call("1 x 2", 2, 2, ("see",)),
            "prefill": Call("b1 c16 x 1", 4, 3 if self.bad == "fixed-less" else 16, ("read",)),
            "decode": Call("b1", 1, 1, ("write",)),
        }
        return Costs(calls, PROGRAMS)


class Truth:
    def __init__(self, dtype="float32", bad="", log=""):
        if dtype not in ("float32", "float64") or (bad == "only32" and dtype != "float32"):
            raise UsageError(f"dtype {dtype} is unknown")
        self.bad, self.dtype, self.log = bad, dtype, log
        self.info = Info(
            name="truth",
            version="1",
            device="clock",
            runtime="sleep",
            dtype=dtype,
            capabilities=frozenset(set(Capability) - {Capability.TAPS}),
            families=("idefics3",),
            processes="per-rank",
            emulated=bad == "emulated",
            fixed_shapes=bad.startswith("fixed"),
        )

    def check(self, model, options):
        if options.tp == 3:
            raise UsageError("text_config: 8 attention heads do not divide by 3 ranks")

    @contextmanager
    def open(self, model, options):
        yield (FixedSession if self.info.fixed_shapes else TruthSession)(self, options)

    def probe(self, name, shape, dtype):
        return 1.0
