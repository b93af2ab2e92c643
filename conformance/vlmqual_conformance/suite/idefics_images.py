"""What tests of Idefics do to a golden's images and to its image_attention_mask by hand.

Legend of shapes: B rows, S positions, N image slots of a row, L features of an image, E width of the vision tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.subjects import TINY
from vlmqual_conformance.suite import runs
from vlmqual_contract import fixtures
from vlmqual_contract.target import Array, FloatArray, IntArray

FAMILY = "idefics"
MASK = "image_attention_mask"
INTERPOLATE = "interpolate_pos_encoding"


# checkpoints ----------------------------------------------------------------------------------------------------------


@cache
def settings(name: str = TINY[FAMILY]) -> dict[str, Any]:
    """The config.json of a fixture checkpoint."""
    found: dict[str, Any] = json.loads(fixtures.file(f"checkpoints/{name}/config.json").read_text("utf-8"))
    return found


def marker(config: Mapping[str, Any]) -> int:
    """Id of the image token: the second one of the additional vocabulary."""
    return int(config["vocab_size"]) + 1


def cases(wanted: Callable[[Golden], bool] = lambda golden: True) -> list[Any]:
    """Golden cases as parameters of a test, checkpoint by checkpoint, so that each is opened once for a test."""
    return sorted(runs.cases(FAMILY, wanted), key=lambda parameter: parameter.values[0].checkpoint)


# images ---------------------------------------------------------------------------------------------------------------


def states(case: Golden) -> FloatArray:
    """Gold features, (B, N, L, E)."""
    return case.array(case.hidden)


def slots(case: Golden) -> int:
    """N."""
    return int(states(case).shape[1])


def several(case: Golden) -> bool:
    """One row of at least two images."""
    return case.rows == 1 and slots(case) > 1


def as_features(case: Golden, hidden: FloatArray) -> dict[str, Array]:
    """Features (B, N, L, E) as prefill takes them."""
    return {case.hidden.removeprefix("features/"): np.ascontiguousarray(hidden)}


def image_of(pixels: Mapping[str, Array], row: int, slot: int) -> dict[str, Array]:
    """The pixels of one image on its own, (1, 1, 3, H, W), and whether its positions are interpolated."""
    one = pixels["pixel_values"][row : row + 1, slot : slot + 1]
    return {**pixels, "pixel_values": np.ascontiguousarray(one)}


def with_pixels(case: Golden, pixel_values: Array, *, interpolate: bool = False) -> dict[str, Array]:
    """The inputs of vision with other pictures, (B, N, 3, H, W)."""
    made = {"pixel_values": np.ascontiguousarray(pixel_values.astype(case.pixels["pixel_values"].dtype))}
    return {**made, INTERPOLATE: np.ones(1, np.int64)} if interpolate else made


def noise_pictures(height: int, width: int, count: int = 1) -> Array:
    """Pictures (1, count, 3, height, width) that nothing is known of, the same ones every time."""
    return np.random.default_rng(17).uniform(-1.5, 1.5, (1, count, 3, height, width)).astype(np.float32)


# masks ----------------------------------------------------------------------------------------------------------------


def unseeing(case: Golden) -> IntArray:
    """Real positions, (B, S) as 0 and 1, whose image_attention_mask is 0 throughout."""
    shown = case.text[MASK].any(axis=2)
    return np.asarray((case.mask != 0) & ~shown, np.int64)


def first_marker(case: Golden, row: int = 0) -> int:
    """Position of the first image token of a row."""
    return int(np.argmax(case.text["input_ids"][row] == marker(settings(case.checkpoint))))


def prefix(text: Mapping[str, Array], length: int) -> dict[str, Array]:
    """The text tensors of the first positions only."""
    return {name: np.ascontiguousarray(array[:, :length]) for name, array in text.items()}


def seeing(case: Golden, chosen: Sequence[int]) -> dict[str, Array]:
    """The text tensors with a mask that lets every real position see these images and no others."""
    mask = np.zeros_like(case.text[MASK])
    mask[:, :, list(chosen)] = case.mask[:, :, None]
    return {**case.text, MASK: mask}


def reordered(text: Mapping[str, Array], order: Sequence[int]) -> dict[str, Array]:
    """The text tensors with the columns of the mask in another order."""
    return {**text, MASK: np.ascontiguousarray(text[MASK][:, :, list(order)])}


def continued(case: Golden, token: int) -> dict[str, Array]:
    """The text tensors of the only row with one token more, which sees what the last one sees."""
    text = {name: np.concatenate([array, array[:, -1:]], axis=1) for name, array in case.text.items()}
    text["input_ids"][:, -1], text["attention_mask"][:, -1] = token, 1
    return text
