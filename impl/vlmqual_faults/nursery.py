"""Processes that need not import anything: one process imports what they need, and each of them is a copy of it.

A proof starts a few hundred sessions of the suite and as many workers, and most of the time of a short one goes into
importing: torch on the one side, pytest and the whole suite on the other. `Nursery.python` stands where an interpreter
may be named; what is started by it is a stand-in of a few lines that hands its standard streams to a copy of the
process that has imported everything, and ends as that does. When the stand-in is killed the copy ends as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from vlmqual_faults.surgery import PACKAGE, source

#: "worker" stands for an interpreter that starts `vlmqual_contract.worker`, "suite" for one that starts pytest.
Kind = Literal["worker", "suite"]
#: What a worker needs, beside what these import themselves.
_MODULES = (
    "vlmqual_contract.worker",
    "vlmqual_faults.target",
    "vlmqual_impl.api.auto",
    "vlmqual_impl.runtime.eager",
    "vlmqual_impl.families",
    "torch.distributed",
    "torch._dynamo",  # as soon as an embedding is made on the device "meta"
    "transformers.models.auto.tokenization_auto",
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
_STAND_IN = """#!{python} -IS
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({path!r})
socket.send_fds(link, [json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode() + b"\\n"], [0, 1, 2])
for number in (0, 1):
    os.close(number)
code = link.recv(8)
os._exit(int(code) if code else 1)
"""


class Nursery:
    """Holds the process of which others are copies.

    Attributes:
        python: path that stands for an interpreter.
    """

    def __init__(self, kind: Kind = "worker") -> None:
        """Start it; what is asked of it before it has imported everything waits."""
        self._folder = tempfile.TemporaryDirectory(prefix="vlmqual-nursery-")
        folder = Path(self._folder.name)
        path = str(folder / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        stand_in = folder / "python"
        stand_in.write_text(_STAND_IN.format(python=sys.executable, path=path), "utf-8")
        stand_in.chmod(0o755)
        self.python = str(stand_in)
        number = self._listener.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlmqual_faults.nursery", kind, str(number)],
            pass_fds=(number,),
            stdin=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
        )
        self._listener.close()  # so that nobody waits for a process that has ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes its input and waits
            self._process.kill()
        self._folder.cleanup()


def serve(kind: str, listener: socket.socket) -> None:
    """Import, then make a copy of this process for every stand-in that asks, until the proof is over."""
    if kind == "suite":
        _load_suite()
    else:
        _load_worker()
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the proof, which ends this process
    while True:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _become(kind, link)
        link.close()


def _load_worker() -> None:
    for name in _MODULES:
        import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}."):
            source(module)  # of what is loaded now, whatever is edited later


def _load_suite() -> None:
    """Collect the whole suite once, and read its goldens and requirements; copies find them in memory."""
    from vlmqual_conformance import catalogue
    from vlmqual_conformance.goldens import goldens
    from vlmqual_contract.target import FAMILIES
    from vlmqual_faults.cases import collected

    collected()
    catalogue.requirements()
    for golden in (golden for family in FAMILIES for golden in goldens(family)):
        for name in golden.names:
            golden.array(name)


def _work(kind: str, arguments: list[str]) -> int:
    """What the interpreter would do: `-c CODE FOLDERS worker's arguments` or `-m pytest pytest's arguments`."""
    if kind == "suite":
        import pytest

        return int(pytest.main(arguments[2:]))
    sys.argv = ["worker", *arguments[3:]]
    worker: Any = import_module("vlmqual_contract.worker")
    return int(worker.main())


def _become(kind: str, link: socket.socket) -> None:
    """Be what a stand-in asked for, then end."""
    code = 1
    try:
        os.setsid()
        said, streams, _, _ = socket.recv_fds(link, 2**20, 3)
        while not said.endswith(b"\n"):
            said += link.recv(2**20)
        arguments, environment, directory = json.loads(said)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # the process reads it to its end
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        threading.Thread(target=_end_with, args=(link,), daemon=True).start()
        code = _work(kind, arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            link.send(str(code).encode())
        os._exit(code)


def _end_with(link: socket.socket) -> None:
    """End this process when the stand-in is gone."""
    link.recv(1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _end_with_standard_input() -> None:
    """End this process when the proof is gone."""
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
