"""What tests of Mllama do to a golden's images and to its cross_attention_mask by hand.

Legend of shapes: B rows, S positions, N image slots of a row, T tiles of an image, L positions of a tile, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmqual_conformance.goldens import Golden, goldens
from vlmqual_conformance.suite import runs
from vlmqual_contract.target import Array, FloatArray, IntArray

FAMILY = "mllama"
STATES = "cross_attention_states"
MASK = "cross_attention_mask"


def slots(case: Golden) -> int:
    """N."""
    return int(case.pixels["aspect_ratio_ids"].shape[1])


def tiles(case: Golden) -> int:
    """T."""
    return int(case.pixels["aspect_ratio_mask"].shape[2])


def states(case: Golden) -> FloatArray:
    """Gold features by image and tile, (B, N, T, L, D)."""
    hidden = case.array(case.hidden)
    return hidden.reshape(len(hidden), slots(case), tiles(case), -1, hidden.shape[-1])


def as_features(by_tile: FloatArray) -> dict[str, Array]:
    """Features (B, N, T, L, D) as prefill takes them."""
    return {STATES: np.ascontiguousarray(by_tile.reshape(len(by_tile), -1, by_tile.shape[-1]))}


def image_of(pixels: Mapping[str, Array], row: int, slot: int) -> dict[str, Array]:
    """The pixels of one image on its own, (1, 1, ...)."""
    return {name: np.ascontiguousarray(array[row : row + 1, slot : slot + 1]) for name, array in pixels.items()}


def reordered(arrays: Mapping[str, Array], order: Sequence[int], axis: int = 1) -> dict[str, Array]:
    """The same tensors with their image slots in another order."""
    return {name: np.ascontiguousarray(np.take(array, order, axis)) for name, array in arrays.items()}


def unmasked(case: Golden) -> IntArray:
    """Real positions, (B, S) as 0 and 1, whose cross_attention_mask is 0 throughout."""
    shown = case.text[MASK].any(axis=(2, 3))
    return np.asarray((case.mask != 0) & ~shown, np.int64)


def first_marker(case: Golden, row: int = 0) -> int:
    """Position of the first image token of a row."""
    marker = int(runs.settings(FAMILY)["image_token_index"])
    return int(np.argmax(case.text["input_ids"][row] == marker))


def prefix(text: Mapping[str, Array], length: int) -> dict[str, Array]:
    """The text tensors of the first positions only."""
    return {name: np.ascontiguousarray(array[:, :length]) for name, array in text.items()}


def seeing_only(case: Golden, slot: int, tile: int) -> dict[str, Array]:
    """The text tensors with a mask that lets every position see one tile of one image."""
    dense = np.zeros_like(case.text[MASK])
    dense[:, :, slot, tile] = 1
    return {**case.text, MASK: dense}


def like_the_first_marker(case: Golden) -> dict[str, Array]:
    """The text tensors of the only row, with the first marker's mask for positions before it."""
    dense, place = case.text[MASK].copy(), first_marker(case)
    dense[:, :place] = dense[:, place : place + 1]
    return {**case.text, MASK: dense}


def of_the_same_arrangement(case: Golden) -> dict[str, Array]:
    """An image of another golden, in as many tiles and in the same arrangement as the only image of this one.

    Raises:
        LookupError: no golden has one.
    """
    wanted = case.pixels["aspect_ratio_ids"][0, 0]
    for other in goldens(FAMILY):
        if not other.has_images:
            continue
        for row, slot in np.argwhere(other.pixels["aspect_ratio_ids"] == wanted):
            found = image_of(other.pixels, int(row), int(slot))
            same_tiles = np.array_equal(found["aspect_ratio_mask"], case.pixels["aspect_ratio_mask"])
            if same_tiles and not np.array_equal(found["pixel_values"], case.pixels["pixel_values"]):
                return found
    raise LookupError(f"no golden has another image in the arrangement {wanted} of {case.name}")
