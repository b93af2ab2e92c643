"""The methods `pad` and `resize` of Mllama's image processor, against the document and Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from processor_objects import noise_image

from vlmqual_impl.api.mllama_processing import MllamaImageProcessor


def test_pad_fills_the_canvas_at_the_bottom_and_right() -> None:
    # MLLAMA-IMG-025
    pixels = np.asarray(noise_image(300, 100)) | 1
    size = {"height": 224, "width": 224}
    made = MllamaImageProcessor().pad(pixels.transpose(2, 0, 1), size, (1, 2))
    assert made.shape == (3, 224, 448)
    assert np.array_equal(made[:, :100, :300], pixels.transpose(2, 0, 1))
    assert np.count_nonzero(made) == pixels.size
    moved = MllamaImageProcessor().pad(pixels, size, aspect_ratio=(1, 2), data_format="channels_first")
    assert np.array_equal(moved, made)
    last = MllamaImageProcessor().pad(pixels.transpose(2, 0, 1), size, (1, 2), "channels_last", "channels_first")
    assert np.array_equal(last.transpose(2, 0, 1), made)


def test_resize_gives_the_image_and_its_arrangement() -> None:
    # MLLAMA-IMG-027
    pixels, size = np.asarray(noise_image(300, 100)), {"height": 28, "width": 28}
    made, arrangement = MllamaImageProcessor().resize(pixels, size, 4)
    assert arrangement == (1, 3), "300 x 100 is shrunk least to 84 x 28, by 0.28, on (1, 3)"
    assert made.shape == (28, 84, 3)
    assert np.array_equal(made, np.asarray(noise_image(300, 100).resize((84, 28), Image.Resampling.BILINEAR)))
    first, _ = MllamaImageProcessor().resize(pixels, size, 4, data_format="channels_first")
    assert np.array_equal(first.transpose(1, 2, 0), made)
    fractions, _ = MllamaImageProcessor().resize(pixels / 255, size, 4)
    assert fractions.dtype == np.float32
    assert 0 < fractions.max() <= 1
    nearest, _ = MllamaImageProcessor().resize(pixels, size, 4, 0)
    assert np.array_equal(nearest, np.asarray(noise_image(300, 100).resize((84, 28), Image.Resampling.NEAREST)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"data_format": "last"}, "data_format 'last' is unknown; valid are channels_first, channels_last and None"),
        ({"input_data_format": "none"}, "input_data_format 'none' is unknown"),
        ({"image": np.zeros((5, 6), np.uint8)}, r"3 axes here, not 2 \(shape \(5, 6\)\)"),
        ({"size": {"height": 28}}, "size .* is not valid"),
    ],
)
def test_wrong_calls_of_pad_and_resize_are_named(call: dict[str, Any], message: str) -> None:
    whole = {"image": np.zeros((5, 6, 3), np.uint8), "size": {"height": 28, "width": 28}, **call}
    with pytest.raises(ValueError, match=message):
        MllamaImageProcessor().pad(aspect_ratio=(1, 1), **whole)
    with pytest.raises(ValueError, match=message):
        MllamaImageProcessor().resize(max_image_tiles=4, **whole)
