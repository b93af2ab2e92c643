"""The image rules of Idefics: a picture becomes a square of numbers, whatever its shape was.

Source of the rules: Idefics documentation 4.46.3 and, where it is silent, the behaviour of transformers 4.46.3 with the
documented mean and standard deviation given, which it does not apply by itself (IDEFICS-IMG-007); its PIL results are
matched bit for bit. What it cannot read (arrays, sides of 1 or 3 pixels) follows the PIL backend of 5.23.0.

Legend of shapes: B samples, N images of a sample, s `image_size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmqual_impl import images
from vlmqual_impl.images import Array

MEAN = (0.48145466, 0.4578275, 0.40821073)  # IDEFICS-IMG-003
STD = (0.26862954, 0.26130258, 0.27577711)  # IDEFICS-IMG-004
CHANNELS = 3


def square(value: Any, side: int, mean: float | Iterable[float], std: float | Iterable[float]) -> Array:
    """One image as numbers.

    Three channels (every mode but RGB is laid on white), both sides resized to `side` without
    regard to their ratio, bytes divided by 255, then (value - mean) / std.

    Args:
        value: what `images.picture` takes; arrays of fractions in 0..1 mean the same picture as their bytes.
        side: s, in pixels.
        mean: for each channel, or one for all (IDEFICS-IMG-011).
        std: likewise.

    Returns:
        (3, s, s) float32.

    Raises:
        ValueError: value, mean or std are not valid.
        TypeError: it is no image.
    """
    picture = images.picture(value)
    coloured = picture if picture.mode == "RGB" else images.on_white(picture)
    resized = images.resize(coloured, (side, side), Image.Resampling.BICUBIC)  # IDEFICS-IMG-013
    array = images.rescale(images.frame_array(resized), 1 / 255)
    return np.ascontiguousarray(images.normalize(array, mean, std).transpose(2, 0, 1))  # IDEFICS-IMG-010


def pack(samples: Sequence[Sequence[Array]], slots: int, empty: tuple[int, ...]) -> Array:
    """Images of all samples in one array, those of a sample first, zeros behind them (IDEFICS-PROC-010).

    Args:
        samples: for each sample its images, all of one shape.
        slots: N, at least as many as any sample has images.
        empty: the shape where there is no image at all (IDEFICS-PROC-022).

    Returns:
        (B, N, 3, s, s) float32.

    Raises:
        ValueError: the images differ in shape, as a `transform` can make them.
    """
    shapes = {image.shape for sample in samples for image in sample} or {empty}
    if len(shapes) > 1:
        raise ValueError(f"the images have the shapes {sorted(shapes)}; they have to be equal")
    packed = np.zeros((len(samples), slots, *shapes.pop()), np.float32)
    for row, sample in enumerate(samples):
        for slot, image in enumerate(sample):
            packed[row, slot] = image
    return packed
