"""Messages over a pipe: a length, a JSON header, then the raw bytes of the arrays it names. Nothing is pickled."""

from __future__ import annotations

import json
import os
import selectors
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmqual_contract.errors import VlmqualError

HEADER_LIMIT_BYTES = 256 * 2**20
ARRAYS_LIMIT_BYTES = 16 * 2**30
_CHUNK = 2**20


class Closed(VlmqualError):
    """The other end is gone."""


class Late(VlmqualError):
    """The other end did not keep its time limit."""


class Channel:
    """One end of a connection over two file descriptors, with an optional deadline on every transfer."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    def readable(self, seconds: float) -> bool:
        """True when something can be read, or the other end is gone, within this time."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._read_fd, selectors.EVENT_READ)
            return bool(selector.select(max(0.0, seconds)))

    def send(self, body: Mapping[str, Any], deadline: float | None = None) -> None:
        """Send plain data; numpy arrays may stand anywhere in it.

        Args:
            body: mappings, sequences, strings, numbers, None and arrays.
            deadline: `time.monotonic()` after which to give up.

        Raises:
            Closed: the other end is gone.
            Late: the deadline passed.
            TypeError: something in `body` is no plain data.
        """
        arrays: list[np.ndarray[Any, Any]] = []
        packed = _pack(body, arrays)
        shapes = [{"dtype": array.dtype.str, "shape": list(array.shape)} for array in arrays]
        header = json.dumps({"body": packed, "arrays": shapes}).encode()
        self._write(struct.pack("<Q", len(header)) + header, deadline)
        for array in arrays:
            self._write(np.ascontiguousarray(array).tobytes(), deadline)

    def receive(self, deadline: float | None = None) -> dict[str, Any]:
        """Wait for the next message.

        Raises:
            Closed: the other end is gone.
            Late: the deadline passed.
            VlmqualError: the message is damaged or too large.
        """
        (length,) = struct.unpack("<Q", self._read(8, deadline))
        if length > HEADER_LIMIT_BYTES:
            raise VlmqualError(
                f"a message header of {length} bytes was announced; at most {HEADER_LIMIT_BYTES} are read"
            )
        try:
            message = json.loads(self._read(length, deadline))
            dtypes = [(np.dtype(item["dtype"]), tuple(item["shape"])) for item in message["arrays"]]
            body = message["body"]
        except (ValueError, KeyError, TypeError) as error:
            raise VlmqualError(f"a damaged message arrived: {error}") from error
        sizes = [int(dtype.itemsize * np.prod(shape, dtype=np.int64)) for dtype, shape in dtypes]
        if sum(sizes) > ARRAYS_LIMIT_BYTES:
            raise VlmqualError(f"arrays of {sum(sizes)} bytes were announced; at most {ARRAYS_LIMIT_BYTES} are read")
        arrays = [
            np.frombuffer(self._read(size, deadline), dtype=dtype).reshape(shape)
            for (dtype, shape), size in zip(dtypes, sizes, strict=True)
        ]
        unpacked = _unpack(body, arrays)
        if not isinstance(unpacked, dict):
            raise VlmqualError("a damaged message arrived: its body is no mapping")
        return unpacked

    def close(self) -> None:
        """Close both descriptors."""
        for fd in (self._read_fd, self._write_fd):
            try:
                os.close(fd)
            except OSError:  # closed already
                continue

    def _write(self, data: bytes, deadline: float | None) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._write_fd, view[:_CHUNK]) :]
            except BlockingIOError:
                _wait(self._write_fd, selectors.EVENT_WRITE, deadline)
            except (BrokenPipeError, OSError) as error:
                raise Closed("the other end of the pipe is gone") from error

    def _read(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray()
        while len(data) < size:
            try:
                part = os.read(self._read_fd, min(_CHUNK, size - len(data)))
            except BlockingIOError:
                _wait(self._read_fd, selectors.EVENT_READ, deadline)
                continue
            except OSError as error:
                raise Closed("the other end of the pipe is gone") from error
            if not part:
                raise Closed("the other end of the pipe is gone")
            data += part
        return data


def _wait(fd: int, event: int, deadline: float | None) -> None:
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise Late("the time limit has passed")
    with selectors.DefaultSelector() as selector:
        selector.register(fd, event)
        if not selector.select(left):
            raise Late("the time limit has passed")


def _pack(value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of Python objects is no plain data")
        arrays.append(value)
        return {"$array": len(arrays) - 1}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _pack(item, arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item, arrays) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_pack(item, arrays) for item in value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain data: {value!r}")


def _unpack(value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$array"}:
            return arrays[value["$array"]]
        return {key: _unpack(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, arrays) for item in value]
    return value
