"""The image rules of Mllama, one function for each, in the order in which an image meets them.

An image is resized without distortion so that it fits a canvas of whole tiles, padded with zeros to that canvas, turned
into numbers and cut into tiles. Sizes are (height, width), arrangements (tiles high, tiles wide). Source of the rules:
Mllama documentation 4.45.2 and, where it is silent, the behaviour of transformers 4.45.2, whose PIL results are matched
bit for bit; for images that it cannot make 1 pixel high or wide, that of 5.23.0. Reading pictures, resizing and
normalising are those of `images`.

Legend of shapes: B samples, N images of a sample, T = `max_image_tiles`, t side of a tile, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmqual_impl import images
from vlmqual_impl.images import Array, Size

Arrangement = tuple[int, int]


def channel_format(array: Array, given: str | None = None) -> str:
    """Where the channels of a (.., .., ..) array stand; 4 rows or columns are no channels where 1 or 3 others are.

    Raises:
        ValueError: it is not given and cannot be inferred.
    """
    if given is None and array.shape[0] not in (1, 3) and array.shape[-1] in (1, 3):  # MLLAMA-IMG-038
        return "channels_last"
    return images.channel_format(array, given)


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels; every picture of another mode than RGB is laid on white (MLLAMA-IMG-036).

    A colour that an RGB file declares transparent stays what it is.
    """
    return image if image.mode == "RGB" else images.on_white(image)


def unconverted(image: Image.Image) -> Image.Image:
    """The values of a picture as they are stored, whatever they mean: palette indices, inks, alpha (MLLAMA-IMG-037).

    Raises:
        ValueError: they have no 1, 3 or 4 channels, or lie outside 0..255.
    """
    values = np.asarray(image)
    return images.picture(values, None if values.ndim == 2 else "channels_last")


def arrangements(tiles: int) -> list[Arrangement]:
    """All arrangements of at most `tiles` tiles; an image's aspect ratio id is its place here, from 1 (MLLAMA-IMG-019).

    Raises:
        ValueError: the number of tiles is not positive.
    """
    if isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1:  # MLLAMA-IMG-043
        raise ValueError(f"max_image_tiles is {tiles!r}; it has to be a positive integer")
    sides = range(1, tiles + 1)
    return [(high, wide) for high in sides for wide in sides if high * wide <= tiles]


def canvas(size: Size, tile: int, tiles: int) -> Arrangement:
    """The arrangement whose canvas suits an image best (MLLAMA-IMG-045).

    Of the canvases that the image has to be enlarged for (or fits exactly), that of the smallest enlargement; if there
    is none, that of the smallest shrinking. Among equals the one with the fewest tiles. There is only one: where (a, b)
    and (c, d) with a < c and b > d scale alike, so does (a, d), which has fewer tiles than both.
    """
    height, width = size
    found = arrangements(tiles)
    scales = [min(wide * tile / width, high * tile / height) for high, wide in found]
    enlarging = [scale for scale in scales if scale >= 1]
    wanted = min(enlarging) if enlarging else max(scales)
    equal = [each for each, scale in zip(found, scales, strict=True) if scale == wanted]
    return min(equal, key=lambda each: each[0] * each[1])


def fitted_size(size: Size, arrangement: Arrangement, tile: int) -> Size:
    """(height, width) after the resize: the ratio kept, one side that of the image clipped to tile and canvas.

    An image smaller than a tile is enlarged until a side is as long as a tile; one between a tile and its canvas stays
    as it is. No side becomes shorter than 1 pixel (MLLAMA-IMG-028, MLLAMA-IMG-047).
    """
    height, width = size
    high = min(max(height, tile), arrangement[0] * tile)
    wide = min(max(width, tile), arrangement[1] * tile)
    down, across = high / height, wide / width
    if across < down:
        return max(min(math.floor(height * across), high), 1), wide
    return high, max(min(math.floor(width * down), wide), 1)


def pad(array: Array, arrangement: Arrangement, tile: int) -> Array:
    """Zeros at the bottom and right up to the canvas; (H, W, C) to (high * t, wide * t, C) (MLLAMA-IMG-025).

    Raises:
        ValueError: the image is larger than the canvas.
    """
    down, across = arrangement[0] * tile - array.shape[0], arrangement[1] * tile - array.shape[1]
    if down < 0 or across < 0:
        raise ValueError(
            f"an image of {array.shape[0]} x {array.shape[1]} pixels does not fit {arrangement[0]} x {arrangement[1]} "
            f"tiles of {tile}"
        )
    return np.pad(array, ((0, down), (0, across), (0, 0)))


def rescale(array: Array, factor: float) -> Array:
    """Values times factor as float32 (MLLAMA-IMG-034).

    The product of bytes is made in float64, that of float32 values in float32, as in 4.45.2.
    """
    return (array * float(factor)).astype(np.float32)


def tiles_of(array: Array, arrangement: Arrangement) -> Array:
    """Cut a canvas row by row; (high * t, wide * t, C) to (high * wide, C, t, t) (MLLAMA-IMG-046)."""
    high, wide = arrangement
    t, channels = array.shape[0] // high, array.shape[2]
    cut = array.reshape(high, t, wide, t, channels).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cut.reshape(high * wide, channels, t, t))


def pack(samples: Sequence[Sequence[Array]], tiles: int) -> Array:
    """Tiles of all images in one array; what is not there is 0 (MLLAMA-IMG-018, MLLAMA-PROC-005).

    Args:
        samples: for each sample its images, (tiles of the image, C, t, t) each.
        tiles: T.

    Returns:
        (B, N, T, C, t, t) float32.

    Raises:
        ValueError: the images differ in channels.
    """
    shapes = {image.shape[1:] for sample in samples for image in sample}
    if len(shapes) > 1:
        raise ValueError(f"the images' tiles have the shapes {sorted(shapes)}; they have to be equal")
    packed = np.zeros((len(samples), max(map(len, samples)), tiles, *shapes.pop()), np.float32)
    for row, sample in enumerate(samples):
        for slot, image in enumerate(sample):
            packed[row, slot, : len(image)] = image
    return packed


def ratio_ids(samples: Sequence[Sequence[Arrangement]], tiles: int) -> Array:
    """(B, N) int64: place among the arrangements from 1, 0 for images that are not there (MLLAMA-IMG-021)."""
    known = arrangements(tiles)
    ids = np.zeros((len(samples), max(map(len, samples))), np.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = [known.index(each) + 1 for each in sample]
    return ids


def ratio_mask(samples: Sequence[Sequence[Arrangement]], tiles: int) -> Array:
    """(B, N, T) int64: 1 for tiles that are there, and for the first tile of images that are not (MLLAMA-IMG-023)."""
    mask = np.zeros((len(samples), max(map(len, samples)), tiles), np.int64)
    mask[:, :, 0] = 1
    for row, sample in enumerate(samples):
        for slot, (high, wide) in enumerate(sample):
            mask[row, slot, : high * wide] = 1  # MLLAMA-IMG-022
    return mask
