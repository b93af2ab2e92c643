"""Questions that a target is asked about photographs, and how far two of its answers may lie apart.

Both sides of a relation are the target's own, so no gold is at hand. With a reference the noise of its honest arms is
the measure. Without, that of the bundled goldens is: the largest over all cases of the family in the declared dtype,
times the square root of how many more decoder layers the checkpoint has than the goldens' model, since roundings of
layers add up as independent errors do. The budget of a relation is the sum of both sides' budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import sqrt
from pathlib import Path

import numpy as np

from vlmqual_conformance.goldens import PIXELS, TEXT, Golden, goldens
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import BadAnswer
from vlmqual_conformance.references import Over
from vlmqual_conformance.subjects import TargetKeeper, tiny
from vlmqual_conformance.suite import runs
from vlmqual_contract import checkpoint
from vlmqual_contract.questions import Question
from vlmqual_contract.remote import RemoteFeatures, RemoteSession
from vlmqual_contract.target import Array, Capability, Inputs, Model, Prompt

#: Cache positions for the default questions: an image of Idefics3 is a few thousand tokens of its prompt.
_LENGTHS = {"idefics": 2048, "idefics3": 4096, "mllama": 2048}
#: Positions beyond the longest prompt of a reference and its steps.
_MORE = 64
_LOGITS = ("prefill/logits", "decode/logits", "chain/logits")


@cache
def _sizes(model: Model) -> tuple[int, int]:
    """Decoder layers and positions that a checkpoint says it has."""
    values = checkpoint.settings(Path(model.path))
    text = values.get("text_config") or values
    return int(text.get("num_hidden_layers", 32)), int(text.get("max_position_embeddings", 2048))


def length(over: Over) -> int:
    """Cache positions that sessions are opened with."""
    wanted = _LENGTHS[over.model.family]
    if over.reference is not None:
        wanted = max(wanted, -(-(over.reference.longest + _MORE) // 1024) * 1024)
    return min(wanted, _sizes(over.model)[1])


@cache
def noise(over: Over, dtype: str) -> float:
    """Noise of logits in a compute dtype; see the module."""
    if over.reference is not None:
        known, deeper = [over.reference.golden(name) for name in over.reference.names], 1.0
    else:
        known = list(goldens(over.model.family))
        deeper = max(1.0, sqrt(_sizes(over.model)[0] / _sizes(tiny(over.model.family))[0]))
    found = [golden.noise(name, dtype) for golden in known for name in _LOGITS if golden.has(f"noise/{dtype}/{name}")]
    return max(found) * deeper


@dataclass(frozen=True)
class Asked:
    """Tensors of prompts.

    Attributes:
        family: `model_type`.
        inputs: by documented name.
    """

    family: str
    inputs: Inputs

    @property
    def text(self) -> dict[str, Array]:
        """What prefill needs beside image features."""
        return {name: self.inputs[name] for name in TEXT[self.family] if name in self.inputs}

    @property
    def pixels(self) -> dict[str, Array]:
        """What the vision model reads; empty without images."""
        return {name: self.inputs[name] for name in PIXELS[self.family] if name in self.inputs}

    @property
    def whole(self) -> dict[str, Array]:
        """Text and images."""
        return {**self.text, **self.pixels}

    @property
    def golden(self) -> Golden:
        """The tensors alone as a golden, for what works on the texts of goldens."""
        arrays = {f"inputs/{name}": value for name, value in self.inputs.items()}
        return Golden(self.family, "asked", frozenset(arrays), arrays)

    def row(self, number: int) -> Asked:
        """One row of a batch, with the padding that it has there."""
        cut = {name: np.ascontiguousarray(array[number : number + 1]) for name, array in self.whole.items()}
        return Asked(self.family, cut)

    def part(self, end: int) -> dict[str, Array]:
        """The text tensors up to a position."""
        return {name: np.ascontiguousarray(array[:, :end]) for name, array in self.text.items()}


class Asker:
    """Puts questions to a target.

    Attributes:
        dtype: declared compute dtype.
        noise: of logits.
        length: cache positions.
    """

    def __init__(self, keeper: TargetKeeper, session: RemoteSession, over: Over) -> None:
        self._keeper = keeper
        self._session = session
        self._over = over
        self._family = over.model.family
        self.dtype = keeper.info.dtype
        self.noise = noise(over, self.dtype)
        self.length = length(over)

    def ask(self, *questions: Question) -> Asked:
        """Tensors of a batch of questions, by the target's own preprocessing.

        Where it has none the reference's prompts stand in for single questions: the first with as many images.

        Raises:
            NotApplicable: it has none, and there is no such prompt.
        """
        key = ("asked", *questions)
        if key not in self._keeper.memory:
            self._keeper.memory[key] = Asked(self._family, self._tensors([each.prompt for each in questions]))
        found = self._keeper.memory[key]
        assert isinstance(found, Asked)
        return found

    def _tensors(self, prompts: list[Prompt]) -> Inputs:
        if Capability.PREPROCESS in self._keeper.info.capabilities:
            return self._session.preprocess(prompts)
        reference = self._over.reference
        for item in reference.record["prompts"] if reference and len(prompts) == 1 else ():
            if len(item["images"]) == len(prompts[0].images):
                golden = reference.golden(item["name"]) if reference else None
                return {} if golden is None else {**golden.text, **golden.pixels}
        raise NotApplicable("the target does not declare preprocess, and no prompt of a reference can stand in")

    def features(self, asked: Asked) -> RemoteFeatures | None:
        """The target's image features, None where there are no images or it does not give any."""
        if not asked.pixels or Capability.VISION not in self._keeper.info.capabilities:
            return None
        return self._session.vision(asked.pixels)

    def given(self, asked: Asked, features: RemoteFeatures | None, text: Mapping[str, Array] | None = None) -> Inputs:
        """What prefill is given: text, and pixels where there are no features."""
        own = asked.text if text is None else text
        return dict(own) if features is not None else {**own, **asked.pixels}

    def tail(self, asked: Asked) -> int:
        """First position of a single row behind everything that stands for an image.

        Masks over images do not change from there on, so that the rest can be given token by token.
        """
        ids = asked.text["input_ids"][0]
        start = 0
        if self._family == "idefics3":
            marker = int(checkpoint.settings(Path(self._over.model.path)).get("image_token_id", 128257))
            start = int(np.flatnonzero(ids == marker)[-1]) + 1 if (ids == marker).any() else 0
        if name := runs.image_mask(asked.golden):
            rows = asked.text[name][0].reshape(len(ids), -1)
            changes = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1))
            start = int(changes[-1]) + 1 if len(changes) else 0
        if start + 2 >= len(ids):
            raise BadAnswer(f"preprocess: no text stands behind the images of a prompt of {len(ids)} tokens")
        return start
