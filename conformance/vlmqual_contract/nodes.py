"""Ranks on several machines. One of them, node 0, runs the command and drives all ranks; on each of the others
`vlmqual node` waits for it, starts the workers that it is told to, and hands each of them its connection.

The options are named as torchrun's. A connection is the worker's pipe: the same messages, over TCP. Paths of
checkpoints and images have to be the same on every machine. The id is a word that both ends have to know; nothing is
encrypted, so this belongs into a network of one's own, as torchrun does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlmqual_contract.discovery import suite_version
from vlmqual_contract.errors import EXIT_OK, TargetCrashed, UsageError, VlmqualError
from vlmqual_contract.launch import Worker, environment
from vlmqual_contract.wire import Channel, Closed, Late

_JOIN_S = 10.0
_LOOK_S = 0.2


@dataclass(frozen=True)
class Endpoint:
    """Where node 0 listens, and the word by which both ends know each other."""

    host: str
    port: int
    word: str

    @classmethod
    def parse(cls, text: str, word: str) -> Endpoint:
        """Of HOST:PORT.

        Raises:
            UsageError: it is something else.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"--rdzv-endpoint {text!r} is no HOST:PORT, for example 10.0.0.1:29400")
        return cls(host.strip("[]"), int(port), word)


class Nodes:
    """Node 0's end: connections of the other nodes, one for each rank that they can run.

    Args:
        endpoint: where to listen.
        count: nodes, this one included.
        ranks: of each node.
        wait_s: for a node to come.

    Raises:
        UsageError: it cannot listen there.
    """

    def __init__(self, endpoint: Endpoint, count: int, ranks: int, wait_s: float = 300.0) -> None:
        self.host = endpoint.host
        self.count = count
        self.ranks = ranks
        self._wait_s = wait_s
        self._word = endpoint.word
        self._free: dict[int, list[socket.socket]] = {}
        self._closed = False
        self._changed = threading.Condition()
        try:
            self._listener = socket.create_server((endpoint.host, endpoint.port))
        except OSError as error:
            place = f"{endpoint.host}:{endpoint.port}"
            raise UsageError(f"--rdzv-endpoint {place}: cannot listen there: {error.strerror or error}") from error
        threading.Thread(target=self._accept, daemon=True).start()

    def worker(self, rank: int, arguments: Sequence[str], variables: Mapping[str, str]) -> Worker | None:
        """Start a rank where it belongs; None for one of this node.

        Raises:
            UsageError: its node did not come, or there is none for it.
        """
        node = rank // self.ranks
        if node == 0:
            return None
        if node >= self.count:
            raise UsageError(f"rank {rank} has no place on {self.count} nodes of {self.ranks} ranks each")
        deadline = time.monotonic() + self._wait_s
        while True:
            with self._changed:
                arrived = self._changed.wait_for(lambda: self._free.get(node), deadline - time.monotonic())
                if not arrived:
                    raise UsageError(f"node {node} did not come within {self._wait_s:g} s; `vlmqual node` runs there?")
                connection = self._free[node].pop(0)
            channel = Channel(connection.fileno(), os.dup(connection.detach()))
            with contextlib.suppress(Closed, Late):  # it went away while it waited; another will come
                channel.send({"arguments": list(arguments), "environment": dict(variables)}, deadline)
                return FarWorker(channel, f"rank {rank} on node {node}")

    def close(self) -> None:
        """Let the other nodes go."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone does not wake the thread that waits there
        self._listener.close()
        with self._changed:
            self._closed = True
            for connection in [one for waiting in self._free.values() for one in waiting]:
                connection.close()
            self._free.clear()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        channel = Channel(os.dup(connection.fileno()), os.dup(connection.fileno()))
        try:
            said = channel.receive(time.monotonic() + _JOIN_S)
            refused = self._refused(said)
            channel.send({"refused": refused}, time.monotonic() + _JOIN_S)
        except VlmqualError:  # a stranger
            refused = "no greeting"
        finally:
            channel.close()
        with self._changed:
            if refused or self._closed:
                connection.close()
                return
            self._free.setdefault(int(said["node"]), []).append(connection)
            self._changed.notify_all()

    def _refused(self, said: Mapping[str, object]) -> str:
        if said.get("word") != self._word:
            return "the --rdzv-id differs"
        if said.get("version") != suite_version():
            return f"vlmqual {said.get('version')} does not go with {suite_version()}"
        node = said.get("node")
        if not isinstance(node, int) or not 0 < node < self.count:
            return f"--node-rank {node} is none of 1 to {self.count - 1}"
        return ""


class FarWorker(Worker):
    """A rank on another machine."""

    def __init__(self, channel: Channel, name: str) -> None:
        self.channel = channel
        self._name = name
        self._gone = False

    def ended(self) -> bool:
        """Only its connection tells."""
        return self._gone

    def kill(self) -> None:
        """Close the connection, upon which the node ends the process."""
        if not self._gone:
            self._gone = True
            self.channel.close()

    def stop(self) -> None:
        """Ask it to end."""
        if not self._gone:
            with contextlib.suppress(VlmqualError):
                self.channel.send({"op": "stop"}, time.monotonic() + 1)
        self.kill()

    def log(self) -> str:
        """It is on the other machine."""
        return ""

    def crashed(self) -> TargetCrashed:
        """What is known of its end."""
        self.kill()
        return TargetCrashed(f"the process of {self._name} ended, or its connection; `vlmqual node` there has its log")


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of a command that can use several machines."""
    group = parser.add_argument_group("several machines", "as torchrun's; `vlmqual node` runs on the others")
    group.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines, this one included (1)")
    group.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks of each machine")
    group.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where this machine listens for the others")
    group.add_argument("--rdzv-id", default="", metavar="WORD", help="a word that both ends have to know")


@contextlib.contextmanager
def opened(args: argparse.Namespace, largest: int) -> Iterator[Nodes | None]:
    """The other machines that the options name, None for none.

    Args:
        args: of a parser that `declare` was called on.
        largest: ranks that will be wanted.

    Raises:
        UsageError: the options do not go together, or name too few ranks.
    """
    if args.nnodes == 1:
        if args.rdzv_endpoint or args.nproc_per_node:
            raise UsageError("--rdzv-endpoint and --nproc-per-node are for --nnodes above 1")
        yield None
        return
    ranks = args.nproc_per_node or 0
    if args.nnodes < 1 or ranks < 1 or not args.rdzv_endpoint:
        raise UsageError(f"--nnodes {args.nnodes} needs --nproc-per-node and --rdzv-endpoint, both numbers positive")
    if largest > args.nnodes * ranks:
        raise UsageError(f"tensor-parallel size {largest} is more than {args.nnodes} nodes of {ranks} ranks each")
    nodes = Nodes(Endpoint.parse(args.rdzv_endpoint, args.rdzv_id), args.nnodes, ranks)
    try:
        yield nodes
    finally:
        nodes.close()


# the other nodes ------------------------------------------------------------------------------------------------------


class Slot(threading.Thread):
    """One rank's place on this node: connects, waits for what to start, starts it, watches it, and begins again."""

    def __init__(self, endpoint: Endpoint, node: int, wait_s: float) -> None:
        super().__init__(daemon=True)
        self.refused = ""
        self._endpoint = endpoint
        self._node = node
        self._wait_s = wait_s

    def run(self) -> None:
        """Until node 0 is gone or refuses."""
        while (connection := self._join()) is not None:
            with connection:
                channel = Channel(os.dup(connection.fileno()), os.dup(connection.fileno()))
                try:
                    order = channel.receive()
                except VlmqualError:
                    continue
                finally:
                    channel.close()
                connection.setblocking(True)
                _hold(connection, order["arguments"], order["environment"])

    def _join(self) -> socket.socket | None:
        place = (self._endpoint.host, self._endpoint.port)
        deadline = time.monotonic() + self._wait_s
        while time.monotonic() < deadline:
            try:
                connection = socket.create_connection(place, timeout=_JOIN_S)
            except OSError:  # node 0 is not there yet, or not any more
                time.sleep(_LOOK_S)
                continue
            channel = Channel(os.dup(connection.fileno()), os.dup(connection.fileno()))
            try:
                greeting = {"word": self._endpoint.word, "node": self._node, "version": suite_version()}
                channel.send(greeting, time.monotonic() + _JOIN_S)
                self.refused = str(channel.receive(time.monotonic() + _JOIN_S)["refused"])
            except VlmqualError:
                connection.close()
                continue
            finally:
                channel.close()
            if not self.refused:
                return connection
            connection.close()
            return None
        return None


def _hold(connection: socket.socket, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run one worker over its connection, and end it when the other end is gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmqual_contract.worker", *arguments],
        stdin=connection.fileno(),
        stdout=connection.fileno(),
        env=environment(variables),
        start_new_session=True,
    )
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    while process.poll() is None and not poll.poll(_LOOK_S * 1e3):
        continue
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)  # it was asked to end, perhaps
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Command:
    """`vlmqual node`: lends this machine's devices to a command on another one."""

    help = "run ranks of a command that was started on another machine"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--rdzv-endpoint", required=True, metavar="HOST:PORT", help="where the command on node 0 listens")
        add("--rdzv-id", default="", metavar="WORD", help="a word that both ends have to know")
        add("--node-rank", required=True, type=int, metavar="N", help="number of this node, from 1")
        add("--nproc-per-node", required=True, type=int, metavar="N", help="ranks that it can run")
        add("--wait", type=float, default=300.0, metavar="S", help="seconds to look for node 0 (300)")

    def run(self, args: argparse.Namespace) -> int:
        """Serve until node 0 is gone for longer than the wait, or refuses."""
        if args.node_rank < 1 or args.nproc_per_node < 1 or not args.wait > 0:
            raise UsageError("--node-rank, --nproc-per-node and --wait are positive; node 0 runs the command itself")
        endpoint = Endpoint.parse(args.rdzv_endpoint, args.rdzv_id)
        slots = [Slot(endpoint, args.node_rank, args.wait) for _ in range(args.nproc_per_node)]
        print(f"node {args.node_rank}: {len(slots)} ranks for {args.rdzv_endpoint}", file=sys.stderr)
        for slot in slots:
            slot.start()
        while any(slot.is_alive() for slot in slots):
            time.sleep(_LOOK_S)
        if refused := next((slot.refused for slot in slots if slot.refused), ""):
            raise UsageError(f"{args.rdzv_endpoint} refused this node: {refused}")
        return EXIT_OK


command = _Command()
