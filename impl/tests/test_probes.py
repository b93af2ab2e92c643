"""Ceiling probes: what moves in them, and ranks that meet for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmqual_contract import fixtures
from vlmqual_contract.discovery import make_target
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.target import Model, Options
from vlmqual_faults.nursery import Nursery
from vlmqual_impl import probes


@pytest.mark.parametrize("elements", [1, 4096, 1 << 20])
def test_a_stream_reads_as_many_weights_as_a_copy_moves(elements: int) -> None:
    entry = probes.entry("stream", (elements,), torch.float16)
    assert 2 * elements <= sum(weight.numel() for weight in entry.weights()) < 2 * elements + 4096
    assert entry.weights_bytes < 20 * elements, "float16 has two bytes"


def test_a_product_has_the_wanted_sides() -> None:
    entry = probes.entry("gemm", (2, 3, 5), torch.float32)
    found = entry.module(torch.ones(entry.inputs[0].shape))
    assert entry.inputs[0].shape == (2, 5)
    assert found.shape == entry.outputs[0].shape == (2, 3)
    assert (found == 5).all(), "each output is a sum over the inner side"


def test_a_probe_compiles_once_and_takes_the_best_call() -> None:
    calls: list[tuple[int, ...]] = []

    class Engine:
        def __init__(self) -> None:
            self.name = "counting"
            self.made_s: dict[str, float] = {}

        def program(self, entry: Any, mates: Sequence[Any] = ()) -> Any:
            def run(inputs: Sequence[Tensor], states: Any = None) -> tuple[list[Tensor], Any]:
                calls.append(tuple(inputs[0].shape))
                return [], None

            return run

        def new_states(self, entry: Any) -> None:
            return None

    assert probes.best_s(Engine(), probes.entry("gemm", (2, 3, 5), torch.float32)) >= 0
    assert set(calls) == {(2, 5)}
    assert len(calls) > 1


def test_compiled_forms_of_probes_are_gone_afterwards() -> None:
    with probes.draft() as shelf:
        entry = probes.entry("gemm", (2, 3, 5), torch.float32)
        folder = shelf.place(entry, "none", lambda target: (target / "made").touch())
        assert (folder / "made").is_file()
    assert not folder.exists()


def test_emulated_functions_have_probes_and_other_words_are_refused(tmp_path: Path) -> None:
    target = make_target("rbln:emulate=1")
    assert target.probe("gemm", (8, 4, 2), "float32") > 0
    assert target.probe("stream", (64,), "float32") > 0
    with pytest.raises(Unsupported, match="probe 'all-reduce': rbln has stream and gemm"):
        target.probe("all-reduce", (8,), "float32")
    with pytest.raises(UsageError, match="dtype 'int3' is not known"):
        target.probe("gemm", (8, 4, 2), "int3")
    with pytest.raises(UsageError, match=r"probe 'gemm' takes \(m, n, k\), got \(8,\)"):
        target.probe("gemm", (8,), "float32")


def test_two_ranks_meet_for_a_probe_with_and_without_a_session(nursery: Nursery) -> None:
    model = Model(str(fixtures.checkpoint("idefics3-tiny")), "idefics3")
    with RemoteTarget("eager", tp=2, threads=1, python=nursery.python) as target:
        assert target.probe("all-reduce", (1 << 10,), "float32") > 0
        with target.open(model, Options(tp=2)) as session:
            assert target.probe("all-reduce", (1 << 10,), "float32") > 0
            step = session.prefill({"input_ids": torch.full((1, 4), 5).numpy()})
            assert step.tokens().shape == (1,), "the session's group is as it was"
        assert target.probe("gemm", (8, 8, 8), "float32") > 0
