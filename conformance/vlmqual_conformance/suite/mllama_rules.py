"""The rules of Mllama's images and prompts once more, worked out from the specification alone, to compare with.

Sizes are (height, width); an arrangement is (tiles high, tiles wide).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor

import numpy as np
from PIL import Image

from vlmqual_contract.target import Array

BILINEAR = Image.Resampling.BILINEAR


def supported(tiles: int) -> list[tuple[int, int]]:
    """All arrangements of at most `tiles` tiles, counted up in height first, then in width."""
    return [(a, b) for a in range(1, tiles + 1) for b in range(1, tiles + 1) if a * b <= tiles]


def arrangement(size: tuple[int, int], tile: int, tiles: int) -> tuple[int, int]:
    """The arrangement for an image; scales are compared in float64, as the reference does."""
    height, width = size
    best: tuple[bool, float, int, int] | None = None
    chosen = (0, 0)
    for place, (a, b) in enumerate(supported(tiles)):
        scale = min(a * tile / height, b * tile / width)
        # enlarging before shrinking, the least enlargement or the least shrinking, the fewest tiles, the first
        rank = (scale < 1, scale if scale >= 1 else -scale, a * b, place)
        if best is None or rank < best:
            best, chosen = rank, (a, b)
    return chosen


def fitted(size: tuple[int, int], grid: tuple[int, int], tile: int) -> tuple[int, int]:
    """The size after the resize: clipped to tile and canvas, ratio kept by cutting off, at least one pixel."""
    height, width = size
    high, wide = (min(max(side, tile), count * tile) for side, count in zip(size, grid, strict=True))
    if wide / width < high / height:
        return max(1, min(floor(height * (wide / width)), high)), wide
    return high, max(1, min(floor(width * (high / height)), wide))


def tiles_of(pixels: Array, tile: int, tiles: int) -> tuple[Array, int]:
    """Tiles (tiles, 3, tile, tile) uint8 of a picture (H, W, 3), 0 where nothing is, and the id of its arrangement."""
    size = (pixels.shape[0], pixels.shape[1])
    grid = arrangement(size, tile, tiles)
    height, width = fitted(size, grid, tile)
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), BILINEAR))
    canvas = np.zeros((grid[0] * tile, grid[1] * tile, 3), np.uint8)
    canvas[:height, :width] = resized
    made = np.zeros((tiles, 3, tile, tile), np.uint8)
    for index in range(grid[0] * grid[1]):
        row, column = divmod(index, grid[1])
        cut = canvas[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        made[index] = cut.transpose(2, 0, 1)
    return made, supported(tiles).index(grid) + 1


def distortion(before: tuple[int, int], after: tuple[int, int]) -> float:
    """By how many pixels of the resized image its shorter side misses the ratio of the original."""
    height, width = before
    exact = Fraction(after[1]) * height / width - after[0], Fraction(after[0]) * width / height - after[1]
    return float(min(abs(exact[0]), abs(exact[1])))


def dense(ids: Sequence[int], marker: int, counts: Sequence[int], slots: int, tiles: int) -> Array:
    """The cross-attention mask of a row, (S, slots, tiles), token by token.

    Args:
        ids: padded token ids.
        marker: the image token.
        counts: tiles of each image.
        slots: image places.
        tiles: tile places.
    """
    mask = np.zeros((len(ids), slots, tiles), np.int64)
    seen: list[int] = []
    image = -1
    for place, token in enumerate(ids):
        if token == marker:
            image += 1
            if place == 0 or ids[place - 1] != marker:
                seen = []
            seen = [*seen, image]
        for index in seen:
            mask[place, index, : counts[index]] = 1
    return mask
