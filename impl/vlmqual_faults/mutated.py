"""`mutant:id=ID`: the bundled implementation with one automatic mutant in it, as a target and as a library.

`mutant:trace=DIR`, without a mutant, notes what of the implementation is evaluated.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Info, Model, Options
from vlmqual_faults.mutation import Mutant, find, positions
from vlmqual_faults.surgery import PACKAGE, SurgeryError
from vlmqual_impl.target import EagerTarget
from vlmqual_impl.target_library import BundledLibrary
from vlmqual_impl.target_session import EagerSession


class MutantTarget:
    """See the module. A mutant stays in its process from the target's making to the end.

    Attributes:
        info: that of the bundled implementation under the name "mutant", with the change as its runtime.
    """

    info: Info

    def __init__(self, id: str = "", trace: str = "", threads: str | int = "") -> None:
        """Put the mutant in.

        Args:
            id: of the mutant, "" for none.
            trace: folder for notes of what was evaluated, "" for none.
            threads: CPU threads.

        Raises:
            UsageError: there is no such mutant.
        """
        self._plain = EagerTarget(threads=threads)
        about = "unchanged"
        if id:
            mutant = _put_in(id)
            about = f"{id}: {mutant.old} -> {mutant.new}"
        self._tracer = Tracer(Path(trace)) if trace else None
        info = self._plain.info
        self.info = replace(info, name="mutant", runtime=f"{info.runtime}, changed: {about}", library="")
        if self._tracer is not None:
            sys.settrace(self._tracer.called)

    @contextmanager
    def open(self, model: Model, options: Options) -> Iterator[EagerSession]:
        """See `EagerTarget.open`."""
        try:
            with self._plain.open(model, options) as session:
                yield session
        finally:
            if self._tracer is not None:
                self._tracer.write()

    def check(self, model: Model, options: Options) -> None:
        """See `EagerTarget.check`."""
        self._plain.check(model, options)

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """See `EagerTarget.probe`."""
        return self._plain.probe(name, shape, dtype)


class MutantLibrary(BundledLibrary):
    """`mutant:id=ID` as a library subject: the package `vlmqual_impl` with the mutant in it."""

    def __init__(self, id: str) -> None:
        """Put the mutant in.

        Raises:
            UsageError: there is no such mutant.
        """
        super().__init__()
        _put_in(id)


def _put_in(name: str) -> Mutant:
    try:
        mutant = find(name)
        mutant.make()
    except SurgeryError as error:
        raise UsageError(str(error)) from error
    return mutant


class Tracer:
    """Notes every instruction of `vlmqual_impl` that is executed in this thread.

    Args of the maker:
        folder: where `write` puts a file of this process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[CodeType, set[int]] = {}
        self._names: dict[str, str] = {}

    def called(self, frame: FrameType, event: str, argument: Any) -> Any:
        """A function begins."""
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(f"{PACKAGE}."):
            return None
        code = frame.f_code
        self._names[code.co_filename] = name.removeprefix(f"{PACKAGE}.")
        add = self._seen.setdefault(code, set()).add
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def executed(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "opcode":
                add(frame.f_lasti)
            return executed

        return executed

    def reached(self) -> dict[str, set[tuple[int, int, int, int]]]:
        """By module, the pieces of source that were evaluated."""
        found: dict[str, set[tuple[int, int, int, int]]] = {}
        for code, offsets in list(self._seen.items()):
            places = positions(code)
            spans = {span for offset in list(offsets) if (span := places[offset // 2])}
            found.setdefault(self._names[code.co_filename], set()).update(spans)
        return found

    def write(self) -> None:
        """Put everything that is known so far on disk."""
        found = {name: sorted(spans) for name, spans in self.reached().items()}
        path = self._folder / f"{os.getpid()}.json"
        path.with_suffix(".part").write_text(json.dumps(found), "utf-8")
        path.with_suffix(".part").replace(path)
