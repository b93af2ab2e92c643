"""The image rules of Idefics3, one function for each, in the order in which an image meets them.

Pictures are PIL images until they are cut into frames; frames become arrays (height, width, channels) and are then
rescaled and normalised. Sizes are (height, width) throughout. Source of the rules: Idefics3 documentation 4.46.3 and,
where it is silent, the behaviour of transformers 4.46.3; its PIL results are matched bit for bit.

Legend of shapes: B samples, N frames of a sample, H and W sides of a frame, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]
Size = tuple[int, int]
ChannelFormat = Literal["channels_first", "channels_last"]

LONGEST_EDGE_CAP = 4096  # 4.46.3 refuses more than 1820; the model card lets any N be chosen (IDEFICS3-CARD-012)
CHANNELS = (1, 3, 4)
FORMATS = ("channels_first", "channels_last")


# from whatever was passed to a picture -----------------------------------------------------------------------------


def picture(value: Any, input_format: str | None = None) -> Image.Image:
    """One image as a PIL image, its colours untouched.

    Args:
        value: a PIL image, or a numpy array or torch tensor (H, W), (H, W, C) or (C, H, W) of 1, 3 or 4 channels:
            uint8, or numbers in 0..255 without fractions, or fractions in 0..1.
        input_format: "channels_first" or "channels_last" of arrays; None infers it (IDEFICS3-IMG-042). An array that
            could be both is read channels first, as the reference does.

    Raises:
        ValueError: the shape, the range of values or the format is none of these.
        TypeError: it is no image at all.
    """
    if input_format is not None and input_format not in FORMATS:  # IDEFICS3-IMG-050
        raise ValueError(f"input_data_format {input_format!r} is unknown; valid are {', '.join(FORMATS)}")
    if isinstance(value, Image.Image):
        if 0 in value.size:
            raise ValueError(f"an image of {value.width} x {value.height} has no pixels")
        return value
    array = pixels(value)
    shape = array.shape
    if array.ndim == 3:
        if channel_format(array, input_format) == "channels_first":
            array = array.transpose(1, 2, 0)
        if array.shape[-1] not in CHANNELS:
            raise ValueError(f"an image of shape {shape} has {array.shape[-1]} channels; valid are 1, 3 and 4")
        array = array[..., 0] if array.shape[-1] == 1 else array
    elif array.ndim != 2:
        raise ValueError(f"an image array has 2 or 3 axes, not {array.ndim} (shape {array.shape})")
    if 0 in array.shape:
        raise ValueError(f"an image of shape {array.shape} has no pixels")
    return Image.fromarray(np.ascontiguousarray(_as_bytes(array)))


def pixels(value: Any) -> Array:
    """A numpy array or torch tensor as numpy array.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach") and hasattr(value, "numpy"):  # a torch tensor, without importing torch
        tensor = value.detach().cpu()
        array: Array = (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()
        return array
    raise TypeError(f"{type(value).__name__} is no image; valid are PIL images, numpy arrays and torch tensors")


def channel_format(array: Array, input_format: str | None = None) -> str:
    """Where the channels of a (.., .., ..) array stand.

    Raises:
        ValueError: it is not given and cannot be inferred.
    """
    if input_format is not None:
        return str(getattr(input_format, "value", input_format))
    if array.shape[0] in CHANNELS:
        return "channels_first"
    if array.shape[-1] in CHANNELS:
        return "channels_last"
    raise ValueError(f"where the channels of an image of shape {array.shape} stand cannot be inferred")


def _as_bytes(array: Array) -> npt.NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"an image array holds numbers, not {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the image array has values that are not finite")
    if not fractional(array):
        if low < 0 or high > 255:
            raise ValueError(f"image values go from {low:g} to {high:g}; whole numbers have to lie in 0..255")
        return array.astype(np.uint8)
    if low < 0 or high > 1:
        raise ValueError(f"image values go from {low:g} to {high:g}; fractions have to lie in 0..1")
    return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)


def fractional(array: Array) -> bool:
    """True for values that are not all whole numbers, in the reference's tolerance."""
    return array.dtype.kind == "f" and not np.allclose(array, array.astype(int))


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels; transparent pixels become white (IDEFICS3-IMG-032, IDEFICS3-IMG-033)."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return on_white(image)
    return image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """A picture of any mode on a white ground, in RGB."""
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


# sizes ---------------------------------------------------------------------------------------------------------------


def longest_edge_size(size: Size, longest_edge: int) -> Size:
    """(height, width) after the first resize: the longer side exact, the shorter one truncated, then made even.

    Enlarges as well as shrinks (IDEFICS3-IMG-016, IDEFICS3-IMG-023). A longer side above the cap is brought down to it.
    """
    height, width = size
    ratio = width / height
    if width >= height:
        height, width = _even(int(longest_edge / ratio)), longest_edge
    else:
        height, width = longest_edge, _even(int(longest_edge * ratio))
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > LONGEST_EDGE_CAP:
        ratio = width / height
        if height >= width:
            height, width = LONGEST_EDGE_CAP, int(LONGEST_EDGE_CAP * ratio)
        else:
            height, width = int(LONGEST_EDGE_CAP / ratio), LONGEST_EDGE_CAP
    return max(height, 1), max(width, 1)


def _even(length: int) -> int:
    return length + length % 2


def tile_multiple_size(size: Size, tile: int) -> Size:
    """(height, width) after the second resize: both sides multiples of the tile (IDEFICS3-IMG-020).

    The longer side goes up to the next multiple first and the other one follows from it: the ratio is not kept exactly.
    """
    height, width = size
    ratio = width / height
    if width >= height:
        width = _up(width, tile)
        height = _up(int(width / ratio), tile)
    else:
        height = _up(height, tile)
        width = _up(int(height * ratio), tile)
    return max(height, tile), max(width, tile)  # 49 * (1 / 49) is less than 1


def _up(length: int, tile: int) -> int:
    return -(-length // tile) * tile


def grid(size: Size, tile: int) -> tuple[int, int]:
    """(rows, columns) of a size that is a multiple of the tile; (0, 0) for a single frame (IDEFICS3-IMG-045)."""
    height, width = size
    if height <= tile and width <= tile:
        return 0, 0
    return height // tile, width // tile


# resizing and cutting ------------------------------------------------------------------------------------------------


def resize(image: Image.Image, size: Size, resample: int) -> Image.Image:
    """PIL's resize of 8-bit data, bit for bit (IDEFICS3-IMG-047)."""
    height, width = size
    return image.resize((width, height), resample=Image.Resampling(resample))


def split(image: Image.Image, tile: int, resample: int) -> tuple[list[Image.Image], int, int]:
    """Cut an image of multiple-of-tile size into frames.

    Returns:
        The tiles in row-major order followed by the whole image at tile size, and the grid; an image of a single tile
        is its only frame and has the grid (0, 0) (IDEFICS3-CARD-006).
    """
    rows, columns = grid((image.height, image.width), tile)
    if rows == 0:
        return [image], 0, 0
    boxes = [(c * tile, r * tile, (c + 1) * tile, (r + 1) * tile) for r in range(rows) for c in range(columns)]
    return [*map(image.crop, boxes), resize(image, (tile, tile), resample)], rows, columns


# numbers -------------------------------------------------------------------------------------------------------------


def frame_array(image: Image.Image) -> Array:
    """A frame as array (H, W, C) uint8."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def rescale(array: Array, factor: float) -> Array:
    """Values times factor: the product in float64, the result float32 (IDEFICS3-IMG-028)."""
    return (array.astype(np.float64) * factor).astype(np.float32)


def normalize(array: Array, mean: float | Iterable[float], std: float | Iterable[float]) -> Array:
    """(value - mean) / std for each channel of (H, W, C), in float32 (IDEFICS3-IMG-028, IDEFICS3-IMG-031).

    Raises:
        ValueError: mean or std have another number of values than the image has channels, or std is 0.
    """
    floats = array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)
    channels = floats.shape[-1]
    shift = _per_channel("image_mean", mean, channels, floats.dtype)
    scale = _per_channel("image_std", std, channels, floats.dtype)
    if not scale.all():
        raise ValueError(f"image_std {std!r} has a 0; pixels are divided by it")
    result: Array = (floats - shift) / scale
    return result


def _per_channel(name: str, value: float | Iterable[float], channels: int, dtype: np.dtype[Any]) -> Array:
    values = list(value) if isinstance(value, Iterable) else [value] * channels
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} values for an image of {channels} channels")
    return np.array(values, dtype=dtype)


def pad(samples: Sequence[Sequence[Array]], format_: ChannelFormat) -> tuple[list[list[Array]], list[list[Array]]]:
    """Bring all frames of a batch to one size and all samples to one number of frames.

    Args:
        samples: for each sample its frames, in `format_`.
        format_: where the channels stand.

    Returns:
        Frames padded with zeros at the bottom and right, and missing frames as zeros; masks (H, W) int64, 1 on real
        pixels, 0 on padding and missing frames (IDEFICS3-IMG-035, IDEFICS3-IMG-036).
    """
    frames = [frame for sample in samples for frame in sample]
    axes = (1, 2) if format_ == "channels_first" else (0, 1)
    height, width = (max(frame.shape[axis] for frame in frames) for axis in axes)
    channels = frames[0].shape[0 if format_ == "channels_first" else -1]
    shape = (channels, height, width) if format_ == "channels_first" else (height, width, channels)
    count = max(len(sample) for sample in samples)
    padded: list[list[Array]] = []
    masks: list[list[Array]] = []
    for sample in samples:
        full = np.zeros((count, *shape), dtype=frames[0].dtype)
        mask = np.zeros((count, height, width), dtype=np.int64)
        for index, frame in enumerate(sample):
            full[index][tuple(slice(side) for side in frame.shape)] = frame
            mask[index, : frame.shape[axes[0]], : frame.shape[axes[1]]] = 1
        padded.append(list(full))
        masks.append(list(mask))
    return padded, masks
