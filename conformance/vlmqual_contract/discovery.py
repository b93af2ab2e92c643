"""From names to objects: target strings, libraries and commands, found through entry points.

A target string is `kind[:key=value,...]`, for example `eager:device=cpu,dtype=bfloat16`, or
`path/to/adapter.py:MyTarget[:key=value,...]` for a target that is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any, cast

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Library, Target

TARGETS = "vlmqual.targets"
LIBRARIES = "vlmqual.libraries"
COMMANDS = "vlmqual.commands"
REQUIREMENTS = "vlmqual.requirements"


def suite_version() -> str:
    """Version of the installed `vlmqual` distribution."""
    return version("vlmqual")


def installed(group: str) -> dict[str, EntryPoint]:
    """Names of one entry point group to their entry points, sorted by name."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


@dataclass(frozen=True)
class TargetString:
    """A parsed target string.

    Attributes:
        kind: name of an entry point, or "" for a target from a file.
        file: path of a Python file, or "".
        name: name of the target in that file, or "".
        options: keyword arguments of the target's factory.
    """

    kind: str
    file: str = ""
    name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


def parse(text: str) -> TargetString:
    """Take a target string apart.

    Raises:
        UsageError: it does not have the form of a target string.
    """
    file, mark, rest = text.rpartition(".py:")
    if mark:
        name, _, options = rest.partition(":")
        return TargetString("", file + ".py", name, _options(options, text))
    kind, _, options = text.partition(":")
    if not kind:
        raise UsageError(f"target {text!r} has no kind; a target string is kind[:key=value,...]")
    return TargetString(kind, options=_options(options, text))


def _options(text: str, whole: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, mark, value = part.partition("=")
        if not mark or not key.isidentifier():
            raise UsageError(f"target {whole!r}: {part!r} is no key=value")
        if key in found:
            raise UsageError(f"target {whole!r}: {key} is given twice")
        found[key] = value
    return found


def origin(group: str, name: str) -> str:
    """Where an installed name comes from, as `NAME=module:object`; "" for one that is not installed here.

    A worker in another environment, where our packages are only on the path, is told so.
    """
    points = installed(group)
    return f"{name}={points[name].value}" if name in points else ""


def code_digest(text: str) -> str:
    """SHA-256 over the code behind a target string or a library's name: two runs of different code are two runs.

    That is the adapter's file, or every Python file of the top-level package that the entry point names. "" for what is
    not installed here.
    """
    spec = parse(text)
    if spec.file:
        files = [Path(spec.file)]
    else:
        points = {**installed(LIBRARIES), **installed(TARGETS)}
        if spec.kind not in points:
            return ""
        found = importlib.util.find_spec(points[spec.kind].module.split(".")[0])
        places = (found.submodule_search_locations or []) if found is not None else []
        files = sorted(path for place in places for path in Path(place).rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def make_target(text: str, origins: Mapping[str, str] | None = None) -> Target:
    """The target that a target string names.

    Args:
        text: target string.
        origins: names to `module:object` for kinds that are not installed in this environment.

    Raises:
        UsageError: unknown kind, missing file or name, keyword that the target does not know, or an import that fails.
    """
    spec = parse(text)
    factory: Callable[..., Target]
    if spec.file:
        factory = _from_file(spec)
    else:
        points = _points(TARGETS, origins)
        if spec.kind not in points:
            raise UsageError(
                f"target {spec.kind!r} is not installed; installed are {', '.join(points) or 'none'}; "
                "a target from a file is written path/to/adapter.py:Name"
            )
        factory = _load(points[spec.kind])
    return factory(**_bound(factory, spec, f"target {text!r}"))


def make_library(text: str, origins: Mapping[str, str] | None = None) -> Library:
    """The library subject that a string names, with options as a target string has them.

    Args:
        text: name of the library, as in `transformers`, or `name:key=value,...`.
        origins: see `make_target`.

    Raises:
        UsageError: it is not installed, or does not know an option.
    """
    points = _points(LIBRARIES, origins)
    spec = parse(text)
    if spec.file or spec.kind not in points:
        raise UsageError(f"library {text!r} is not installed; installed are {', '.join(points) or 'none'}")
    factory: Callable[..., Library] = _load(points[spec.kind])
    return factory(**_bound(factory, spec, f"library {text!r}"))


def _bound(factory: Callable[..., object], spec: TargetString, name: str) -> Mapping[str, str]:
    """The options, looked at before the factory is called.

    Raises:
        UsageError: the factory does not know one of them.
    """
    try:
        inspect.signature(factory).bind(**spec.options)
    except TypeError as error:
        known = [key for key in inspect.signature(factory).parameters if key != "self"]
        raise UsageError(f"{name}: {error}; it knows {', '.join(known) or 'no options'}") from error
    return spec.options


def _points(group: str, origins: Mapping[str, str] | None) -> dict[str, EntryPoint]:
    told = {name: EntryPoint(name, value, group) for name, value in (origins or {}).items()}
    return {**told, **installed(group)}


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except ImportError as error:
        raise UsageError(f"{point.group} {point.name}: {error}; install the extra that it needs") from error


def _from_file(spec: TargetString) -> Callable[..., Target]:
    path = Path(spec.file)
    if not path.is_file():
        raise UsageError(f"target file {spec.file} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"vlmqual_adapter_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"target file {spec.file} cannot be imported")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # a user's file can raise anything; it is named with its error
        raise UsageError(f"target file {spec.file}: {type(error).__name__}: {error}") from error
    if not hasattr(module, spec.name):
        public = sorted(name for name, item in vars(module).items() if inspect.isclass(item) and name[0] != "_")
        raise UsageError(f"target file {spec.file} has no {spec.name!r}; its classes are {', '.join(public) or 'none'}")
    return cast(Callable[..., Target], getattr(module, spec.name))
