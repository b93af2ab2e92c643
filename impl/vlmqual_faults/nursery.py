"""Processes that need not import anything: one process imports what they need, and each of them is a copy of it.

A proof starts a few hundred sessions of the suite and as many workers, and most of the time of a short one goes into
importing: torch on the one side, pytest and the whole suite on the other. `Nursery.python` stands where an interpreter
may be named; what is started by it is a stand-in of a few lines that hands its standard streams to a copy of the
process that has imported everything, and ends as that does. When the stand-in is killed the copy ends as well.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from vlmqual_faults.surgery import PACKAGE, source

#: "worker" and "bare" stand for an interpreter that starts `vlmqual_contract.worker`, with and without the bundled
#: implementation in memory, and "suite" for one that starts pytest.
Kind = Literal["worker", "bare", "suite"]
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
code = int(link.recv(8) or b"1")
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Nursery:
    """Holds the process of which others are copies.

    Attributes:
        python: path that stands for an interpreter.
    """

    def __init__(self, kind: Kind = "worker", workers: str = "") -> None:
        """Start it; what is asked of it before it has imported everything waits.

        Args:
            kind: what copies are to be.
            workers: path that stands for the interpreter of workers that copies start, "" for their own.
        """
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
            [sys.executable, "-m", "vlmqual_faults.nursery", kind, str(number), workers],
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
        self.end()
        self._folder.cleanup()

    def end(self) -> None:
        """End it and all copies; who waits for one of them hears that it failed."""
        with self._process:  # closes its input, which ends it, and waits
            pass


def serve(kind: str, listener: socket.socket, workers: str) -> None:
    """Import, then make a copy of this process for every stand-in that asks, until the proof is over."""
    links: dict[int, socket.socket] = {}
    threading.Thread(target=_end_with_standard_input, args=(links,), daemon=True).start()
    if kind == "suite":
        _load_suite()
    else:
        _load(_MODULES if kind == "worker" else _MODULES[:1])
    gc.collect()
    gc.freeze()  # copies leave the memory of what is loaded untouched, so they share it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the proof, which ends this process
    signal.signal(signal.SIGCHLD, lambda *_: _say_how_they_ended(links))
    while True:
        link, _ = listener.accept()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until the copy is known
        copy = os.fork()
        if copy == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            listener.close()
            for other in links.values():
                other.close()
            sys.executable = workers or sys.executable
            _become(link)
        links[copy] = link
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def _say_how_they_ended(links: dict[int, socket.socket]) -> None:
    """Tell the stand-ins of copies that have ended how they ended, as Python counts it: -9 is SIGKILL."""
    while links:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number == 0:
            return
        with links.pop(number) as link, contextlib.suppress(OSError):
            link.send(str(os.waitstatus_to_exitcode(status)).encode())


def _load(modules: Sequence[str]) -> None:
    for name in modules:
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


def _work(arguments: list[str]) -> int:
    """Do what an interpreter would: `-c CODE ...`, `-m pytest ...`, or `-m MODULE ...` of a module with a `main`."""
    said, what, *rest = arguments
    if said == "-c":
        sys.argv = ["-c", *rest]
        exec(what, {"__name__": "__main__"})
        return 0
    sys.argv = [what, *rest]
    module: Any = import_module(what)
    return int(module.main())


def _become(link: socket.socket) -> None:
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
        sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        threading.Thread(target=_end_with, args=(link,), daemon=True).start()
        code = _work(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end_with(link: socket.socket) -> None:
    """End this process when the stand-in is gone."""
    link.recv(1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _end_with_standard_input(copies: Collection[int]) -> None:
    """End this process and its copies, each the first of a session, when the proof is over or gone."""
    while os.read(0, 1):
        pass
    for number in tuple(copies):
        for end in (os.killpg, os.kill):  # one that was made just now is no first yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(number, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
