"""Ranks on other machines, which are other processes of this one here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmqual_contract.errors import TargetFailure, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.nodes import Endpoint, Nodes
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.target import Model, Options

TOY = f"{Path(__file__).parent / 'ranked_target.py'}:Ranked"
LIMITS = Limits(start_s=60, open_s=60, call_s=20)
#: As `vlmqual node` is started, whether or not the console script is installed.
MAIN = "import sys; from vlmqual_contract.cli import main; sys.exit(main())"


@pytest.fixture
def place():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def node(place, word="w", rank=1, wait=20):
    options = ["--rdzv-endpoint", place, "--rdzv-id", word, "--node-rank", str(rank), "--nproc-per-node", "1"]
    command = [sys.executable, "-c", MAIN, "node", *options, "--wait", str(wait)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def nodes(place):
    found = Nodes(Endpoint.parse(place, "w"), count=2, ranks=1, wait_s=30)
    other = node(place)
    yield found
    found.close()
    other.kill()
    other.wait()
    other.stderr.close()


def where(target):
    """Of every rank: its process, the process that started it, and its variables."""
    with target.open(Model("anywhere", "idefics3"), Options(tp=2)) as session:
        replies = session.request_all({"op": "preprocess", "prompts": [{"text": "", "images": []}]})
    return [[int(number) for number in reply["inputs"]["input_ids"][0]] for reply in replies]


def test_the_second_rank_lives_on_the_other_node(nodes):
    with RemoteTarget(TOY, tp=2, limits=LIMITS, nodes=nodes) as target:
        ours, theirs = where(target)
    assert ours[1] == os.getpid(), "rank 0 is a child of this process"
    assert theirs[1] != os.getpid(), "rank 1 is a child of the other node"
    assert [ours[2:], theirs[2:]] == [[0, 0, 2], [1, 0, 2]], "RANK, LOCAL_RANK, WORLD_SIZE"


def test_a_node_serves_one_command_after_the_other(nodes):
    seen = set()
    for _ in range(2):
        with RemoteTarget(TOY, tp=2, limits=LIMITS, nodes=nodes) as target:
            seen.add(where(target)[1][0])
    assert len(seen) == 2, "every start is a process of its own"


def test_a_far_rank_that_dies_is_named(nodes):
    with RemoteTarget(TOY, tp=2, limits=LIMITS, nodes=nodes) as target:
        pid = where(target)[1][0]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(TargetFailure, match="rank 1 on node 1"):
            where(target)


def test_closing_the_connection_ends_the_far_rank(nodes):
    with RemoteTarget(TOY, tp=2, limits=LIMITS, nodes=nodes) as target:
        pid = where(target)[1][0]
        target._group.kill()
        for _ in range(200):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the far rank lives on")


def test_another_word_is_refused(place):
    found = Nodes(Endpoint.parse(place, "w"), count=2, ranks=1, wait_s=1)
    try:
        other = node(place, word="x")
        assert other.wait(60) == 2
        assert "the --rdzv-id differs" in other.stderr.read()
        other.stderr.close()
        with pytest.raises(UsageError, match="node 1 did not come within 1 s"):
            RemoteTarget(TOY, tp=2, limits=LIMITS, nodes=found)
    finally:
        found.close()


@pytest.mark.parametrize("text", ["here", "host:", "host:port", ":5", "host:70000"])
def test_an_endpoint_is_a_host_and_a_port(text):
    with pytest.raises(UsageError, match="HOST:PORT"):
        Endpoint.parse(text, "")
