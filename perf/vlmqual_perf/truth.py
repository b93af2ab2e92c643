"""The `truth` target: it computes nothing and takes known time, so that the harness itself can be measured.

`truth:prefill_ms=4,step_ms=1,jitter=0.02,async=1,straggler=1.3` simulates a device; no figure of it says anything about
one. See `truth_clock` for what the truth is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import (
    FAMILIES,
    Array,
    Call,
    Capability,
    Costs,
    FloatArray,
    Info,
    Inputs,
    IntArray,
    Model,
    Options,
    Program,
    Prompt,
)
from vlmqual_perf import truth_clock
from vlmqual_perf.truth_clock import Clock, Pace

VOCABULARY = 97
_LENGTH = 12
_SIDE = 28
_ROUNDOFF = {"float64": 0.0, "float32": 1e-7}
#: Default, largest value and meaning of every option that is a number.
OPTIONS: Mapping[str, tuple[str, float, str]] = {
    "preprocess_ms": ("2", 1e6, "a call of preprocess; it never returns early"),
    "vision_ms": ("3", 1e6, "a call of vision"),
    "prefill_ms": ("4", 1e6, "a prefill"),
    "step_ms": ("1", 1e6, "a decode step"),
    "load_ms": ("5", 1e6, "opening a model"),
    "jitter": ("0", 1, "relative standard deviation of a call, drawn for each rank"),
    "async": ("0", 1, "1: calls return before the work is done"),
    "straggler": ("1", 100, "factor by which one rank, another at every call, is slower"),
    "cold_ms": ("0", 1e6, "what the first call of a phase and every cold start takes besides"),
    "cold": ("0", 1, "probability of a cold start of a later call"),
    "bucket_miss": ("0", 1, "probability that a call takes twice as long in a bucket too large"),
    "throttle": ("0", 100, "relative slowdown that is reached after two seconds of work"),
    "seed": ("0", 2**31, "of all that is drawn"),
    "tp": ("8", 1024, "largest tensor-parallel size"),
    "fixed": ("0", 1, "1: declares fixed shapes and tells the bucket of a call"),
}


class TruthFeatures:
    """Nothing, but it took its time."""

    dtype = "float32"

    def arrays(self) -> Mapping[str, FloatArray]:
        """Nothing."""
        return {}

    def taps(self) -> Mapping[str, FloatArray]:
        """Nothing."""
        return {}


class TruthStep:
    """Rows of which each is a number; the token of a row is that number modulo the vocabulary."""

    def __init__(self, session: TruthSession, state: IntArray) -> None:
        self._session = session
        self._tokens = state % VOCABULARY
        self.state = state
        self.dtype = session.dtype

    def tokens(self) -> IntArray:
        """(B,); waits for the work, as a device would."""
        self._session.synchronize()
        return self._tokens

    def logits(self, all_positions: bool = False) -> FloatArray:
        """(B, V) one-hot, off by the dtype's roundoff."""
        self._session.synchronize()
        hot: FloatArray = np.eye(VOCABULARY)[self._tokens] * (1.0 + _ROUNDOFF[self.dtype])
        return hot

    def taps(self) -> Mapping[str, FloatArray]:
        """Nothing."""
        return {}


class TruthSession:
    """An opened nothing."""

    def __init__(self, clock: Clock, family: str, config: Mapping[str, Any], dtype: str) -> None:
        self.dtype = dtype
        self._clock = clock
        self._family = family
        self._image_token = int(config.get("image_token_id") or 1)

    def preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        """Tensors of the documented names with little in them."""
        self._clock.book("preprocess", self._clock.now())
        inputs = self._tensors(prompts)
        self._clock.wait()
        return inputs

    def _tensors(self, prompts: Sequence[Prompt]) -> Inputs:
        rows, images = len(prompts), len(prompts[0].images)
        ids = np.tile(np.arange(_LENGTH, dtype=np.int64), (rows, 1))
        inputs: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if not images and self._family != "idefics":
            return inputs
        slots = max(1, images)
        ids[:, 1 : 1 + images] = self._image_token
        pixels = np.full((rows, slots, 3, _SIDE, _SIDE), float(images > 0), np.float32)
        if self._family == "idefics":
            inputs["image_attention_mask"] = np.full((rows, _LENGTH, slots), int(images > 0), np.int64)
        if self._family == "mllama":
            pixels = pixels[:, :, None]
            inputs["aspect_ratio_ids"] = np.ones((rows, slots), np.int64)
            inputs["aspect_ratio_mask"] = np.ones((rows, slots, 1), np.int64)
            inputs["cross_attention_mask"] = np.ones((rows, _LENGTH, slots, 1), np.int64)
        return {**inputs, "pixel_values": pixels}

    def vision(self, inputs: Inputs) -> TruthFeatures:
        """Takes its time."""
        now = self._clock.now()
        self._call("vision", now, len(inputs["pixel_values"]))
        features = TruthFeatures()
        self._clock.leave()
        return features

    def prefill(self, inputs: Inputs, features: Any = None) -> TruthStep:
        """Takes its time."""
        now = self._clock.now()
        ids = np.asarray(inputs["input_ids"])
        self._call("prefill", now, ids.size)
        step = TruthStep(self, ids.sum(axis=1))
        self._clock.leave()
        return step

    def decode(self, step: TruthStep, tokens: IntArray | None = None) -> TruthStep:
        """Takes its time; the next number follows from the last and the token."""
        now = self._clock.now()
        self._call("decode", now, len(step.state))
        chosen = step.state % VOCABULARY if tokens is None else np.asarray(tokens)
        following = TruthStep(self, step.state + chosen + 1)
        self._clock.leave()
        return following

    def synchronize(self) -> None:
        """Return when all work is done."""
        self._clock.wait()

    def device_s(self) -> float:
        """What the latest call's work really took."""
        return self._clock.latest_s

    def collectives(self, watched: bool) -> float:
        """Nothing: its ranks do not meet."""
        return 0.0

    def _call(self, phase: str, now: float, asked: int) -> None:
        self._clock.book(phase, now)


class FixedSession(TruthSession):
    """One that runs in buckets and tells them: a miss computes twice as much."""

    def __init__(self, clock: Clock, family: str, config: Mapping[str, Any], dtype: str) -> None:
        super().__init__(clock, family, config, dtype)
        self._calls: dict[str, Call] = {}

    def costs(self) -> Costs:
        """Buckets of the latest calls."""
        return Costs(dict(self._calls), {"all": Program(0.0, 0.0)})

    def _call(self, phase: str, now: float, asked: int) -> None:
        computed = asked * (2 if self._clock.book(phase, now) == "miss" else 1)
        self._calls[phase] = Call(f"b{computed}", asked, computed, ("all",))


class Truth:
    """The target.

    Args:
        dtype: float32 or float64, by which the logits are off.
        log: folder for what it really took, written when a session is closed.
        options: numbers, see `OPTIONS`.

    Raises:
        UsageError: an option is unknown or no such number.
    """

    def __init__(self, *, dtype: str = "float32", log: str = "", **options: str) -> None:
        if dtype not in _ROUNDOFF:
            raise UsageError(f"truth: dtype {dtype!r} is not known; valid are {', '.join(_ROUNDOFF)}")
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise UsageError(f"truth has no option {unknown[0]!r}; it has dtype, log, {', '.join(OPTIONS)}")
        number = {name: _number(name, options.get(name, default)) for name, (default, _, _) in OPTIONS.items()}
        self._queued = bool(number["async"])
        names = {"preprocess": "preprocess_ms", "vision": "vision_ms", "prefill": "prefill_ms", "decode": "step_ms"}
        self._pace = Pace(
            seconds={phase: number[name] / 1e3 for phase, name in names.items()},
            jitter=number["jitter"],
            straggler=number["straggler"],
            cold_s=number["cold_ms"] / 1e3,
            cold=number["cold"],
            bucket_miss=number["bucket_miss"],
            throttle=number["throttle"],
            seed=int(number["seed"]),
        )
        self._load_s = number["load_ms"] / 1e3
        self._largest = int(number["tp"])
        self._log = Path(log) if log else None
        self.info = Info(
            name="truth",
            version="1",
            device="clock (simulated)",
            runtime="known times, nothing is computed",
            dtype=dtype,
            capabilities=frozenset(set(Capability) - {Capability.TAPS}),
            families=FAMILIES,
            processes="per-rank",
            emulated=True,
            fixed_shapes=bool(number["fixed"]),
        )

    def check(self, model: Model, options: Options) -> None:
        """Refuse what `open` refuses."""
        if options.tp > self._largest:
            raise UsageError(f"tensor-parallel size {options.tp} is larger than {self._largest}, the truth's tp")

    @contextmanager
    def open(self, model: Model, options: Options) -> Iterator[TruthSession]:
        """Open any checkpoint of which there is a config.json."""
        self.check(model, options)
        try:
            config = json.loads((Path(model.path) / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{model.path}/config.json: cannot be read: {error}") from error
        clock = Clock(self._pace, int(os.environ.get("RANK", "0")), options.tp, queued=self._queued)
        clock.pause("load", self._load_s)
        try:
            kind = FixedSession if self.info.fixed_shapes else TruthSession
            yield kind(clock, model.family, config, self.info.dtype)
        finally:
            clock.wait()
            if self._log is not None:
                truth_clock.write(self._log, clock.log)

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Of a device that moves 100 GB/s and computes 1 TFLOP/s; simulated."""
        if name == "gemm":
            return 2.0 * math.prod(shape) / 1e12
        return 2.0 * math.prod(shape) * {"float64": 8, "float32": 4}.get(dtype, 2) / 1e11


def _number(name: str, text: str) -> float:
    _, top, _ = OPTIONS[name]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= top:
        raise UsageError(f"truth: {name}={text} is no number from 0 to {top:g}")
    return value
