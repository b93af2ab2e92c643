"""Predictions: the roofline by hand, what fits, and what the command prints."""

from __future__ import annotations

import json

import pytest

from vlmqual_contract.cli import main
from vlmqual_contract.errors import UsageError
from vlmqual_perf.ceilings import Ceilings
from vlmqual_perf.costs import Cost
from vlmqual_perf.costs_request import Request
from vlmqual_perf.predict import configuration, request_of
from vlmqual_perf.roofline import bound, predict

# 6 GFLOP, 2 GB, three sums of together 40 MB.
COST = Cost({"mlp": 5 * 10**9, "head": 10**9}, 15 * 10**8, 5 * 10**8, 0, 0, 0, 3, 40 * 10**6)


def sheet(**figures: float) -> Ceilings:
    return Ceilings("data-sheet", "by hand", "float16", **figures)


def test_the_slower_of_compute_and_memory_is_the_time() -> None:
    slow_memory = bound(COST, sheet(flops_per_s=6e12, bandwidth_bytes_per_s=1e11), tp=1)
    assert (slow_memory.seconds, slow_memory.limit) == (pytest.approx(0.02), "bandwidth")
    slow_units = bound(COST, sheet(flops_per_s=6e10, bandwidth_bytes_per_s=1e11), tp=1)
    assert (slow_units.seconds, slow_units.limit) == (pytest.approx(0.1), "compute")


def test_a_published_link_carries_the_ring_and_an_unknown_one_is_left_out() -> None:
    figures = {"flops_per_s": 6e12, "bandwidth_bytes_per_s": 1e11}
    ring = bound(COST, sheet(**figures, link_bytes_per_s=1e9), tp=4)
    assert ring.seconds == pytest.approx(0.02 + 2 * 3 / 4 * 0.04)
    assert ring.limit == "all-reduce"
    assert bound(COST, sheet(**figures), tp=4).seconds == pytest.approx(0.02)
    assert bound(COST, sheet(**figures, link_bytes_per_s=1e9), tp=1).seconds == pytest.approx(0.02)


def test_a_measured_sum_has_its_latency_each_time() -> None:
    measured = sheet(
        flops_per_s=6e12, bandwidth_bytes_per_s=1e11, all_reduce_bytes_per_s=4e9, all_reduce_latency_s=1e-3
    )
    assert bound(COST, measured, tp=2).seconds == pytest.approx(0.02 + 3e-3 + 0.01)


def test_without_any_figure_nothing_is_predicted() -> None:
    assert bound(COST, sheet(), tp=1).seconds is None


def test_memory_is_weights_and_the_caches_of_prompt_and_answer() -> None:
    config, _ = configuration("mllama-11b")
    request = request_of(config, images=1, tiles=None, prompt_tokens=100, batch=2)
    found = predict(config, request, 28, tp=2, dtype="float16", ceilings=sheet(memory_bytes=13e9))
    # 32 layers with self-attention and 8 with cross-attention, 8 heads of 128 for keys and for values, halved.
    assert found.kv_bytes == 2 * 128 * 32 * 2 * 8 * 128 * 2 // 2
    assert found.cross_kv_bytes == 2 * 4 * 1601 * 8 * 2 * 8 * 128 * 2 // 2
    assert found.needed_bytes == found.weights_bytes + found.kv_bytes + found.cross_kv_bytes
    assert found.fits is True
    assert predict(config, request, 28, tp=1, dtype="float16", ceilings=sheet(memory_bytes=13e9)).fits is False
    assert predict(config, request, 28, tp=1, dtype="float16", ceilings=sheet()).fits is None


def test_ranks_that_cut_through_heads_are_an_answer_with_a_reason() -> None:
    config, _ = configuration("idefics3-8b")
    found = predict(config, Request((8,)), 4, tp=3, dtype="float16", ceilings=sheet())
    assert (found.bounds, found.reason) == (None, "text_config: 32 attention heads do not divide by 3 ranks")


def test_frames_take_places_in_the_prompt_and_tiles_do_not() -> None:
    idefics3, mllama, idefics = (configuration(name)[0] for name in ("idefics3-8b", "mllama-11b", "idefics-9b"))
    asked = {"images": 2, "tiles": None, "prompt_tokens": 10, "batch": 1}
    assert request_of(idefics3, **asked | {"tiles": 5}) == Request((10 + 2 * 5 * 169,), ((5, 5),))
    assert request_of(mllama, **asked | {"tiles": 1}) == Request((10,), ((4, 4),)), "all places for tiles are computed"
    assert request_of(idefics, **asked | {"images": 0}) == Request((10,), ((1,),)), "a slot of zeros without images"
    assert request_of(mllama, **asked | {"images": 0}) == Request((10,), ())
    with pytest.raises(UsageError, match="--tiles 5: an image of mllama has 1 to 4"):
        request_of(mllama, **asked | {"tiles": 5})


# the command ---------------------------------------------------------------------------------------------------------


def test_the_table_is_labelled_and_fits_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", "idefics3-8b", "--device", "RBLN-CA25", "--tp", "1,2,3,8"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    words = " ".join(said.split())
    assert words.startswith("PREDICTED, not measured: idefics3-8b on RBLN-CA25")
    assert "NO FIT" in words, "17 GB of weights and cache do not fit 16 GB"
    assert "TP=3: text_config: 32 attention heads do not divide by 3 ranks" in words
    assert "all-reduce is left out: the speed of the link between devices is not known" in words
    assert "decode step" in words
    assert "bandwidth" in words


def test_json_has_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", "mllama-90b", "--device", "H200", "--tp", "2,16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True
    two, sixteen = found["rows"]
    assert two["fits"] is True
    # Decoding reads 85 GB of weights at 4.8 TB/s, and 400 sums of 16 KiB over 450 GB/s are nothing beside it.
    assert two["phases"]["decode"]["seconds"] == pytest.approx(0.0182, rel=0.05)
    assert two["phases"]["decode"]["limit"] == "bandwidth"
    assert (sixteen["possible"], sixteen["reason"]) == (
        False,
        "text_config: 8 key/value heads do not divide by 16 ranks",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "gpt", "--device", "H200"], "--model 'gpt' is neither a directory nor one of idefics-80b"),
        (["--model", "idefics-9b", "--device", "TPU"], "device 'TPU' is unknown"),
        (["--model", "idefics-9b", "--device", "H200", "--tp", "two"], "--tp 'two' is no list of numbers"),
        (["--model", "idefics-9b", "--device", "H200", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["--model", "idefics-9b", "--device", "H200", "--batch", "0"], "--batch 0 is not positive"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *options]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_measured_ceilings_are_a_targets_probes_in_its_own_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["predict", "--model", "idefics3-8b", "--device", "measured:truth", "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    ceilings = found["rows"][0]["ceilings"]
    assert (ceilings["kind"], ceilings["source"]) == ("measured", "probes of truth")
    assert found["dtype"] == ceilings["dtype"] == "float32"
    assert found["rows"][0]["fits"] is None, "a probe does not tell how much memory there is"
