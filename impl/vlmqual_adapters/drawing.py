"""Weights from a seed, and the files they are written to; the same bytes on every machine.

Weights come from PCG64 through integer arithmetic alone, so no mathematical library of a machine takes part, and every
value is exactly representable in bfloat16.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmqual_contract.target import Array

SEED = 20241125


class Draws:
    """Numbers from PCG64 that are near to normal, made by adding integers."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def normal(self, shape: tuple[int, ...], scale: float, mean: float = 0.0) -> Array:
        """Values with the given mean and standard deviation `scale`, uint16 bit patterns of bfloat16.

        Twelve uniform 16-bit integers added up have variance 12 * (2^32 - 1) / 12; the sum minus its mean, over 2^16,
        is standard normal but for the cut at six. One product and one sum in float64 are exact rules of IEEE 754.
        """
        count = int(np.prod(shape))
        raw = self._bits.random_raw(3 * count).astype("<u8").view("<u2").reshape(count, 12)
        centred = raw.astype(np.int64).sum(axis=1) * 2 - 12 * 65535
        return _bfloat16_bits(centred.astype(np.float64) * (scale / 131072.0) + mean).reshape(shape)


def safetensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of bfloat16 tensors: length of the header, header as JSON, data; names in order.

    Args:
        tensors: names to bfloat16 bit patterns (uint16).
        metadata: strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        data = tensors[name].astype("<u2").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def _bfloat16_bits(values: Array) -> Array:
    """Round to the nearest bfloat16, ties to even; float64 passes through float32 first. Returns uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def json_bytes(data: object, *, ascii_only: bool = True) -> bytes:
    """A JSON text with two blanks of indentation and a newline at its end."""
    return json.dumps(data, indent=2, ensure_ascii=ascii_only, sort_keys=ascii_only).encode() + b"\n"
