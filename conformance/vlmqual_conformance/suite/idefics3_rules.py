"""The rules of Idefics3's images and prompts once more, worked out from the specification alone, to compare with.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmqual_contract.target import Array

FAKE = "<fake_token_around_image>"
MARK = "<image>"
GLOBAL = "<global-img>"
LARGEST_EDGE = 4096

Size = tuple[int, int]


def resized(size: Size, longest_edge: int) -> Size:
    """Size after the first resize: the longer side becomes `longest_edge`, the shorter one keeps the ratio, even."""
    height, width = size
    ratio = width / height
    if width >= height:
        width, height = longest_edge, _even(int(longest_edge / ratio))
    else:
        width, height = _even(int(longest_edge * ratio)), longest_edge
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if max(width, height) > LARGEST_EDGE:
        if width >= height:
            width, height = LARGEST_EDGE, max(int(LARGEST_EDGE / ratio), 1)
        else:
            width, height = max(int(LARGEST_EDGE * ratio), 1), LARGEST_EDGE
    return height, width


def _even(side: int) -> int:
    return side + side % 2


def tiled(size: Size, tile: int) -> Size:
    """Size after the second resize, to multiples of the tile's side; the longer side is rounded up first."""
    height, width = size
    ratio = width / height
    if width >= height:
        width = _up(width, tile)
        height = _up(int(width / ratio), tile)
    else:
        height = _up(height, tile)
        width = _up(int(height * ratio), tile)
    return height, width


def _up(side: int, tile: int) -> int:
    return -(-side // tile) * tile


def grid(size: Size, tile: int, longest_edge: int | None = None) -> tuple[int, int]:
    """Rows and columns of an image; (0, 0) for one that is a single frame."""
    height, width = tiled(resized(size, longest_edge) if longest_edge else size, tile)
    if height <= tile and width <= tile:
        return 0, 0
    return height // tile, width // tile


def frames(pixels: Array, tile: int, longest_edge: int | None = None, *, split: bool = True) -> Array:
    """The frames of an RGB image, (frames, 3, tile, tile) uint8.

    Args:
        pixels: (height, width, 3) uint8.
        tile: side of a frame.
        longest_edge: of the first resize; None leaves it out.
        split: cut into tiles.
    """
    image = Image.fromarray(pixels)
    if longest_edge:
        image = _scaled(image, resized(pixels.shape[:2], longest_edge))
    parts: list[Image.Image] = []
    if split:
        height, width = tiled((image.height, image.width), tile)
        image = _scaled(image, (height, width))
        if max(height, width) > tile:
            corners = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
            parts = [image.crop((left, top, left + tile, top + tile)) for top, left in corners]
    parts.append(_scaled(image, (tile, tile)))
    return np.stack([np.asarray(part).transpose(2, 0, 1) for part in parts])


def _scaled(image: Image.Image, size: Size) -> Image.Image:
    height, width = size
    return image.resize((width, height), Image.Resampling.LANCZOS)


def expansion(rows: int, columns: int, tokens: int) -> str:
    """What one marker becomes: a line of text for each row of tiles, an empty line, the whole image."""
    block = MARK * tokens
    whole = f"{FAKE}{GLOBAL}{block}{FAKE}"
    if (rows, columns) == (0, 0):
        return whole
    lines = [
        "".join(f"{FAKE}<row_{row}_col_{column}>{block}" for column in range(1, columns + 1))
        for row in range(1, rows + 1)
    ]
    return "\n".join([*lines, "", whole])


def expanded(text: str, grids: Sequence[tuple[int, int]], tokens: int) -> str:
    """A prompt with each of its markers expanded in order."""
    waiting = iter(grids)
    return re.sub(re.escape(MARK), lambda _: expansion(*next(waiting), tokens), text)
