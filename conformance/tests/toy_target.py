"""A target in numpy whose answers a test can work out by hand, with switches for bad behaviour."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Call, Capability, Costs, Info, Program

VOCABULARY = 11


class ToyFeatures:
    dtype = "float32"

    def __init__(self, total: float) -> None:
        self.total = total

    def arrays(self):
        return {"image_hidden_states": np.full((1, 1, 2), self.total, np.float32)}

    def taps(self):
        return {}


class ToyStep:
    dtype = "bfloat16"

    def __init__(self, sums: np.ndarray, bad: str = "") -> None:
        self.sums, self.bad = sums, bad

    def tokens(self):
        tokens = self.sums % VOCABULARY
        return tokens.astype(np.float64) if self.bad == "float-tokens" else tokens

    def logits(self, all_positions: bool = False):
        if self.bad == "none":
            return None
        logits = np.eye(VOCABULARY, dtype=np.float32)[self.sums % VOCABULARY]
        if self.bad == "nan":
            logits[0, 3] = np.nan
        return logits[0] if self.bad == "short" else logits

    def taps(self):
        return {}


class ToySession:
    def __init__(self, bad: str) -> None:
        self.bad = bad

    def preprocess(self, prompts):
        if self.bad == "list":
            return [1, 2]
        if self.bad == "lists":
            return {"input_ids": [[1]], "attention_mask": [[1]]}
        if self.bad == "no-mask":
            return {"input_ids": np.ones((1, 1), np.int64)}
        print("a target may print without breaking the pipe")
        ids = np.array([[len(prompt.text)] for prompt in prompts], dtype=np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def vision(self, inputs):
        if self.bad == "child":
            subprocess.Popen(["sleep", "654321"])
        if self.bad == "fork" and os.fork():
            os._exit(7)  # the child goes on and holds the pipe
        if self.bad == "fork":
            time.sleep(3600)
        if self.bad == "signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 1)
        return ToyFeatures(float(inputs["pixel_values"].sum()))

    def prefill(self, inputs, features=None):
        if self.bad == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.bad == "hang":
            time.sleep(3600)
        if self.bad == "raise":
            raise IndexError("row 7 is out of range")
        if self.bad == "object":
            return ToyStep(np.array([object()]))
        extra = 0
        if features is not None:
            arrays = features.arrays() if hasattr(features, "arrays") else features
            extra = int(arrays["image_hidden_states"].sum())
        return ToyStep(np.asarray(inputs["input_ids"]).sum(axis=1) + extra, self.bad)

    def decode(self, step, tokens=None):
        return ToyStep(step.sums + (step.tokens() if tokens is None else tokens))

    def synchronize(self):
        time.sleep(0.001)


class CostlySession(ToySession):
    def costs(self):
        call = Call("b1", 3 if self.bad == "costs-less" else 1, 2, ("write",))
        programs = {} if self.bad == "costs-unknown" else {"write": Program(0.5, 0.25)}
        return Costs(None if self.bad == "costs-none" else {"decode": call}, programs)


class Toy:
    def __init__(self, bad: str = "", ranks: str = "one") -> None:
        if bad == "usage":
            raise UsageError("bad=usage is refused by the toy")
        self.bad = bad
        self.info = Info(
            name="toy",
            version="1",
            device="cpu",
            runtime="numpy",
            dtype="float32",
            capabilities=frozenset({Capability.PREPROCESS, Capability.TENSOR_PARALLEL})
            if bad not in ("no-preprocess", "capability")
            else frozenset({"telepathy"} if bad == "capability" else ()),
            families=("idefics3",),
            processes="per-rank" if ranks == "many" else "one",
            software={"numpy": np.__version__},
            fixed_shapes=bad.startswith(("fixed", "costs")),
        )

    @contextmanager
    def open(self, model, options) -> Iterator[ToySession]:
        if options.tp == 3:
            raise UsageError("text_config: 4 attention heads do not divide by 3 ranks")
        rank = int(os.environ["RANK"])
        if self.bad == "rank1" and rank == 1:
            os._exit(7)
        yield (CostlySession if self.info.fixed_shapes else ToySession)("hang" if self.bad == "rank1" else self.bad)

    def probe(self, name, shape, dtype):
        return float(os.environ["RANK"]) + 1.0
