"""Reading goldens: inputs, gold in float64, and the noise of honest implementations. The names stand in the maker's
record, `meta`, and in the manifest.

Legend of shapes: B rows, S positions, N image slots of a row, T tiles of an image, F real frames of the batch, L image
tokens of a frame or tile, D width, V vocabulary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array, Capability, FloatArray, IntArray

#: The tensors that prefill needs beside image features, by family; a case without images may lack the last of Mllama.
TEXT: Mapping[str, tuple[str, ...]] = {
    "idefics": ("input_ids", "attention_mask", "image_attention_mask"),
    "idefics3": ("input_ids", "attention_mask"),
    "mllama": ("input_ids", "attention_mask", "cross_attention_mask"),
}
#: The tensors that the vision model reads, by family.
PIXELS: Mapping[str, tuple[str, ...]] = {
    "idefics": ("pixel_values", "interpolate_pos_encoding"),
    "idefics3": ("pixel_values", "pixel_attention_mask"),
    "mllama": ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
}
#: What the image features are called, by family; those of a resampler have a name of their own.
FEATURES: Mapping[str, tuple[str, ...]] = {
    "idefics": ("image_encoder_embeddings", "perceiver_embeddings"),
    "idefics3": ("image_hidden_states",),
    "mllama": ("cross_attention_states",),
}


@dataclass(frozen=True)
class Golden:
    """One golden file, read when it is needed.

    Attributes:
        family: `model_type`.
        name: of the case.
        names: names of all arrays.
    """

    family: str
    name: str
    names: frozenset[str]
    _memory: dict[str, Array] = field(default_factory=dict, compare=False, repr=False)

    def array(self, name: str) -> Array:
        """An array by its name in the file, read-only.

        Raises:
            UsageError: the file does not hold it.
        """
        if name not in self._memory:
            if name not in self.names:
                raise UsageError(f"golden {self.name} does not hold {name}")
            array: Array = self._file[name]
            array.flags.writeable = False
            self._memory[name] = array
        return self._memory[name]

    @cached_property
    def _file(self) -> Mapping[str, Array]:
        """What decompresses an array that is asked for: the table of a file's arrays is read only once."""
        file: Mapping[str, Array] = np.load(io.BytesIO(_path(self.family, self.name).read_bytes()))
        return file

    def noise(self, tensor: str, dtype: str) -> float:
        """Worst error of the honest arms in a dtype, for one tensor.

        Raises:
            UsageError: no arm ran in that dtype, or not over that tensor.
        """
        return float(self.array(f"noise/{dtype}/{tensor}"))

    def has(self, prefix: str) -> bool:
        """True when the file holds arrays of this name or below it."""
        return any(name == prefix or name.startswith(f"{prefix}/") for name in self.names)

    def components(self, prefix: str) -> list[str]:
        """Component names of the taps stored under `taps/vision` or `taps/prefill`."""
        return sorted(name.removeprefix(f"{prefix}/") for name in self.names if name.startswith(f"{prefix}/"))

    @cached_property
    def meta(self) -> Mapping[str, Any]:
        """How the case was made: title, checkpoint, rows of text and images, padding side."""
        meta: dict[str, Any] = json.loads(str(self.array("meta")))
        return meta

    @property
    def checkpoint(self) -> str:
        """Name of the fixture checkpoint that it belongs to."""
        return str(self.meta["checkpoint"])

    @property
    def text(self) -> dict[str, Array]:
        """The tensors that prefill needs beside image features, int64.

        input_ids and attention_mask, (B, S) each; Mllama's cases with images have cross_attention_mask (B, S, N, T),
        all of Idefics image_attention_mask (B, S, N).
        """
        return self._inputs(TEXT)

    @property
    def pixels(self) -> dict[str, Array]:
        """The tensors of the images; empty without images.

        Idefics3: pixel_values (B, N, 3, H, W) and pixel_attention_mask (B, N, H, W). Mllama: pixel_values
        (B, N, T, 3, H, W), aspect_ratio_ids (B, N) and aspect_ratio_mask (B, N, T). Idefics: pixel_values
        (B, N, 3, H, W), and interpolate_pos_encoding (1,) for images that are not of the model's size.
        """
        return self._inputs(PIXELS)

    def _inputs(self, table: Mapping[str, tuple[str, ...]]) -> dict[str, Array]:
        return {name: self.array(f"inputs/{name}") for name in table[self.family] if f"inputs/{name}" in self.names}

    @property
    def hidden(self) -> str:
        """Name of the image features among the arrays of the file."""
        found = [name for name in FEATURES[self.family] if f"features/{name}" in self.names]
        return f"features/{found[0] if found else FEATURES[self.family][0]}"

    @property
    def features(self) -> dict[str, Array] | None:
        """Gold image features to be injected, None without images.

        Idefics3: (F, L, D). Mllama: (B, N * T * L, D). Idefics: (B, N, L, D), always there.
        """
        return {self.hidden.removeprefix("features/"): self.array(self.hidden)} if self.has_images else None

    @property
    def mask(self) -> IntArray:
        """attention_mask (B, S)."""
        return self.array("inputs/attention_mask")

    @property
    def has_images(self) -> bool:
        """True when the case has image features."""
        return self.hidden in self.names

    @property
    def rows(self) -> int:
        """B."""
        return int(self.mask.shape[0])

    @property
    def tokens(self) -> IntArray:
        """Greedy tokens of gold, (steps, B): token t is fed in step t."""
        return self.array("decode/tokens")

    @property
    def logits(self) -> FloatArray:
        """Gold's logits of the prompt's end and after every step, (1 + steps, B, V)."""
        return np.concatenate([self.array("prefill/logits")[None], self.array("decode/logits")])

    def needs(self, *, injected: bool = True) -> frozenset[Capability]:
        """Capabilities that a target needs to be given these inputs, with image features injected or from pixels."""
        found = set()
        if self.rows > 1:
            found.add(Capability.BATCH)
        if not (self.mask != 0).all():
            found.add(Capability.PADDING)
        if self.has_images and injected:
            found.add(Capability.VISION)
        if self.has_images and not injected:
            found |= self.pixel_needs()
        return frozenset(found)

    def pixel_needs(self) -> frozenset[Capability]:
        """Capabilities that a target needs to be given the pixels: honouring a mask that hides part of a frame."""
        if "inputs/pixel_attention_mask" not in self.names:
            return frozenset()
        visible = self.array("inputs/pixel_attention_mask")
        partial = visible.any(axis=(2, 3)) & ~visible.all(axis=(2, 3))
        return frozenset({Capability.PIXEL_MASK}) if partial.any() else frozenset()


def _path(family: str, name: str) -> Path:
    return fixtures.file(f"goldens/{family}/{name}.npz")


@cache
def golden(family: str, name: str) -> Golden:
    """The golden of this name.

    Raises:
        UsageError: there is none, or its file is damaged.
    """
    with np.load(_path(family, name)) as file:
        return Golden(family, name, frozenset(file.files))


@cache
def goldens(family: str) -> tuple[Golden, ...]:
    """All goldens of a family, by name."""
    prefix = f"goldens/{family}/"
    names = [name.removeprefix(prefix) for name in fixtures.names(prefix)]
    return tuple(golden(family, name.removesuffix(".npz")) for name in names if name.endswith(".npz"))


@cache
def entries(family: str, name: str) -> dict[str, dict[str, Any]]:
    """The entries of `pixels.json` or `prompts.json`, by key."""
    text = fixtures.file(f"goldens/{family}/{name}.json").read_text("utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)["entries"]
    return found


def makers(family: str) -> dict[str, str]:
    """Packages to versions that the family's goldens were made with, from the manifest."""
    made = fixtures.manifest().get("made", {}).get(f"goldens-{family}", {})
    return dict(text.partition(" ")[::2] for text in made.get("software", ()))
