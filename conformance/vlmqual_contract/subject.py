"""Libraries as subjects: plain-data calls on the classes of a library that lives in a worker.

The client sends a name or a handle, a path into it, and arguments; the worker resolves them and answers with plain
data, arrays, or a handle where the answer is an object. A name with a colon (`PIL.Image:open`) is any importable
object; every other name is looked up in the library's package root.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract.errors import TargetRaised
from vlmqual_contract.target import Array, Library


@dataclass(frozen=True)
class Tensor:
    """An argument: this array as a tensor of the library, in `dtype` where given."""

    array: Array
    dtype: str | None = None


@dataclass(frozen=True)
class Image:
    """An argument: a PIL image, from a file (opened, not converted) or from an array with a PIL mode."""

    source: str | Path | Array
    mode: str | None = None


@dataclass(frozen=True)
class Tuple:
    """An argument that has to arrive as a tuple."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature. `default` is plain data, or the repr of what is none."""

    name: str
    kind: str
    required: bool
    default: Any = None


class Handle:
    """An object that lives in the worker."""

    def __init__(self, client: RemoteLibrary, number: int, type_name: str, bases: tuple[str, ...]) -> None:
        self._client = client
        self.number = number
        self.type_name = type_name
        self.bases = bases

    def get(self, path: str) -> Any:
        """The value at a dotted path of attributes or keys, for example `text_config.pad_token_id`."""
        return self._client.ask("get", self, path)

    def has(self, path: str) -> bool:
        """True when the path leads somewhere."""
        return bool(self._client.ask("has", self, path))

    def set(self, path: str, value: Any) -> None:
        """Assign to the attribute at the end of a dotted path."""
        self._client.ask("set", self, path, [value])

    def call(self, path: str = "", *args: Any, **kwargs: Any) -> Any:
        """Call the object, or the method at `path`."""
        return self._client.ask("call", self, path, args, kwargs)

    def type_of(self, path: str = "") -> tuple[str, ...]:
        """Class name and names of all bases of the object at `path`."""
        return tuple(self._client.ask("type", self, path))

    def mapping(self, path: str = "") -> dict[str, Any]:
        """The items of a mapping-like object."""
        return dict(self._client.ask("mapping", self, path))

    def __del__(self) -> None:
        self._client.released.append(self.number)

    def __repr__(self) -> str:
        return f"<{self.type_name} in the worker>"


class RemoteLibrary:
    """The client's end of a library in a worker.

    Attributes:
        name: name of the library.
        version: its version.
        families: `model_type`s whose classes it has.
        emulated: True when what it computes says nothing about a device.
        software: package names to versions.
    """

    def __init__(self, request: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._request = request
        self.released: list[int] = []
        about = request({"op": "library"})
        self.name = str(about["name"])
        self.version = str(about["version"])
        self.families: tuple[str, ...] = tuple(about["families"])
        self.emulated = bool(about.get("emulated", False))
        self.software: dict[str, str] = about.get("software", {})

    def exists(self, name: str) -> bool:
        """True when the package root has this name."""
        return bool(self.ask("exists", name, ""))

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call `Class`, `Class.method`, or `module:function`.

        Raises:
            TargetRaised: with the name and message of whatever the library raised.
        """
        return self.ask("call", name, "", args, kwargs)

    def get(self, name: str) -> Any:
        """The value of `name.path`."""
        return self.ask("get", name, "")

    def signature(self, name: str) -> list[Parameter]:
        """Parameters of a class's constructor or of a method, in order, without `self`."""
        return [Parameter(**item) for item in self.ask("signature", name, "")]

    def type_of(self, name: str) -> tuple[str, ...]:
        """For a class: its name and the names of all its bases."""
        return tuple(self.ask("type", name, ""))

    def ask(
        self, action: str, what: Handle | str, path: str, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Send one request; the building block of everything above."""
        released, self.released = self.released, []
        body = {
            "op": "ask",
            "action": action,
            "what": {"$handle": what.number} if isinstance(what, Handle) else what,
            "path": path,
            "args": [_encode_argument(value) for value in args],
            "kwargs": {key: _encode_argument(value) for key, value in (kwargs or {}).items()},
            "released": released,
        }
        return self._decode(self._request(body)["value"])

    def _decode(self, value: Any) -> Any:
        if isinstance(value, dict):
            if "$handle" in value:
                return Handle(self, value["$handle"], value["type"], tuple(value["bases"]))
            if "$tuple" in value:
                return tuple(self._decode(item) for item in value["$tuple"])
            if "$float" in value:
                return float(value["$float"])
            return {key: self._decode(item) for key, item in value["$dict"]}
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        return value


def _encode_argument(value: Any) -> Any:
    if isinstance(value, Handle):
        return {"$handle": value.number}
    if isinstance(value, Tensor):
        return {"$tensor": value.array, "dtype": value.dtype}
    if isinstance(value, Image):
        source = value.source if isinstance(value.source, np.ndarray) else str(value.source)
        return {"$image": source, "mode": value.mode}
    if isinstance(value, Tuple):
        return {"$tuple": [_encode_argument(item) for item in value.items]}
    if isinstance(value, (list, tuple)):
        return [_encode_argument(item) for item in value]
    if isinstance(value, dict):
        return {"$dict": [[key, _encode_argument(item)] for key, item in value.items()]}
    if isinstance(value, Path):
        return str(value)
    return value


class LibraryServer:
    """The worker's end: resolves names, keeps objects, encodes answers."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._objects: dict[int, Any] = {}
        self._next = 0

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one request of `RemoteLibrary.ask`."""
        for number in body["released"]:
            self._objects.pop(number, None)
        action, path = body["action"], body["path"]
        args = [self._decode(value) for value in body["args"]]
        kwargs = {key: self._decode(value) for key, value in body["kwargs"].items()}
        if action in ("exists", "has"):
            try:
                self._find(body["what"], path)
            except (AttributeError, KeyError, IndexError, ImportError):
                return {"value": False}
            return {"value": True}
        if action == "set":
            owner, _, last = path.rpartition(".")
            setattr(self._find(body["what"], owner), last, args[0])
            return {"value": None}
        found = self._find(body["what"], path)
        if action == "get":
            return {"value": self._encode(found)}
        if action == "call":
            return {"value": self._encode(found(*args, **kwargs))}
        if action == "type":
            kind = found if inspect.isclass(found) else type(found)
            return {"value": [base.__name__ for base in kind.__mro__]}
        if action == "mapping":
            return {"value": {"$dict": [[str(key), self._encode(item)] for key, item in found.items()]}}
        if action == "signature":
            return {"value": [self._parameter(item) for item in _parameters(found)]}
        raise ValueError(f"unknown action {action!r}")

    def _find(self, what: Any, path: str) -> Any:
        if isinstance(what, dict):
            found = self._objects[what["$handle"]]
        elif ":" in what:
            module, _, rest = what.partition(":")
            found = importlib.import_module(module)
            path = f"{rest}.{path}" if path else rest
        else:
            first, _, rest = what.partition(".")
            found = self._library.resolve(first)
            path = ".".join(filter(None, (rest, path)))
        for part in filter(None, path.split(".")):
            try:
                found = getattr(found, part)
            except AttributeError:
                if isinstance(found, Mapping) or hasattr(found, "keys"):
                    found = found[part]
                elif part.lstrip("-").isdigit():
                    found = found[int(part)]
                else:
                    raise
        return found

    def _decode(self, value: Any) -> Any:
        if isinstance(value, dict):
            if "$handle" in value:
                return self._objects[value["$handle"]]
            if "$tensor" in value:
                return self._library.from_array(value["$tensor"], value["dtype"])
            if "$image" in value:
                return _image(value["$image"], value["mode"])
            if "$tuple" in value:
                return tuple(self._decode(item) for item in value["$tuple"])
            return {key: self._decode(item) for key, item in value["$dict"]}
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, np.ndarray):
            return value.copy()  # what arrives is read-only
        return value

    def _encode(self, value: Any) -> Any:
        if isinstance(value, float) and not np.isfinite(value):
            return {"$float": str(value)}
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, np.generic):
            return self._encode(value.item())
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return value
        if type(value) is tuple:
            return {"$tuple": [self._encode(item) for item in value]}
        if type(value) is list:
            return [self._encode(item) for item in value]
        if type(value) is dict and all(isinstance(key, (str, int)) for key in value):
            return {"$dict": [[key, self._encode(item)] for key, item in value.items()]}
        array = self._library.to_array(value)
        if array is not None:
            return array
        self._next += 1
        self._objects[self._next] = value
        kind = value if inspect.isclass(value) else type(value)
        return {
            "$handle": self._next,
            "type": kind.__name__,
            "bases": [base.__name__ for base in kind.__mro__],
        }

    def _parameter(self, item: inspect.Parameter) -> dict[str, Any]:
        required = item.default is inspect.Parameter.empty
        default = None if required else item.default
        if not (default is None or isinstance(default, (bool, int, float, str))):
            default = repr(default)
        fields = {"name": item.name, "kind": item.kind.name, "required": required, "default": self._encode(default)}
        return {"$dict": list(fields.items())}


def _parameters(found: Any) -> list[inspect.Parameter]:
    items = list(inspect.signature(found).parameters.values())
    return items[1:] if items and items[0].name == "self" else items


def _image(source: Any, mode: str | None) -> Any:
    pil = importlib.import_module("PIL.Image")  # only where a library with images is installed
    image = pil.fromarray(source) if isinstance(source, np.ndarray) else pil.open(source)
    image.load()
    return image.convert(mode) if mode and image.mode != mode else image


def raised(error: Mapping[str, Any]) -> TargetRaised:
    """The client's exception for an exception in the worker."""
    return TargetRaised(error["type"], error["message"], tuple(error["bases"]), error.get("trace", ""))
