"""Changing a function of the bundled implementation in a running process, by changing its source.

A change is a place, what stands there and what shall stand there instead. It is refused when the place does not say
what was expected, so that a fault never goes missing when the code under it moves. Everything that already holds the
function keeps holding the changed one: only its code object is exchanged.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any

PACKAGE = "vlmqual_impl"


class SurgeryError(ValueError):
    """A change that cannot be made; names the place."""


@dataclass(frozen=True)
class Change:
    """A change of one place.

    Attributes:
        where: "module:Class.method", "module:function" or "module:NAME" (a constant), module below `vlmqual_impl`.
        old: what stands there, exactly once; of a constant, its value as an expression, "" for any.
        new: what shall stand there; of a constant, an expression that may use `old` and the module's names.
    """

    where: str
    old: str
    new: str


@contextmanager
def changed(*changes: Change) -> Iterator[None]:
    """Make changes, and take them back.

    Raises:
        SurgeryError: a place does not exist, or does not say what is expected.
    """
    undo: list[Callable[[], None]] = []
    try:
        for change in changes:
            undo.append(make(change))
        yield
    finally:
        for back in reversed(undo):
            back()


def make(change: Change) -> Callable[[], None]:
    """Make a change; what is returned takes it back.

    Raises:
        SurgeryError: see `changed`.
    """
    module, path = _module(change.where)
    found: Any = module
    for part in path.split("."):
        found = inspect.getattr_static(found, part, None)
    if found is None:
        raise SurgeryError(f"{change.where} does not exist")
    function = _function(found)
    if function is None:
        return _constant(module, path, change, found)
    lines, start = source(module), _first_line(function)
    node = _node(module, path, start)
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    text = "\n".join(lines[first:last])
    if text.count(change.old) != 1:
        raise SurgeryError(f"{change.where} has {text.count(change.old)} times {change.old!r}, not once")
    body = text.replace(change.old, change.new)
    return exchange(module, path, start, "\n".join([*lines[:first], *body.split("\n"), *lines[last:]]))


def exchange(module: ModuleType, path: str, line: int, source: str) -> Callable[[], None]:
    """Give a function the code that it has in another source of its module; what is returned takes it back.

    Raises:
        SurgeryError: the source cannot be compiled, or the function sees other names around it.
    """
    found: Any = module
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    function = _function(found)
    assert function is not None, f"{path} is no function"
    try:
        code: CodeType | None = compile(source, module.__file__ or "", "exec", dont_inherit=True)
    except SyntaxError as error:
        raise SurgeryError(f"{module.__name__}:{path}: what was put in does not compile: {error}") from error
    for part in path.split("."):
        inner = [each for each in (code.co_consts if code else ()) if isinstance(each, CodeType)]
        code = next((each for each in inner if each.co_name == part and _near(each, part, path, line)), None)
    if code is None or code.co_freevars != function.__code__.co_freevars:
        raise SurgeryError(f"{module.__name__}:{path}: the changed function sees other names around it")
    before = function.__code__
    function.__code__ = code

    def back() -> None:
        function.__code__ = before

    return back


def _near(code: CodeType, part: str, path: str, line: int) -> bool:
    """Of several functions of one name (a property's parts) the one that begins where the old one did."""
    return part != path.rpartition(".")[2] or code.co_firstlineno == line


def _constant(module: ModuleType, path: str, change: Change, found: Any) -> Callable[[], None]:
    owner: Any = module
    parent, _, name = path.rpartition(".")
    for part in filter(None, parent.split(".")):
        owner = getattr(owner, part)
    space = {**vars(module), "old": found}
    if change.old and eval(change.old, space) != found:
        raise SurgeryError(f"{change.where} is {found!r}, not {change.old}")
    setattr(owner, name, eval(change.new, space))

    def back() -> None:
        setattr(owner, name, found)

    return back


def _module(where: str) -> tuple[ModuleType, str]:
    name, colon, path = where.partition(":")
    if not colon or not path:
        raise SurgeryError(f"{where!r} names no place; a place is module:Class.method")
    try:
        return import_module(f"{PACKAGE}.{name}"), path
    except ImportError as error:
        raise SurgeryError(f"{where}: {error}") from error


def _function(found: Any) -> FunctionType | None:
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(found) if callable(found) else found
    return found if isinstance(found, FunctionType) else None


def _first_line(function: FunctionType) -> int:
    return function.__code__.co_firstlineno


@cache
def source(module: ModuleType) -> list[str]:
    """The module's lines, as they are when this is asked for the first time."""
    return inspect.getsource(module).split("\n")


@cache
def tree(module: ModuleType) -> ast.Module:
    """The module's source as a tree."""
    return ast.parse("\n".join(source(module)))


def _node(module: ModuleType, path: str, line: int) -> ast.FunctionDef:
    """The definition of a function, by its name and first line (that of its first decorator)."""
    name = path.rpartition(".")[2]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            if start == line:
                return node
    raise SurgeryError(f"{module.__name__}:{path} cannot be found in its source")
