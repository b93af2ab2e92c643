"""Checkpoints that differ from a fixture in a tensor or a setting, written without any library for it.

A safetensors file is the length of its header, the header as JSON, and the tensors' bytes.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_conformance.subjects import TINY
from vlmqual_conformance.suite.idefics_images import FAMILY
from vlmqual_contract import fixtures
from vlmqual_contract.target import Array, FloatArray, Model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor as it stands in a file, bfloat16 as bit patterns (uint16)."""

    bits: Array

    def wide(self) -> FloatArray:
        """Its values, float64."""
        values: FloatArray = (self.bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return values


Tensors = dict[str, Stored]


def stored(values: FloatArray) -> Stored:
    """Values that are exact in bfloat16.

    Raises:
        ValueError: they are not.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if (bits & 0xFFFF).any():
        raise ValueError("not exactly representable in bfloat16")
    return Stored((bits >> 16).astype(np.uint16))


def read(path: Path) -> Tensors:
    """The tensors of a file whose dtype is bfloat16 throughout."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    found: Tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path.name}: {name} is {entry['dtype']}, not BF16")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Stored(np.frombuffer(raw[start:end], "<u2").reshape(entry["shape"]))
    return found


def write(path: Path, tensors: Mapping[str, Stored]) -> None:
    """A file of bfloat16 tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        data = np.ascontiguousarray(tensors[name].bits, "<u2").tobytes()
        shape = list(tensors[name].bits.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def weights(name: str = TINY[FAMILY]) -> Tensors:
    """The tensors of a fixture checkpoint."""
    return read(fixtures.checkpoint(name) / WEIGHTS)


def copy(
    folder: Path,
    change: Callable[[Tensors], Tensors] | None = None,
    *,
    name: str = TINY[FAMILY],
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """A fixture checkpoint with other tensors or settings.

    Args:
        folder: where to put it; it must not be there yet.
        change: tensors to those that the copy has.
        name: of the fixture checkpoint.
        settings: values of config.json.
    """
    shutil.copytree(fixtures.checkpoint(name), folder)
    if settings is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **settings}, indent=2), "utf-8")
    if change is not None:
        write(folder / WEIGHTS, change(read(folder / WEIGHTS)))
    return Model(str(folder), FAMILY)


def with_processor(folder: Path, name: str) -> Model:
    """The tiny checkpoint with the files of another fixture's processor, which may have no weights of its own."""
    made = copy(folder)
    for file in fixtures.checkpoint(name).iterdir():
        if file.name not in ("config.json", "generation_config.json", WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    return made


def with_image_settings(folder: Path, settings: Mapping[str, Any]) -> Model:
    """The tiny checkpoint with other values of its image processor."""
    made = copy(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **settings}), "utf-8")
    return made


def in_shards(folder: Path, count: int = 3) -> Model:
    """The tiny checkpoint with its tensors dealt out to several files."""
    made = copy(folder)
    tensors = read(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    place = {name: files[index % count] for index, name in enumerate(sorted(tensors))}
    for file in files:
        write(folder / file, {name: tensors[name] for name in tensors if place[name] == file})
    size = sum(tensor.bits.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    return made
