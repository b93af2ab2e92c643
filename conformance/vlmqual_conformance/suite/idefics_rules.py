"""The rules of Idefics' images, masks and positions once more, worked out from the specification alone.

Legend of shapes: B rows, S positions, N image slots of a row, P patches of a picture, E width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isqrt

import numpy as np
from PIL import Image

from vlmqual_contract.target import Array, FloatArray

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: The free parameter of the cubic kernel that torch interpolates with.
CUBIC = -0.75


def square(
    picture: Image.Image, side: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> FloatArray:
    """(3, side, side) float64 of an RGB picture, its ratio ignored."""
    resized = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), np.float64)
    made: FloatArray = ((resized / 255 - mean) / std).transpose(2, 0, 1)
    return made


def visible(ids: Sequence[int], marker: int, end: int, slots: int) -> Array:
    """The image_attention_mask of a row, (S, slots), token by token.

    Args:
        ids: padded token ids.
        marker: the image token.
        end: the end-of-text token, which still sees the image before it and closes it.
        slots: N.
    """
    mask = np.zeros((len(ids), slots), np.int64)
    image, is_open = -1, False
    for place, token in enumerate(ids):
        if token == marker:
            image, is_open = image + 1, True
        if is_open:
            mask[place, image] = 1
        if token == end:
            is_open = False
    return mask


def resized_positions(table: FloatArray, rows: int, columns: int) -> FloatArray:
    """Position vectors (1 + rows * columns, E) of a picture of so many patches, from the table (1 + P, E)."""
    side = isqrt(len(table) - 1)
    grid = table[1:].reshape(side, side, -1)
    high, wide = (_cubic(side, count) for count in (rows, columns))
    made = np.einsum("ri,cj,ije->rce", high, wide, grid).reshape(rows * columns, -1)
    return np.concatenate([table[:1], made])


def _cubic(old: int, new: int) -> FloatArray:
    """Weights (new, old) that resize one side; a tenth of a patch more than `new` decides the scale."""
    weights = np.zeros((new, old))
    scale = (new + 0.1) / old
    for place in range(new):
        centre = (place + 0.5) / scale - 0.5
        for index in range(floor(centre) - 1, floor(centre) + 3):
            weights[place, min(max(index, 0), old - 1)] += _kernel(abs(centre - index))
    return weights


def _kernel(away: float) -> float:
    if away <= 1:
        return (CUBIC + 2) * away**3 - (CUBIC + 3) * away**2 + 1
    if away < 2:
        return CUBIC * (away**3 - 5 * away**2 + 8 * away - 4)
    return 0.0
