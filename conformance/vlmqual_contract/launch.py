"""Starting workers: their environment, their ranks, their time limits, and their end."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlmqual_contract.errors import (
    TargetCrashed,
    TargetFailure,
    TargetHung,
    TargetMisspoke,
    Unsupported,
    UsageError,
    VlmqualError,
)
from vlmqual_contract.subject import raised
from vlmqual_contract.wire import Channel, Closed, Late

#: Variables by which frameworks are told their number of compute threads.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
_LOG_TAIL = 2000
_GRACE_S = 3.0
_LOOK_S = 0.5
# Another interpreter finds our packages behind its own, so that nothing of ours hides what its environment pins.
_BOOTSTRAP = (
    "import os, sys; sys.path += sys.argv[1].split(os.pathsep); del sys.argv[1]; "
    "from vlmqual_contract.worker import main; sys.exit(main())"
)
_running: weakref.WeakSet[Worker] = weakref.WeakSet()


@dataclass(frozen=True)
class Limits:
    """Seconds that a target may take.

    Attributes:
        start_s: from the start of its process to the first answer (importing a framework).
        open_s: loading a model.
        call_s: anything else.
    """

    start_s: float = 180.0
    open_s: float = 600.0
    call_s: float = 120.0

    def of(self, op: str) -> float:
        """The limit of one request."""
        return {"describe": self.start_s, "library": self.start_s, "open": self.open_s}.get(op, self.call_s)


class Worker:
    """One worker process and the pipe to it."""

    def __init__(self, arguments: Sequence[str], python: str | None, environment: Mapping[str, str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self._last_words = ""
        self._killed = False
        to_worker, from_us = os.pipe()
        from_worker, to_us = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*_interpreter(python), *arguments],
                stdin=to_worker,
                stdout=to_us,
                stderr=self._log,
                env=_environment(environment),
                start_new_session=True,  # Ctrl-C is for us; we end the worker
            )
        except OSError as error:
            for fd in (from_us, from_worker):
                os.close(fd)
            self._log.close()
            raise UsageError(f"Python interpreter {python}: {error.strerror or error}") from error
        finally:
            os.close(to_worker)
            os.close(to_us)
        self.channel = Channel(from_worker, from_us)
        _running.add(self)

    def send(self, body: Mapping[str, Any], deadline: float) -> None:
        """Send a request.

        Raises:
            TargetCrashed: the process has ended.
            TargetHung: it does not read.
        """
        try:
            self.channel.send(body, deadline)
        except Closed as error:
            raise self._crashed() from error
        except Late as error:
            self.kill()
            raise TargetHung(f"the target did not take {body['op']} within its time limit") from error

    def receive(self, op: str, deadline: float, limit_s: float) -> dict[str, Any]:
        """Receive the answer to a request.

        Raises:
            TargetCrashed: the process ended instead.
            TargetHung: no answer came before the deadline.
            TargetRaised, UsageError, Unsupported: what the target raised.
        """
        try:
            while not self.channel.readable(min(_LOOK_S, deadline - time.monotonic())):
                if self._process.poll() is not None:  # a child of it may still hold the pipe
                    raise self._crashed()
                if time.monotonic() >= deadline:
                    raise Late("the time limit has passed")
            reply = self.channel.receive(deadline)
        except Closed as error:
            raise self._crashed() from error
        except Late as error:
            self.kill()
            raise TargetHung(f"no answer to {op} within {limit_s:g} s") from error
        except TargetFailure:
            raise
        except VlmqualError as error:  # what is left in the pipe cannot be told from the next answer
            self.kill()
            raise TargetMisspoke(f"the answer to {op} cannot be read: {error}") from error
        if error_body := reply.get("error"):
            raise _error(error_body)
        return reply

    def kill(self) -> None:
        """End the process and everything that it started, now."""
        _running.discard(self)
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its session: children too, also after its own end
            self._process.wait()
        self.channel.close()
        if not self._log.closed:
            self._last_words = self._tail()
            self._log.close()

    def stop(self) -> None:
        """Ask the process to end; kill it when it does not."""
        if self._process.poll() is None:
            try:
                self.channel.send({"op": "stop"}, time.monotonic() + 1)
                self._process.wait(_GRACE_S)
            except (VlmqualError, subprocess.TimeoutExpired):
                pass
        self.kill()

    def log(self) -> str:
        """The end of what the process wrote to standard error."""
        return self._last_words if self._log.closed else self._tail()

    def _tail(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL))
        return self._log.read().decode("utf-8", "replace").strip()

    def _crashed(self) -> TargetCrashed:
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        how = f"exit status {code}"
        if code is not None and code < 0:
            known = {item.value: item.name for item in signal.Signals}
            how = f"signal {known.get(-code, -code)}"
        lines = self.log().splitlines()
        return TargetCrashed(f"the target's process ended ({how})" + (f": {lines[-1]}" if lines else ""))


class Group:
    """The ranks of one target, asked in lock-step; for most targets a single one.

    Attributes:
        size: number of processes.
        limits: time limits of a request.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        size: int = 1,
        python: str | None = None,
        threads: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.size = size
        self.limits = limits or Limits()
        port = _free_port()
        self._workers: list[Worker] = []
        try:
            for rank in range(size):
                ranks = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": size,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                environment = {key: str(value) for key, value in ranks.items()}
                if threads is not None:
                    environment |= dict.fromkeys(_THREADS, str(threads))
                self._workers.append(Worker(arguments, python, environment))
        except BaseException:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        """False once a rank crashed, hung, or was stopped."""
        return bool(self._workers)

    def request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask every rank; the answer of rank 0."""
        return self.request_all(body)[0]

    def request_all(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Ask every rank; all answers, rank 0's first. Ranks above 0 are told not to send arrays.

        Raises:
            TargetFailure: a rank failed; where there are several, all are ended, since the others may wait for it.
            UsageError, Unsupported: what the target raised.
        """
        if not self._workers:
            raise TargetCrashed("the target's process has ended before")
        limit_s = self.limits.of(body["op"])
        deadline = time.monotonic() + limit_s
        try:
            for rank, worker in enumerate(self._workers):
                worker.send(body if rank == 0 else {**body, "quiet": True}, deadline)
            return self._gather(body["op"], deadline, limit_s)
        except (TargetCrashed, TargetHung, TargetMisspoke, KeyboardInterrupt):
            self.kill()
            raise
        except VlmqualError:
            if self.size > 1:
                self.kill()
            raise

    def _gather(self, op: str, deadline: float, limit_s: float) -> list[dict[str, Any]]:
        replies: list[dict[str, Any]] = []
        failure: VlmqualError | None = None
        for worker in self._workers:
            try:
                replies.append(worker.receive(op, deadline, limit_s))
            except VlmqualError as error:
                if failure is None or isinstance(failure, TargetHung):
                    failure = error
                deadline = min(deadline, time.monotonic() + _GRACE_S)  # the others may wait for the one that failed
        if failure is not None:
            raise failure
        return replies

    def stop(self) -> None:
        """End all ranks in an orderly way."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def kill(self) -> None:
        """End all ranks now."""
        for worker in self._workers:
            worker.kill()
        self._workers = []


def _error(body: Mapping[str, Any]) -> VlmqualError:
    if body["kind"] == "usage":
        return UsageError(body["message"])
    if body["kind"] == "unsupported":
        return Unsupported(body["message"])
    return raised(body)


def _interpreter(python: str | None) -> list[str]:
    if python is None:
        return [sys.executable, "-m", "vlmqual_contract.worker"]
    here = Path(__file__).resolve().parents[1]
    beside = here.parent / "impl"  # in a checkout
    folders = [str(path) for path in (here, beside) if path.is_dir()]
    return [python, "-c", _BOOTSTRAP, os.pathsep.join(folders)]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    environment = {**os.environ, **extra}
    # Everything that a run reads is on disk; a hub that answers slowly must not decide what a verdict says.
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("TRANSFORMERS_OFFLINE", "1")
    return environment


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@atexit.register
def _kill_all() -> None:
    for worker in list(_running):
        worker.kill()
