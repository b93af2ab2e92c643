"""What is asked of a model, in the sizes that decide what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Inputs


@dataclass(frozen=True)
class Request:
    """A batch of prompts.

    Attributes:
        tokens: prompt positions of every row.
        pictures: for every row and image slot how many pictures it has: tiles (Mllama), frames (Idefics3), 1 (Idefics).
        patches: of a picture; 0 for as many as a picture of the configured size has.
    """

    tokens: tuple[int, ...]
    pictures: tuple[tuple[int, ...], ...] = ()
    patches: int = 0

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.tokens)

    @property
    def total_pictures(self) -> int:
        """Pictures of all rows."""
        return sum(map(sum, self.pictures))


@dataclass(frozen=True)
class Passage:
    """One pass through the text model.

    Attributes:
        new: positions of every row that pass.
        cached: positions of every row that are in the cache before.
        images: positions of images that every row's cross-attention reads; all 0 where there is none.
        fresh: keys and values of images are computed in this pass.
        logits: positions, over all rows, that go through the head.
    """

    new: tuple[int, ...]
    cached: tuple[int, ...]
    images: tuple[int, ...]
    fresh: bool
    logits: int

    @property
    def vectors(self) -> int:
        """Positions that pass, of all rows."""
        return sum(self.new)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key of self-attention."""
        return sum(new * (cached + new) for new, cached in zip(self.new, self.cached, strict=True))

    @property
    def cross_pairs(self) -> int:
        """Pairs of a query and an image position."""
        return sum(new * images for new, images in zip(self.new, self.images, strict=True))


def of_tensors(inputs: Inputs, config: Mapping[str, object]) -> tuple[Request, Request]:
    """The request that tensors make: as it is computed, and without padding.

    Args:
        inputs: of the documented names; `attention_mask` (B, S), and where there are images `pixel_values` with
            `image_attention_mask` (Idefics), with `aspect_ratio_ids` and `aspect_ratio_mask` (Mllama), or alone
            (Idefics3, whose frames of zeros are dropped by every implementation).
        config: the model's config.json.

    Returns:
        What is computed: every row as long as the longest, every slot and tile. And what was asked for: real tokens,
        pictures that some token sees, real tiles.
    """
    mask = np.asarray(inputs["attention_mask"]) != 0
    tokens = tuple(int(count) for count in mask.sum(axis=1))
    padded = (int(mask.shape[1]),) * len(tokens)
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return Request(padded), Request(tokens)
    size = patch_size(config)
    patches = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)
    if "aspect_ratio_ids" in inputs:
        real = (np.asarray(inputs["aspect_ratio_mask"]) * (np.asarray(inputs["aspect_ratio_ids"]) > 0)[..., None]) != 0
        wanted = tuple(tuple(int(tiles) for tiles in row if tiles) for row in real.sum(axis=2))
        slots = ((int(pixels.shape[2]),) * int(pixels.shape[1]),) * len(tokens)
        return Request(padded, slots, patches), Request(tokens, wanted, patches)
    if "image_attention_mask" in inputs:
        seen = (np.asarray(inputs["image_attention_mask"]) != 0).any(axis=1)
        wanted = tuple((1,) * int(count) for count in seen.sum(axis=1))
        slots = ((1,) * int(pixels.shape[1]),) * len(tokens)
        return Request(padded, slots, patches), Request(tokens, wanted, patches)
    frames = (np.asarray(pixels) != 0).any(axis=(2, 3, 4)).sum(axis=1)
    wanted = tuple((int(count),) for count in frames)
    return Request(padded, wanted, patches), Request(tokens, wanted, patches)


def patch_size(config: Mapping[str, object]) -> int:
    """Side of a patch in pixels; the default is the one that all families' documentation but Idefics3's has.

    Raises:
        UsageError: it is no positive number.
    """
    return number(part(config, "vision_config"), "patch_size", 32 if config.get("model_type") == "idefics3" else 14)


def part(config: Mapping[str, object], name: str) -> Mapping[str, Any]:
    """A nested object of config.json, empty where it is missing.

    Raises:
        UsageError: it is no object.
    """
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise UsageError(f"config.json: {name} is {found!r}; it has to be a JSON object")
    return found


def number(config: Mapping[str, object], name: str, default: int) -> int:
    """A positive whole number of config.json; of a pair of equal ones that one.

    Raises:
        UsageError: it is something else.
    """
    found = config.get(name, default)
    if isinstance(found, list | tuple) and len(found) == 2 and found[0] == found[1]:
        found = found[0]
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise UsageError(f"config.json: {name} is {found!r}; it has to be a positive whole number")
    return found
