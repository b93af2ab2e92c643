"""Makers of compiled forms that other processes can import."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmqual_impl.artifacts import Shelf
from vlmqual_impl.entries import Entry, Spec


def entry(tokens: int = 4, name: str = "") -> Entry:
    spec = Spec("x", (1, tokens), torch.float32)
    return Entry(name or f"text-s{tokens}", nn.Linear(tokens, 1), (spec,), (Spec("y", (1, 1), torch.float32),))


def write(text: str = "compiled") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.bin").write_text(text * 100, "utf-8")

    return make


def hang(shelf: Shelf) -> None:
    """Make something, and never come to the end of it."""

    def make(folder: Path) -> None:
        write()(folder)
        time.sleep(600)

    shelf.place(entry(), "engine 1", make)


def race(shelf: Shelf, number: int, start: Any, places: Any) -> None:
    """Make the same as others at the same time."""

    def make(folder: Path) -> None:
        start.wait()
        write(str(number))(folder)

    places.put((number, str(shelf.place(entry(), "engine 1", make))))
