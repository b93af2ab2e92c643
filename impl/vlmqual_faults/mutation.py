"""Which automatic mutants a function has: small changes of its source, one at a time.

Left alone are annotations, defaults, decorators, f-strings, asserts, everything in a `raise`, conditions that lead to
nothing but a `raise`, functions that do nothing but refuse, calls of these, `isinstance`, and every expression that was
never evaluated.
"""

from __future__ import annotations

import ast
import copy
import dis
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any

from vlmqual_faults.surgery import PACKAGE, SurgeryError, exchange, source, tree

#: First and last line and column (in bytes) of a piece of source, as the interpreter counts them.
Span = tuple[int, int, int, int]

_ARITHMETIC: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: Mapping[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_PAIRS = (
    *(("sin", "cos"), ("min", "max"), ("mean", "sum"), ("floor", "ceil"), ("minimum", "maximum"), ("any", "all")),
    *(("zeros", "ones"), ("zeros_like", "ones_like"), ("argmax", "argmin"), ("amax", "amin"), ("tril", "triu")),
)
_FUNCTIONS: Mapping[str, str] = {
    **dict(_PAIRS),
    **{after: before for before, after in _PAIRS},
    "round": "floor",
    "rsqrt": "sqrt",
    "sqrt": "square",
    "sigmoid": "tanh",
    "tanh": "sigmoid",
    "double": "float",
    "float": "bfloat16",
}
_DTYPES: Mapping[str, str] = {"float32": "bfloat16", "float64": "float32", "float16": "bfloat16"}
_SMALL = 1e-2
#: Functions whose first two arguments may be swapped and nothing happens.
_SYMMETRIC = ("transpose", "swapaxes", "min", "max", "minimum", "maximum", "promote_types", "equal")


@dataclass(frozen=True)
class Mutant:
    """One change of one function.

    Attributes:
        where: "module:Class.method" or "module:function", module below `vlmqual_impl`.
        operator: what is done, for example "add-to-sub".
        number: counts the places of this operator in the function, from 1.
        line: of the place, now.
        old: what stands there, normalised.
        new: what shall stand there, normalised.
        text: the module's whole source with the change.
        first: line on which the function begins.
    """

    where: str
    operator: str
    number: int
    line: int
    old: str
    new: str
    text: str
    first: int

    @property
    def id(self) -> str:
        """By which it is found again as long as the function keeps its places of this operator."""
        return f"{self.where}:{self.operator}:{self.number}"

    def make(self) -> Callable[[], None]:
        """Put it into the running process; what is returned takes it back.

        Raises:
            SurgeryError: it cannot be put in.
        """
        name, _, path = self.where.partition(":")
        return exchange(import_module(f"{PACKAGE}.{name}"), path, self.first, self.text)


def find(name: str) -> Mutant:
    """The mutant of an id.

    Raises:
        SurgeryError: there is none.
    """
    where = name.rpartition(":")[0].rpartition(":")[0]
    module, _, path = where.partition(":")
    try:
        found = functions(import_module(f"{PACKAGE}.{module}")) if path else {}
    except ImportError as error:
        raise SurgeryError(f"mutant {name!r}: {error}") from error
    for each in mutants(module, path) if path in found else ():
        if each.id == name:
            return each
    raise SurgeryError(f"there is no mutant {name!r}; an id is module:Class.method:operator:number")


def functions(module: ModuleType) -> dict[str, ast.FunctionDef]:
    """Definitions of a module's functions and methods by their path, as far as they can be exchanged."""
    found: dict[str, ast.FunctionDef] = {}

    def collect(body: list[ast.stmt], owner: Any, prefix: str) -> None:
        for node in body:
            inner = inspect.getattr_static(owner, getattr(node, "name", ""), None)
            if isinstance(node, ast.ClassDef) and isinstance(inner, type):
                collect(node.body, inner, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and _first(node) == _line(inner):
                found[f"{prefix}{node.name}"] = node

    collect(tree(module).body, module, "")
    return found


def _first(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def _line(found: Any) -> int:
    """First line of what a name stands for, 0 where it is no function."""
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(found) if callable(found) else found
    return found.__code__.co_firstlineno if isinstance(found, FunctionType) else 0


def mutants(module: str, path: str, reached: frozenset[Span] | None = None) -> list[Mutant]:
    """The mutants of a function in the order of its source.

    Args:
        module: below `vlmqual_impl`.
        path: "Class.method" or "function".
        reached: pieces of the module that were evaluated; None for all.
    """
    loaded = import_module(f"{PACKAGE}.{module}")
    node, lines = functions(loaded)[path], source(loaded)
    known = compiled(loaded) if reached is not None else frozenset()
    counts: Counter[str] = Counter()
    found = []
    for place, operator, new, shown in [] if _refuses(node) else _Walk(node).changes:
        counts[operator] += 1
        if reached is not None and not _evaluated(place, known, reached):
            continue
        after = ast.unparse(_with(shown, place, new))
        before = ast.unparse(shown)
        text = _edited(lines, place, "pass" if isinstance(new, ast.Pass) else f"({ast.unparse(new)})")
        try:
            compile(text, module, "exec", dont_inherit=True)
        except SyntaxError:
            continue
        found.append(
            Mutant(f"{module}:{path}", operator, counts[operator], place.lineno, before, after, text, _first(node))
        )
    return found


def _refuses(node: ast.FunctionDef) -> bool:
    """Whether a function gives nothing and keeps nothing, so that all it can do is to refuse."""
    if node.name.lstrip("_").startswith(("check_", "require", "refuse")) or node.name in ("check", "_check"):
        return not any(isinstance(each, ast.Return) and each.value is not None for each in ast.walk(node))
    parts = list(ast.walk(node))
    keeps = any(isinstance(each, ast.Attribute | ast.Subscript) and isinstance(each.ctx, ast.Store) for each in parts)
    gives = any(isinstance(each, ast.Yield) or (isinstance(each, ast.Return) and each.value) for each in parts)
    raises = any(isinstance(each, ast.Raise) or _called(each) == "_refuse" for each in parts)
    return raises and not keeps and not gives and node.name != "__init__"


def _called(node: ast.AST) -> str:
    """Name of the function or method that is called, "" where nothing is called by name."""
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _edited(lines: list[str], place: ast.AST, new: str) -> str:
    """The source with a piece of it replaced."""
    first, last, left, right = _span(place)
    before = lines[first - 1].encode()[:left].decode()
    after = lines[last - 1].encode()[right:].decode()
    return "\n".join([*lines[: first - 1], before + new + after, *lines[last:]])


def _with(whole: ast.AST, place: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of a tree in which one node is another."""
    if whole is place:
        return new

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if (type(node), _span(node)) == (type(place), _span(place)) else self.generic_visit(node)

    return ast.fix_missing_locations(Put().visit(copy.deepcopy(whole)))


def _span(node: Any) -> Span:
    if not hasattr(node, "lineno"):
        return (0, 0, 0, 0)
    return (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)


# what was evaluated ---------------------------------------------------------------------------------------------------


@cache
def compiled(module: ModuleType) -> frozenset[Span]:
    """Every piece of a module's source for which there is an instruction."""
    code = compile("\n".join(source(module)), module.__name__, "exec", dont_inherit=True)
    found: set[Span] = set()

    def collect(code: CodeType) -> None:
        found.update(span for span in positions(code) if span)
        for each in code.co_consts:
            if isinstance(each, CodeType):
                collect(each)

    collect(code)
    return frozenset(found)


def positions(code: CodeType) -> list[Span | None]:
    """For every instruction (two bytes each) the piece of source that it belongs to."""
    found: list[Span | None] = []
    for first, last, left, right in code.co_positions():
        if first is None or last is None or left is None or right is None:
            found.append(None)
        else:
            found.append((first, last, left, right))
    for entry in dis.get_instructions(code):
        if entry.opname in ("RESUME", "COPY_FREE_VARS", "MAKE_CELL", "RETURN_GENERATOR"):
            found[entry.offset // 2] = None  # of no expression
    return found


def _evaluated(node: ast.AST, known: frozenset[Span], reached: frozenset[Span]) -> bool:
    """Whether an instruction of this piece was executed; of a constant that was folded, one of what is around it."""
    span = _span(node)
    if any(_within(each, span) for each in reached):
        return True
    if any(_within(each, span) for each in known):
        return False
    around = [each for each in known if _within(span, each)]
    return bool(around) and min(around, key=_size) in reached


def _within(inner: Span, outer: Span) -> bool:
    return (outer[0], outer[2]) <= (inner[0], inner[2]) and (inner[1], inner[3]) <= (outer[1], outer[3])


def _size(span: Span) -> tuple[int, int]:
    return span[1] - span[0], span[3] - span[2]


# what is changed ------------------------------------------------------------------------------------------------------

_Made = tuple[Any, str, ast.AST, ast.AST]


class _Walk:
    """The changes of a function: the node, the operator, what replaces it, and the node that is shown around it."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.changes: list[_Made] = []
        for statement in function.body:
            self._visit(statement, ())
        self.changes.sort(key=lambda made: _span(made[0]))

    def _visit(self, node: ast.AST, parents: tuple[ast.AST, ...]) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            return
        self.changes += [(place, name, new, _shown(place, node, parents)) for place, name, new in _of(node)]
        for child in _inside(node):
            self._visit(child, (*parents, node))


def _shown(place: ast.AST, node: ast.AST, parents: tuple[ast.AST, ...]) -> ast.AST:
    """What a reader needs to see of the place: more than a bare number, name or end of a slice."""
    bare = isinstance(node, ast.Constant | ast.UnaryOp | ast.Name | ast.Attribute | ast.Slice)
    if place is not node or isinstance(node, ast.stmt) or not bare or not parents or _has_body(parents[-1]):
        return node
    if isinstance(parents[-1], ast.Slice | ast.Tuple) and isinstance(parents[-2], ast.expr):
        return parents[-2] if isinstance(parents[-2], ast.Subscript) else parents[-1]
    return parents[-1]


def _has_body(node: ast.AST) -> bool:
    return isinstance(getattr(node, "body", None), list)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that may be changed."""
    if isinstance(node, ast.If) and all(isinstance(each, ast.Raise) for each in node.body):
        yield from node.orelse
        return
    if isinstance(node, ast.AnnAssign):
        yield from filter(None, [node.value])
        return
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        yield from node.body if isinstance(node.body, list) else [node.body]
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return  # a negative number
    for child in ast.iter_child_nodes(node):
        yield child.value if isinstance(child, ast.keyword) else child


def _of(node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """The changes of one node itself: the place, the operator and what replaces it."""
    match node:
        case ast.BinOp(left, operation, right) if type(operation) in _ARITHMETIC and not _text(left, right):
            other = _ARITHMETIC[type(operation)]
            yield node, f"{_word(operation)}-to-{_word(other())}", ast.BinOp(left, other(), right)
        case ast.Compare(left, [operation], [right]):
            for kind in _COMPARISONS[type(operation)]:
                yield node, f"{_word(operation)}-to-{_word(kind())}", ast.Compare(left, [kind()], [right])
        case ast.BoolOp(ast.And(), values):
            yield node, "and-to-or", ast.BoolOp(ast.Or(), values)
        case ast.BoolOp(ast.Or(), values):
            yield node, "or-to-and", ast.BoolOp(ast.And(), values)
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if isinstance(value, int | float):
            yield from _numbers(node, -value)
        case ast.UnaryOp(operation, operand) if not isinstance(operation, ast.UAdd):
            yield node, f"{_word(operation)}-dropped", operand
        case ast.Constant(value):
            yield from _numbers(node, value)
        case ast.Subscript(_, ast.Slice() as part):
            yield from _slices(part)
        case ast.Subscript(_, ast.Tuple(parts)):
            for each in parts:
                if isinstance(each, ast.Slice):
                    yield from _slices(each)
        case ast.Call(function, arguments):
            yield from _calls(node, function, arguments)
        case ast.Attribute(value, name) if name in _DTYPES and isinstance(value, ast.Name):
            yield node, "dtype", ast.Attribute(value, _DTYPES[name])
        case ast.Assign([ast.Name(name)], value) if any(_is(each, name) for each in ast.walk(value)):
            yield node, "assignment-dropped", ast.Pass()
        case ast.AugAssign():
            yield node, "assignment-dropped", ast.Pass()
        case ast.Expr(ast.Call() as call) if not _called(call).lstrip("_").startswith(("check", "require", "refuse")):
            yield node, "call-dropped", ast.Pass()


def _text(*sides: ast.AST) -> bool:
    """Whether a side is a text or a list, which arithmetic does not change but refuse."""
    return any(
        isinstance(side, ast.JoinedStr | ast.List | ast.Tuple)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def _numbers(node: ast.AST, value: object) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    if isinstance(value, bool):
        yield node, "truth", ast.Constant(not value)
    elif isinstance(value, int):
        yield node, "one-more", _constant(value + 1)
        if value:
            yield node, "one-less", _constant(value - 1)
    elif isinstance(value, float):
        small = 0 < abs(value) < _SMALL
        yield node, "ten-fold" if small else "two-fold", _constant(value * (10 if small else 2) if value else 1.0)


def _constant(value: int | float) -> ast.expr:
    return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)


def _slices(part: ast.Slice) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """One element less at an end that is no plain number; numbers have changes of their own."""
    if part.lower is not None and not _number(part.lower):
        yield part.lower, "slice-later", ast.BinOp(part.lower, ast.Add(), ast.Constant(1))
    if part.upper is not None and not _number(part.upper):
        yield part.upper, "slice-shorter", ast.BinOp(part.upper, ast.Sub(), ast.Constant(1))


def _number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant))


def _calls(node: ast.Call, function: ast.expr, arguments: list[ast.expr]) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    match function:
        case ast.Attribute(value, name) if name in _FUNCTIONS:
            yield function, f"{name}-to-{_FUNCTIONS[name]}", ast.Attribute(value, _FUNCTIONS[name])
        case ast.Name("min" | "max" | "any" | "all" as name):
            yield function, f"{name}-to-{_FUNCTIONS[name]}", ast.Name(_FUNCTIONS[name])
    pairs = enumerate(pairwise(arguments))
    for at, (one, two) in pairs if _called(node) not in _SYMMETRIC else ():
        if type(one) is type(two) and _plain(one) and ast.dump(one) != ast.dump(two):
            swapped = [*arguments[:at], two, one, *arguments[at + 2 :]]
            yield node, "arguments-swapped", ast.Call(function, swapped, node.keywords)


def _plain(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) or (_number(node) and not _text(node))


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _word(operation: ast.AST) -> str:
    return type(operation).__name__.lower()
