"""Real ranks of a tensor-parallel run against one, row by row."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

# Four processes, three of them forks of the first. The first two are the ranks of a group of two before all are the
# ranks of a group of four.
RANKS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, numpy.random, torch, vlmqual_impl.families, vlmqual_impl.runtime.eager, vlmqual_impl.weights
from ranks_example import run
torch.set_num_threads(1)
for rank in (1, 2, 3, 0):
    if rank and os.fork() == 0:
        break
for ranks, port in zip((2, 4), sys.argv[3:]):
    if rank < ranks:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        logits = run(sys.argv[2], ranks)
        if rank == ranks - 1:
            np.save(os.path.join(sys.argv[1], f"logits-{ranks}.npy"), logits)
if not rank:
    sys.exit(sum(os.wait()[1] != 0 for _ in range(3)))
"""


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in held]


def assert_ranks_equal_one(folder: Path, example: str, python: str) -> None:
    """Run an example on groups of two and four processes and compare every row with one process in float64.

    Args:
        folder: holds the checkpoint `model`.
        example: Python text that defines `run(path, ranks)`, which gives logits (steps, rows, vocabulary).
        python: interpreter of the ranks.
    """
    (folder / "ranks_example.py").write_text(example)
    ports = free_ports(2)
    started = subprocess.Popen(
        [python, "-c", RANKS, str(folder), str(folder / "model"), *ports],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    names: dict[str, Any] = {}
    exec(example, names)
    alone = names["run"](str(folder / "model"), 1)
    try:
        _, errors = started.communicate(timeout=150)
        assert started.returncode == 0, f"a rank failed: {errors.decode()[-800:]}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    for ranks in (2, 4):
        together = np.load(folder / f"logits-{ranks}.npy")
        error = np.abs(together - alone).max(-1) / np.abs(alone).max(-1)
        for row in range(alone.shape[1]):
            assert error[:, row].max() < 1e-12, f"{ranks} ranks differ from one in row {row} by {error[:, row].max()}"
