"""Results files with known content, and a small reader of the HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vlmqual_contract.records import Header, Measurement, Outcome, Verdict, Writer
from vlmqual_contract.requirement import Citation, Requirement
from vlmqual_reports.load import load
from vlmqual_reports.page import html, markdown, view
from vlmqual_reports.statements import Statements

NOW = datetime(2027, 1, 15, 12, 0, tzinfo=UTC)
_VOID = {"meta", "br", "hr", "img", "input", "link"}


@dataclass
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside, white space collapsed."""
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(parts).split())

    def walk(self) -> Iterator[Node]:
        """This element and everything inside, in order."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, css: str = "") -> list[Node]:
        """Every element of a tag inside, with a class where one is given."""
        return [
            node
            for node in self.walk()
            if node.tag == tag and (not css or css in node.attributes.get("class", "").split())
        ]

    def by_id(self, name: str) -> Node:
        """The element with this id."""
        found = [node for node in self.walk() if node.attributes.get("id") == name]
        assert len(found) == 1, f"the page has {len(found)} elements with id {name}, it needs exactly one"
        return found[0]

    def rows(self) -> list[list[str]]:
        """Texts of all table rows inside."""
        return [
            [cell.text for cell in row.children if isinstance(cell, Node) and cell.tag in ("td", "th")]
            for row in self.all("tr")
        ]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("page")
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(node)
        if tag not in _VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>: the page is not well-formed"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parse(text: str) -> Node:
    """Read a page; fails when its elements are not nested properly."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader._open) == 1, f"<{reader._open[-1].tag}> is never closed"
    return reader.root


class Book:
    """Writes results files into one directory and makes pages from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.statements = Statements()

    def header(self, kind: str = "conformance", subject: str = "eager:device=cpu", **changes: Any) -> Header:
        """A header with plausible content."""
        values: dict[str, Any] = {
            "kind": kind,
            "subject": subject,
            "suite": "0.1.0",
            "info": {"name": "eager", "version": "1.0", "device": "cpu", "dtype": "float32", "runtime": "torch eager"},
            "machine": {"host": "bench-07", "processor": "Some CPU", "cores": 8, "memory_bytes": 64 * 2**30},
            "command": f"vlmqual {kind} --target {subject}",
            "plan": {"families": ["idefics3"]},
            "started": "2027-01-10T08:00:00+00:00",
        }
        return Header(**{**values, **changes})

    def write(self, header: Header, rows: Sequence[Verdict | Measurement], *, finish: bool = True) -> Path:
        """Write a run; without `finish` it ends as if it had been killed after its last row."""
        writer = Writer(self.folder / f"{header.kind}-{header.run}.jsonl", header)
        for row in rows:
            writer.add(row)
        if finish:
            writer.finish()
        else:
            writer._file.close()
        return writer.path

    def page(self) -> Node:
        """The HTML page of everything that was written."""
        return parse(self.html())

    def html(self) -> str:
        """The HTML page as text."""
        return html(view(load([self.folder]), self.statements, NOW))

    def markdown(self) -> str:
        """The Markdown page."""
        return markdown(view(load([self.folder]), self.statements, NOW))


def verdict(
    case: str, outcome: str = "pass", requirements: Sequence[str] = ("IDEFICS3-IMG-001",), **more: Any
) -> Verdict:
    """A verdict of the images level, unless told otherwise."""
    values = {"family": "idefics3", "level": "images", **more}
    return Verdict(case, tuple(requirements), outcome=Outcome(outcome), **values)


def measurement(phase: str, values_s: Sequence[Sequence[float]], tp: int = 1, **more: Any) -> Measurement:
    """A measurement of the scenario one-photo, unless told otherwise."""
    values: dict[str, Any] = {
        "scenario": "one-photo",
        "family": "idefics3",
        "batch": 1,
        "dtype": "float32",
        "shape": {"images": 1, "image_tokens": 169, "prompt_tokens": 190},
        **more,
    }
    case = f"{values['scenario']}/{phase}/tp{tp}/b{values['batch']}"
    return Measurement(case, phase=phase, tp=tp, values_s=tuple(tuple(row) for row in values_s), **values)


def requirement(name: str, **changes: Any) -> Requirement:
    """A requirement of the images level, unless told otherwise."""
    made = Requirement(
        id=name,
        family="idefics3",
        level="images",
        keyword="MUST",
        subject="target",
        statement=f"The sentence of {name}.",
        citations=(Citation("a document", "1", "a section"),),
    )
    return replace(made, **changes)


@pytest.fixture
def book(tmp_path: Path) -> Book:
    folder = tmp_path / "results"
    folder.mkdir()
    return Book(folder)


@pytest.fixture
def make_verdict() -> Callable[..., Verdict]:
    return verdict


@pytest.fixture
def make_measurement() -> Callable[..., Measurement]:
    return measurement


@pytest.fixture
def make_requirement() -> Callable[..., Requirement]:
    return requirement


@pytest.fixture
def parse_page() -> Callable[[str], Node]:
    return parse


@pytest.fixture
def statements_of() -> Callable[[Mapping[str, Requirement]], Statements]:
    return lambda found: Statements(dict(found))
