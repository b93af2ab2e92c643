"""Pixel goldens: digests and samples of what the reference's image processor makes of every fixture image.

Keys of `pixels.json` are `IMAGE|CHECKPOINT|path` (the library reads the file) and `IMAGE|CHECKPOINT|pil` (an image in
memory, in the file's own mode and not rotated).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmqual_adapters.ledger import DOCUMENTED, Entry, Ledger
from vlmqual_adapters.recipes import RELEASED_GEOMETRY, TINY
from vlmqual_contract.target import Array

SAMPLES = 8
_MISREAD = f"{DOCUMENTED} takes an array whose first side is 1 or 3 for one with channels first"
_MODE = f"{DOCUMENTED} converts to RGB after resizing and splitting and refuses or misreads other modes"


def described(array: Array) -> Entry:
    """Shape, dtype, SHA-256 of the bytes in C order, and a few values by flat index."""
    flat = np.ascontiguousarray(array).reshape(-1)
    index = [int(value) for value in np.linspace(0, flat.size - 1, SAMPLES)]
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "sha256": hashlib.sha256(flat.tobytes()).hexdigest(),
        "sample": {"index": index, "value": [flat[i].item() for i in index]},
    }


def entry(processor: Any, tokens: int, image: Any) -> Entry:
    """What the image processor makes of one image.

    Args:
        processor: the library's image processor.
        tokens: image tokens of a frame.
        image: a PIL image.
    """
    made: Mapping[str, Any] = processor([[image]], return_row_col_info=True, return_tensors="np")
    pixels = np.asarray(made["pixel_values"], dtype=np.float32)
    return {
        "pixel_values": described(pixels),
        "pixel_attention_mask": described(np.asarray(made["pixel_attention_mask"], dtype=np.int64)),
        "rows": int(made["rows"][0][0]),
        "cols": int(made["cols"][0][0]),
        "image_tokens": tokens * pixels.shape[1],
    }


def make(fixtures: Path, library: Any, ledger: Ledger) -> None:
    """Record the entries of every fixture image with the installed library."""
    load_image = __import__("transformers.image_utils", fromlist=["load_image"]).load_image
    for checkpoint in (TINY, RELEASED_GEOMETRY):
        whole = library.AutoProcessor.from_pretrained(str(fixtures / "checkpoints" / checkpoint), local_files_only=True)
        processor, tokens = whole.image_processor, whole.image_seq_len
        for path in sorted((fixtures / "images").glob("*.*")):
            if path.suffix == ".md":
                continue
            key = f"{path.name}|{checkpoint}"
            with Image.open(path) as image:
                image.load()
            rotated = image.getexif().get(0x0112, 1) != 1
            read = load_image(str(path))
            misread = read.height in (1, 3)
            if not (misread and library.__version__ == DOCUMENTED):
                ledger.put(f"{key}|path", entry(processor, tokens, read), _MISREAD if misread else "")
            plain = image.mode == "RGB"
            if rotated or (not plain and library.__version__ != DOCUMENTED):
                ledger.put(f"{key}|pil", entry(processor, tokens, image), "" if plain else f"{image.mode}: {_MODE}")
