"""What identifies a user's checkpoint, whoever holds it: its family, and a digest that a moved copy keeps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import FAMILIES

CONFIG = "config.json"
#: Of each file of weights its head, which names all tensors, and so many pieces over its whole length are read.
_HEAD_BYTES = 1 << 20
_PIECES = 64
_PIECE_BYTES = 1 << 16


def settings(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        UsageError: the directory or the file is not there, or the file is no JSON object.
    """
    path = directory / CONFIG
    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such checkpoint directory")
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: not a JSON object")
    return found


def family(directory: Path) -> str:
    """The `model_type` of a checkpoint.

    Raises:
        UsageError: see `settings`, or it is none of `FAMILIES`.
    """
    found = settings(directory).get("model_type")
    if found not in FAMILIES:
        raise UsageError(f"{directory / CONFIG}: model_type is {found!r}; valid are {', '.join(FAMILIES)}")
    return str(found)


def digest(directory: Path) -> str:
    """SHA-256 over every JSON file of a checkpoint and over name, size, head and 64 pieces of each file of weights.

    A copy elsewhere has the same digest. Weights are not read as a whole, so a change of a few of them may stay unseen;
    a change of all of them, as by training or quantising, does not.

    Raises:
        UsageError: there are no weights in safetensors files, or a file cannot be read.
    """
    whole = hashlib.sha256()
    try:
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise UsageError(f"{directory}: there is no safetensors file")
        for path in sorted(directory.glob("*.json")):
            whole.update(path.name.encode() + b"\0" + path.read_bytes())
        for path in weights:
            whole.update(path.name.encode() + b"\0" + _sampled(path))
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror or error}") from error
    return whole.hexdigest()


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        found.update(file.read(_HEAD_BYTES))
        for piece in range(1, _PIECES + 1):
            file.seek(max(0, (size - _PIECE_BYTES) * piece // _PIECES))
            found.update(file.read(_PIECE_BYTES))
    return found.digest()
