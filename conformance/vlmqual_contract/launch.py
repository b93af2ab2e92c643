"""Starting workers: their environment, their ranks, their time limits, and their end."""

from __future__ import annotations

import atexit
import contextlib
import math
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
from typing import IO, TYPE_CHECKING, Any

from vlmqual_contract.errors import (
    OutOfTime,
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

if TYPE_CHECKING:
    from vlmqual_contract.nodes import Nodes

#: Variables by which frameworks are told their number of compute threads.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
_LOG_TAIL = 2000
_GRACE_S = 3.0
_LOOK_S = 0.5
_LEAST_GRACE_S = 1.0
# Another interpreter finds our packages behind its own, so that nothing of ours hides what its environment pins.
_BOOTSTRAP = (
    "import os, sys; sys.path += sys.argv[1].split(os.pathsep); del sys.argv[1]; "
    "from vlmqual_contract.worker import main; sys.exit(main())"
)
_running: weakref.WeakSet[Worker] = weakref.WeakSet()


class Allowance:
    """Time that several requests may take together. What starts or opens a target stops its clock: that has limits.

    Attributes:
        grace_s: by how much the last request may outlast it, so that it ends by itself rather than with the target.
    """

    def __init__(self) -> None:
        self.grace_s = 0.0
        self._until = math.inf
        self._stopped: float | None = None

    def start(self, seconds: float | None) -> None:
        """Begin again with so many seconds; None is without end."""
        self.grace_s = 0.0 if seconds is None else max(_LEAST_GRACE_S, seconds / 10)
        self._until = math.inf if seconds is None else time.monotonic() + seconds
        self._stopped = None

    def stop(self) -> None:
        """Stop the clock until it is asked for what is left."""
        if self._stopped is None:
            self._stopped = time.monotonic()

    def left_s(self) -> float:
        """Seconds that are left; negative when more were taken."""
        now = time.monotonic()
        if self._stopped is not None:
            self._until += now - self._stopped
            self._stopped = None
        return self._until - now


@dataclass(frozen=True)
class Limits:
    """Seconds that a target may take.

    Attributes:
        start_s: from the start of its process to the first answer (importing a framework).
        open_s: loading a model.
        call_s: anything else.
        allowance: for all of these requests together, but for starting and loading.
    """

    start_s: float = 180.0
    open_s: float = 600.0
    call_s: float = 120.0
    allowance: Allowance | None = None

    def of(self, op: str) -> float:
        """The limit of one request.

        Raises:
            OutOfTime: the allowance is used up.
        """
        starting = {"describe": self.start_s, "library": self.start_s, "open": self.open_s}
        if self.allowance is None:
            return starting.get(op, self.call_s)
        if op in starting:
            self.allowance.stop()
            return starting[op]
        left_s = self.allowance.left_s()
        if left_s <= 0:
            raise OutOfTime("the time that was allowed is over")
        return min(self.call_s, left_s + self.allowance.grace_s)


class Worker:
    """One worker process and the pipe to it."""

    def __init__(self, arguments: Sequence[str], python: str | None, variables: Mapping[str, str]) -> None:
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
                env=environment(variables),
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
            raise self.crashed() from error
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
                if self.ended():  # a child of it may still hold the pipe
                    raise self.crashed()
                if time.monotonic() >= deadline:
                    raise Late("the time limit has passed")
            reply = self.channel.receive(deadline)
        except Closed as error:
            raise self.crashed() from error
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

    def ended(self) -> bool:
        """Whether the process is no more."""
        return self._process.poll() is not None

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
        if not self.ended():
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

    def crashed(self) -> TargetCrashed:
        """End it; what is known of its end."""
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
        nodes: Nodes | None = None,
    ) -> None:
        self.size = size
        self.limits = limits or Limits()
        port = _free_port()
        self._workers: list[Worker] = []
        try:
            for rank in range(size):
                ranks = {
                    "RANK": rank,
                    "LOCAL_RANK": rank if nodes is None else rank % nodes.ranks,
                    "WORLD_SIZE": size,
                    "MASTER_ADDR": "127.0.0.1" if nodes is None else nodes.host,
                    "MASTER_PORT": port,
                }
                variables = {key: str(value) for key, value in ranks.items()}
                if threads is not None:
                    variables |= dict.fromkeys(_THREADS, str(threads))
                far = None if nodes is None else nodes.worker(rank, arguments, variables)
                self._workers.append(far or Worker(arguments, python, variables))
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
            UsageError, Unsupported: what the target raised; ranks that all refuse as unsupported live on.
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

    def _gather(self, op: str, deadline: float, limit_s: float) -> list[dict[str, Any]]:
        replies: list[dict[str, Any]] = []
        failure: VlmqualError | None = None
        refused = 0
        for worker in self._workers:
            try:
                replies.append(worker.receive(op, deadline, limit_s))
            except VlmqualError as error:
                refused += isinstance(error, Unsupported)
                if failure is None or isinstance(failure, TargetHung):
                    failure = error
                deadline = min(deadline, time.monotonic() + _GRACE_S)  # the others may wait for the one that failed
        if failure is not None:
            if 1 < self.size != refused:
                self.kill()
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


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's variables and more, for a worker."""
    variables = {**os.environ, **extra}
    # Everything that a run reads is on disk; a hub that answers slowly must not decide what a verdict says.
    variables.setdefault("HF_HUB_OFFLINE", "1")
    variables.setdefault("TRANSFORMERS_OFFLINE", "1")
    return variables


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@atexit.register
def _kill_all() -> None:
    for worker in list(_running):
        worker.kill()
