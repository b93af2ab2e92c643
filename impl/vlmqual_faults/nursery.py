"""Workers that need not import anything: one process imports what they need, and each of them is a copy of it.

A proof starts a few hundred workers, and most of the time of a short one goes into importing torch. `Nursery.python`
stands where the interpreter of a target's environment may be named; what is started by it is a stand-in of a few lines
that hands its standard streams to a copy of the process that has imported everything, and ends as that does. When the
stand-in is killed the copy ends as well.
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
from typing import Any, Self

from vlmqual_faults.surgery import PACKAGE, source

#: Beside what these import themselves.
_MODULES = (
    "vlmqual_contract.worker",
    "vlmqual_faults.target",
    "vlmqual_impl.api.auto",
    "vlmqual_impl.runtime.eager",
    "vlmqual_impl.families",
    "torch.distributed",
    "transformers.models.auto.tokenization_auto",
)
_STAND_IN = """#!{python} -IS
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({path!r})
socket.send_fds(link, [json.dumps([sys.argv[4:], dict(os.environ), os.getcwd()]).encode() + b"\\n"], [0, 1, 2])
for number in (0, 1):
    os.close(number)
code = link.recv(8)
os._exit(int(code) if code else 1)
"""


class Nursery:
    """Holds the process that workers are copies of.

    Attributes:
        python: path that stands for an interpreter.
    """

    def __init__(self) -> None:
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
            [sys.executable, "-m", "vlmqual_faults.nursery", str(number)],
            pass_fds=(number,),
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
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


def serve(listener: socket.socket) -> None:
    """Import, then make a copy of this process for every stand-in that asks, until the proof is over."""
    for name in _MODULES:
        import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}."):
            source(module)  # of what is loaded now, whatever is edited later
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become(link)
        link.close()


def _become(link: socket.socket) -> None:
    """Be the worker that a stand-in asked for, then end."""
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
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # the stream, not a file
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        threading.Thread(target=_end_with, args=(link,), daemon=True).start()
        sys.argv = ["worker", *arguments]
        worker: Any = import_module("vlmqual_contract.worker")
        code = int(worker.main())
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        with contextlib.suppress(OSError):
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
    serve(socket.socket(fileno=int(sys.argv[1])))
