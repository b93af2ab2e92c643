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

from vlmqual_adapters import recipes_idefics, recipes_idefics3, recipes_mllama
from vlmqual_adapters.ledger import Entry, Ledger
from vlmqual_contract.target import Array

SAMPLES = 8
_MISREAD = "{} takes an array whose first side is 1 or 3 for one with channels first"
_MODE = "{} converts to RGB after resizing and splitting and refuses or misreads other modes"


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


def idefics3_entry(whole: Any, image: Any) -> Entry:
    """What Idefics3's image processor makes of one image.

    Args:
        whole: the library's processor.
        image: a PIL image.
    """
    made: Mapping[str, Any] = whole.image_processor([[image]], return_row_col_info=True, return_tensors="np")
    pixels = np.asarray(made["pixel_values"], dtype=np.float32)
    return {
        "pixel_values": described(pixels),
        "pixel_attention_mask": described(np.asarray(made["pixel_attention_mask"], dtype=np.int64)),
        "rows": int(made["rows"][0][0]),
        "cols": int(made["cols"][0][0]),
        "image_tokens": whole.image_seq_len * pixels.shape[1],
    }


def mllama_entry(whole: Any, image: Any) -> Entry:
    """What Mllama's image processor makes of one image; the arguments as for Idefics3."""
    made: Mapping[str, Any] = whole.image_processor([[image]], return_tensors="np")
    return {
        "pixel_values": described(np.asarray(made["pixel_values"], dtype=np.float32)),
        "aspect_ratio_ids": described(np.asarray(made["aspect_ratio_ids"], dtype=np.int64)),
        "aspect_ratio_mask": described(np.asarray(made["aspect_ratio_mask"], dtype=np.int64)),
        "num_tiles": int(made["num_tiles"][0][0]),
    }


def idefics_entry(whole: Any, image: Any) -> Entry:
    """What the image processor of Idefics makes of one image; the arguments as for Idefics3."""
    made = whole.image_processor([image], return_tensors="np")
    # 4.46.3 returns the array itself.
    pixels = made if isinstance(made, np.ndarray) else made["pixel_values"]
    return {"pixel_values": described(np.asarray(pixels, dtype=np.float32))}


_RECIPES = {"idefics": recipes_idefics, "idefics3": recipes_idefics3, "mllama": recipes_mllama}


def make(family: str, fixtures: Path, library: Any, ledger: Ledger) -> None:
    """Record the entries of every fixture image with the installed library."""
    load_image = __import__("transformers.image_utils", fromlist=["load_image"]).load_image
    recipe = _RECIPES[family]
    put = {"idefics": _put_idefics, "idefics3": _put_idefics3, "mllama": _put_mllama}[family]
    for checkpoint in (recipe.TINY, recipe.RELEASED_GEOMETRY):
        whole = library.AutoProcessor.from_pretrained(str(fixtures / "checkpoints" / checkpoint), local_files_only=True)
        for path in sorted((fixtures / "images").glob("*.*")):
            if path.suffix == ".md":
                continue
            with Image.open(path) as image:
                image.load()
            read = load_image(str(path))
            put(f"{path.name}|{checkpoint}", whole, read, image, ledger)


def _put_idefics(key: str, whole: Any, read: Image.Image, image: Image.Image, ledger: Ledger) -> None:
    """Idefics converts to RGB before anything else, so other modes are no trouble."""
    misread = read.height in (1, 3)
    if misread and ledger.version == ledger.documented:
        return
    why = _MISREAD.format(ledger.documented) if misread else ""
    ledger.put(f"{key}|path", idefics_entry(whole, read), why)
    if image.mode != "RGB" or image.getexif().get(0x0112, 1) != 1:
        ledger.put(f"{key}|pil", idefics_entry(whole, image), why)


def _put_idefics3(key: str, whole: Any, read: Image.Image, image: Image.Image, ledger: Ledger) -> None:
    documented = ledger.version == ledger.documented
    misread = read.height in (1, 3)
    if not (misread and documented):
        why = _MISREAD.format(ledger.documented) if misread else ""
        ledger.put(f"{key}|path", idefics3_entry(whole, read), why)
    rotated = image.getexif().get(0x0112, 1) != 1
    plain = image.mode == "RGB"
    if rotated or (not plain and not documented):
        why = "" if plain else f"{image.mode}: {_MODE.format(ledger.documented)}"
        ledger.put(f"{key}|pil", idefics3_entry(whole, image), why)


def _put_mllama(key: str, whole: Any, read: Image.Image, image: Image.Image, ledger: Ledger) -> None:
    """Mllama converts to RGB before anything else, so other modes are no trouble; thin and very long images are."""
    documented = ledger.version == ledger.documented
    for way, picture in (("path", read), ("pil", image)):
        if way == "pil" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1:
            continue
        reason = _trouble(picture, whole.image_processor.size["height"], ledger.documented)
        if not (reason and documented):
            ledger.put(f"{key}|{way}", mllama_entry(whole, picture), reason)


def _trouble(picture: Image.Image, tile: int, documented: str) -> str:
    """Why the documented version of Mllama does not make an entry of a picture, "" when it does."""
    if picture.height in (1, 3):
        return _MISREAD.format(documented)
    longer, shorter = max(picture.size), min(picture.size)
    if shorter * 4 * tile < longer:
        return f"{documented} makes the shorter side 0 pixels long and refuses"
    return ""
