"""The file of a compiled model. It has the suffix of RBLN's files and nothing else in common with them.

A zip without compression:

    meta.json            format, versions, digest, and what the model is
    graph-<i>.pt2        the operations of program i, by torch.export, without their constants
    weights/<digest>     the bytes of a constant, row-major; the digest covers dtype, shape and bytes

With weight sharing, a constant that another file of the same context in the same folder holds is not written again;
such files move together. A reader goes by digests, so the files may be renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import RBLNRuntimeError
from .weights import Weight, digest_of, dtype_name, hold, raw

FORMAT = "vlmqual-rebel"
FORMAT_VERSION = 1
SUFFIX = ".rbln"
_MADE_OF = "a compiled model of the vlmqual_rebel emulator"


def write(
    path: Path, description: Mapping[str, Any], operations: list[bytes], weights: Iterable[Weight], shared: str | None
) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        description: what the model is; JSON.
        operations: of each program.
        weights: the constants of all programs.
        shared: the context whose other files in this folder may hold constants; None if each holds its own.
    """
    tensors = {weight.digest: weight.tensor for weight in weights}
    elsewhere = _held_beside(path, shared) if shared else set()
    meta: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "context": shared,
        "operations": [hashlib.sha256(one).hexdigest() for one in operations],
        "tensors": {
            digest: {"dtype": dtype_name(one.dtype), "shape": list(one.shape)} for digest, one in tensors.items()
        },
        "holds": sorted(set(tensors) - elsewhere),
        "model": dict(description),
    }
    meta["digest"] = _digest(meta)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as file:
            file.writestr("meta.json", json.dumps(meta, indent=1))
            for i, one in enumerate(operations):
                file.writestr(f"graph-{i}.pt2", one)
            for digest in meta["holds"]:
                with file.open(f"weights/{digest}", "w", force_zip64=True) as member:
                    member.write(raw(tensors[digest]))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_meta(path: Path) -> dict[str, Any]:
    """What a file says of itself, checked.

    Raises:
        FileNotFoundError: there is no such file.
        RBLNRuntimeError: it is cut short, damaged, not of this emulator, or of another version of it or of torch.
    """
    with path.open("rb") as stream:
        start = stream.read(4)
    try:
        with zipfile.ZipFile(path) as file:
            meta = json.loads(file.read("meta.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        cut = start == b"PK\x03\x04" and isinstance(error, zipfile.BadZipFile)
        reason = "is cut short or damaged" if cut else f"is not {_MADE_OF}, and no other .rbln file can be read here"
        raise RBLNRuntimeError(f"{path} {reason}.") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise RBLNRuntimeError(f"{path} is not {_MADE_OF}, and no other .rbln file can be read here.")
    for key, mine in (("format_version", FORMAT_VERSION), ("torch", torch.__version__)):
        if meta.get(key) != mine:
            raise RBLNRuntimeError(
                f"{path} was compiled with {key} {meta.get(key)}, and this is {mine}; compile again."
            )
    if meta.get("digest") != _digest({key: value for key, value in meta.items() if key != "digest"}):
        raise RBLNRuntimeError(f"{path} is damaged: its description does not have the digest written in it.")
    return meta


def read(path: Path) -> tuple[dict[str, Any], list[bytes], dict[str, Weight]]:
    """A file whole: its meta data, the operations of each program, and the constants by digest.

    Raises:
        FileNotFoundError: there is no such file.
        RBLNRuntimeError: as `read_meta`; or constants are in a file that is no longer beside it.
    """
    meta = read_meta(path)
    held = set(meta["holds"])
    weights: dict[str, Weight] = {}
    try:
        with zipfile.ZipFile(path) as file:
            operations = [file.read(f"graph-{i}.pt2") for i in range(len(meta["operations"]))]
            for digest in held:
                weights[digest] = _weight(file, digest, meta["tensors"][digest])
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise RBLNRuntimeError(f"{path} is damaged: {error}.") from error
    if [hashlib.sha256(one).hexdigest() for one in operations] != meta["operations"]:
        raise RBLNRuntimeError(f"{path} is damaged: its operations do not have the digest written in it.")
    missing = set(meta["tensors"]) - held
    for other in _siblings(path):
        if missing:
            missing -= _borrow(other, missing, meta, weights)
    if missing:
        raise RBLNRuntimeError(
            f"{path} shares {len(missing)} of its {len(meta['tensors'])} weights with another {SUFFIX} file "
            "of the folder that it was saved in, which is not beside it."
        )
    return meta, operations, weights


def _borrow(other: Path, wanted: set[str], meta: Mapping[str, Any], weights: dict[str, Weight]) -> set[str]:
    try:
        found = wanted & set(read_meta(other)["holds"])
        with zipfile.ZipFile(other) as file:
            for digest in found:
                weights[digest] = _weight(file, digest, meta["tensors"][digest])
    except (RBLNRuntimeError, zipfile.BadZipFile, KeyError, OSError):
        return set()
    return found


def _weight(file: zipfile.ZipFile, digest: str, entry: Mapping[str, Any]) -> Weight:
    data = file.read(f"weights/{digest}")
    shape = tuple(entry["shape"])
    if digest_of(entry["dtype"], shape, data) != digest:
        raise zipfile.BadZipFile(f"the weight {digest[:12]} does not have its digest")
    dtype = getattr(torch, entry["dtype"])
    tensor = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return hold(digest, tensor.reshape(shape))


def _held_beside(path: Path, context: str) -> set[str]:
    """Digests that other files of this context in the folder hold."""
    held: set[str] = set()
    for other in _siblings(path):
        try:
            meta = read_meta(other)
        except (RBLNRuntimeError, OSError):
            continue
        if meta["context"] == context:
            held |= set(meta["holds"])
    return held


def _siblings(path: Path) -> list[Path]:
    return [other for other in sorted(path.parent.glob(f"*{SUFFIX}")) if other.name != path.name]


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
