"""An honest target with animals in it, each wrong in one way.

`animals=strip~hang+document~crash` lets the animal `hang` answer for the golden case `strip` and `crash` for
`document`; `*~slow` is for every case. A golden case is recognised by its token ids, in prefill and in the steps that
follow, and by its pixels in vision; every other case is answered honestly.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from honest import Honest, HonestSession, Read, Seen  # the folder is no package

from vlmqual_contract import fixtures
from vlmqual_contract.target import Capability, Info

Change = Callable[[np.ndarray], Any]


def holed(hole: float, row: int | slice = slice(None)) -> Change:
    """A value that is no number in the middle of one row, or of all."""

    def change(logits: np.ndarray) -> np.ndarray:
        made = logits.copy()
        made[row, made.shape[1] // 2] = hole
        return made

    return change


#: What an animal makes of honest logits (B, V).
LOGITS: dict[str, Change] = {
    "nan": holed(np.nan),
    "infinity": holed(np.inf),
    "nan-in-one-row": holed(np.nan, -1),
    "transposed": np.transpose,
    "few-rows": lambda logits: logits[:-1],
    "many-rows": lambda logits: np.concatenate([logits, logits[:1]]),
    "one-axis-more": lambda logits: logits[:, None],
    "integers": lambda logits: logits.round().astype(np.int64),
    "complex": lambda logits: logits.astype(np.complex128),
    "words": lambda logits: logits.astype(str),
    "half": lambda logits: logits.astype(np.float16),
    "all-equal": np.zeros_like,
    "nothing": lambda logits: None,
    "list": lambda logits: logits.tolist(),
    "huge": lambda logits: np.broadcast_to(logits[:1, :1], (2**31, 2**4)),
    "rows-exchanged": lambda logits: logits[::-1],
}
#: What an animal makes of honest image features (F, L, D).
FEATURES: dict[str, Change] = {
    "half-features": lambda hidden: hidden.astype(np.float16),
    "whole-features": lambda hidden: hidden.round().astype(np.int64),
    "few-frames": lambda hidden: hidden[:-1],
    "flat-features": lambda hidden: hidden.reshape(-1, hidden.shape[-1]),
    "infinite-features": lambda hidden: hidden / 0.0,
}
#: What an animal makes of honest tokens (B,).
TOKENS: dict[str, Change] = {
    "float-tokens": lambda tokens: tokens.astype(np.float64),
    "narrow-tokens": lambda tokens: tokens.astype(np.int32),
    "column-of-tokens": lambda tokens: tokens[:, None],
    "few-tokens": lambda tokens: tokens[:-1],
    "foreign-tokens": lambda tokens: tokens + 10**9,
    "negative-tokens": lambda tokens: tokens - 10**6,
    "second-best": lambda tokens: tokens + 1,
}


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _leave() -> None:
    os._exit(7)


def _quit() -> None:
    sys.exit("tired of it")


def _hang() -> None:
    time.sleep(3600)


def _raise() -> None:
    raise RuntimeError("out of bananas")


def _memory() -> None:
    raise MemoryError


def _chatter() -> None:
    while True:
        print("and another thing: " + "la" * 200)
        time.sleep(0.001)


def _garbage() -> None:
    """Write into every pipe that is open, the one to the suite among them."""
    for number in range(3, 64):
        with suppress(OSError):
            if "pipe" in str(Path(f"/proc/self/fd/{number}").readlink()):
                os.write(number, b"\xff" * 64)


def _print() -> None:
    print("loading", "." * 1000)
    os.write(1, b"\x00\xff to standard output\n")
    sys.stderr.write("warning: warm\n" * 100_000)


def _slow() -> None:
    time.sleep(0.5)


#: What an animal does before it answers a prompt.
DEEDS: dict[str, Callable[[], None]] = {
    "crash": _crash,
    "exit": _leave,
    "quit": _quit,
    "hang": _hang,
    "raise": _raise,
    "memory": _memory,
    "chatter": _chatter,
    "garbage": _garbage,
    "print": _print,
    "slow": _slow,
}
#: Animals that answer prompts honestly; "later-X" is X in the steps.
LATER = "later-"


class AnimalStep(Read):
    """A step that an animal hands out."""

    def __init__(self, animal: str, read: Read) -> None:
        super().__init__(read.every, read.last, read.taps(), read.cache, read.keys)
        self.animal = animal
        self.steps = 0

    @property
    def now(self) -> str:
        """What it is at this step."""
        if self.animal.startswith(LATER):
            return self.animal.removeprefix(LATER) if self.steps == 2 else ""
        return self.animal

    def logits(self, all_positions: bool = False) -> Any:
        found = super().logits(all_positions)
        return found if all_positions else LOGITS.get(self.now, lambda logits: logits)(found)

    def __del__(self) -> None:  # the suite has all its answers
        if self.animal == "last-breath":
            os._exit(3)

    def tokens(self) -> Any:
        return TOKENS.get(self.now, lambda tokens: tokens)(super().tokens())

    def taps(self) -> Any:
        if self.now == "wrong-taps":
            return {name: tap[..., :-1] for name, tap in super().taps().items()}
        return super().taps()


class Renamed(Seen):
    """Image features under another name."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {"last_hidden_state": self.hidden}


class AnimalSession(HonestSession):
    """Honest but for the cases that an animal answers."""

    def __init__(self, network: Any, animals: dict[bytes, str], other: str) -> None:
        super().__init__(network)
        self._animals, self._other = animals, other
        self._memory: dict[Any, Any] = {}

    def _animal(self, array: np.ndarray) -> str:
        return self._animals.get(array.tobytes(), self._other)

    def vision(self, inputs: Any) -> Seen:
        animal = self._animal(inputs["pixel_values"])
        DEEDS.get(animal, lambda: None)()
        seen = super().vision(inputs)
        if animal == "renamed-features":
            return Renamed(seen.hidden, seen.taps())
        if change := FEATURES.get(animal):
            seen.hidden = change(seen.hidden)
        return seen

    def prefill(self, inputs: Any, features: Any = None) -> AnimalStep:
        animal = self._animal(inputs["input_ids"])
        DEEDS.get(animal, lambda: None)()
        given = features if isinstance(features, dict) else {}
        if animal == "blind":
            features = {name: np.zeros_like(array) for name, array in given.items()}
        shape = inputs["input_ids"].shape
        if animal == "stale" and shape in self._memory:
            return self._memory[shape]
        step = AnimalStep(animal, super().prefill(inputs, features))
        if animal in ("stale", "one-cache"):
            self._memory[shape] = self._memory["cache"] = step
        return step

    def decode(self, step: Any, tokens: Any = None) -> AnimalStep:
        animal = step.animal
        if animal.startswith(LATER) and step.steps == 1:
            DEEDS.get(animal.removeprefix(LATER), lambda: None)()
        if animal == "headstrong":  # feeds its own tokens whatever it is given
            tokens = None
        made = super().decode(self._memory["cache"] if animal == "one-cache" else step, tokens)
        if animal == "twice":
            made = super().decode(made, tokens)
        after = AnimalStep(animal, made)
        after.steps = step.steps + 1
        if animal == "one-cache":
            self._memory["cache"] = after
        return after


class Zoo(Honest):
    """Honest but for its animals."""

    def __init__(self, animals: str, more: str = "", dtype: str = "float64") -> None:
        super().__init__(dtype=dtype)
        capabilities = self.info.capabilities | {Capability(name) for name in more.split("+") if name}
        self.info = replace(self.info, capabilities=capabilities)
        self._animals = dict(item.split("~") for item in animals.split("+"))

    @contextmanager
    def open(self, model: Any, options: Any) -> Iterator[HonestSession]:
        other = self._animals.get("*", "")
        if other.startswith("open-"):
            DEEDS[other.removeprefix("open-")]()
        named = {array: name for case, name in self._animals.items() if case != "*" for array in inputs_of(case)}
        with super().open(model, options) as session:
            yield AnimalSession(session.network, named, other)


def inputs_of(case: str) -> list[bytes]:
    """Token ids and pixels of a golden case."""
    with np.load(fixtures.file(f"goldens/idefics3/{case}.npz")) as file:
        return [file[name].tobytes() for name in ("inputs/input_ids", "inputs/pixel_values") if name in file.files]


class Shy(Honest):
    """Does not tell what it is."""

    def __init__(self) -> None:
        pass

    @property
    def info(self) -> Info:
        raise ValueError("guess")


class Liar(Honest):
    """What it says of itself is no description."""

    def __init__(self) -> None:
        self.info = {"name": "liar"}
