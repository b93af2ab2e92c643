"""Ceilings: what a target's probes become, and the published devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.remote import RemoteTarget
from vlmqual_perf.ceilings import device, devices, measured, published

PROBED = """
import numpy as np
from vlmqual_contract.errors import Unsupported
from vlmqual_contract.target import Capability, Info


class Probed:
    def __init__(self, slow="0"):
        self.slow = slow == "1"
        self.info = Info("probed", "1", "made up", "none", "bfloat16", frozenset({Capability.TENSOR_PARALLEL}),
                         ("mllama",), processes="per-rank")

    def open(self, model, options):
        raise NotImplementedError

    def probe(self, name, shape, dtype):
        if name == "gemm" and self.slow:
            raise Unsupported("no products here")
        work = float(np.prod(shape))
        return {"stream": 4 * work / 1e12, "gemm": 2 * work / 5e14, "all-reduce": 1e-5 + 2 * work / 1e10}[name]
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "probed.py"
    path.write_text(PROBED)
    return f"{path}:Probed"


def test_probes_become_bytes_and_flops_per_second(target: str) -> None:
    with RemoteTarget(target) as running:
        found = measured(running)
    assert (found.kind, found.dtype, found.ranks) == ("measured", "bfloat16", 1)
    assert found.bandwidth_bytes_per_s == pytest.approx(1e12), "a bfloat16 that is copied is 4 bytes of traffic"
    assert found.flops_per_s == pytest.approx(5e14)
    assert found.all_reduce_latency_s is None
    assert found.notes == ()


def test_several_ranks_have_a_latency_and_a_bandwidth_of_their_sum(target: str) -> None:
    with RemoteTarget(target, tp=2) as running:
        found = measured(running)
    assert found.ranks == 2
    assert found.all_reduce_latency_s == pytest.approx(1e-5, rel=0.01)
    assert found.all_reduce_bytes_per_s == pytest.approx(1e10, rel=0.01)


def test_a_probe_that_is_not_there_leaves_a_note(target: str) -> None:
    with RemoteTarget(f"{target}:slow=1") as running:
        found = measured(running)
    assert found.flops_per_s is None
    assert found.bandwidth_bytes_per_s == pytest.approx(1e12)
    assert found.notes == ("gemm: no products here",)
    assert "flops_per_s" not in found.plain()


def test_every_published_device_has_its_figures_and_their_sources() -> None:
    wanted = {"RBLN-CA12", "RBLN-CA22", "RBLN-CA25", "RBLN-CR13", "H100-SXM", "H100-PCIe", "H200"}
    assert set(devices()) == wanted
    for name, entry in devices().items():
        assert entry.memory_bytes >= 16e9, name
        assert 1e11 < entry.bandwidth_bytes_per_s < 1e13, name
        assert all(1e13 < peak < 1e16 for peak in entry.flops.values()), name
        assert entry.sources, name
        assert all("https://" in source for source in entry.sources), name
        assert entry.missing, f"{name} says what is not published"


def test_a_device_is_found_by_what_it_calls_itself() -> None:
    found = published("cuda:0 NVIDIA H200", "bfloat16")
    assert found is not None
    assert (found.kind, found.bandwidth_bytes_per_s, found.flops_per_s) == ("data-sheet", 4.8e12, 989.4e12)
    atom = published("RBLN-CA25", "bfloat16")
    assert atom is not None
    assert atom.flops_per_s is None, "no bfloat16 peak is published"
    assert "no peak is published for bfloat16" in atom.notes[0]
    assert published("cpu", "float32") is None


def test_an_unknown_device_is_one_sentence_with_those_that_there_are() -> None:
    assert device("rbln-ca25").name == "RBLN-CA25"
    with pytest.raises(UsageError, match=r"device 'TPU' is unknown; there are RBLN-CA12, .*measured:TARGET"):
        device("TPU")


def test_published_models_name_their_source() -> None:
    names = fixtures.names("models/")
    assert [name.split("/")[1] for name in names] == [
        f"{name}.json" for name in ("idefics-80b", "idefics-9b", "idefics3-8b", "mllama-11b", "mllama-90b")
    ]
