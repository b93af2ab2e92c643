"""Cost cards: shares of a device's ceilings by hand, and how a table shows them."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vlmqual_contract import fixtures
from vlmqual_contract.records import Measurement
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.scenario import load_scenarios
from vlmqual_contract.target import Inputs, Model
from vlmqual_perf import shares
from vlmqual_perf.bench import Bench
from vlmqual_perf.cards import card
from vlmqual_perf.ceilings import Ceilings
from vlmqual_perf.costs_request import Request, of_tensors
from vlmqual_perf.plan import Cell, config_of

MEASURED = Ceilings("measured", "probes of eager", "float32", bandwidth_bytes_per_s=1e9, flops_per_s=1e10, ranks=2)
SHEET = Ceilings("data-sheet", "H200: somewhere", "float32", bandwidth_bytes_per_s=4e9)


@pytest.fixture
def config() -> dict[str, object]:
    return config_of(Model(str(fixtures.checkpoint("idefics3-tiny")), "idefics3"))


@pytest.fixture
def inputs() -> Inputs:
    mask = np.array([[1] * 20, [0] * 5 + [1] * 15])
    return {"input_ids": mask, "attention_mask": mask, "pixel_values": np.ones((2, 3, 3, 112, 112), np.float32)}


def row(phase: str, *seconds: float, tp: int = 2) -> Measurement:
    return Measurement("c", "one-photo", "idefics3", phase, tp, 2, "float32", {"new_tokens": 4}, (seconds,))


def test_shares_are_work_by_time_over_the_ceiling(config: dict[str, object], inputs: Inputs) -> None:
    found = card(row("prefill", 0.25), inputs, config, [MEASURED, SHEET])
    moved = found["weights_bytes"] + found["kv_read_bytes"] + found["kv_write_bytes"]
    assert found["mbu"] == pytest.approx(moved / 0.25 / 1e9)
    assert found["mfu"] == pytest.approx(found["flops"] / 0.25 / 1e10)
    assert found["flops_all_ranks"] == 2 * found["flops"] == 2 * sum(found["flops_by_component"].values())
    measured, sheet = found["ceilings"]["measured"], found["ceilings"]["data-sheet"]
    assert measured["mbu"] == found["mbu"]
    assert sheet["mbu"] == pytest.approx(found["mbu"] / 4)
    assert "mfu" not in sheet, "no peak is published for float32"


def test_a_data_sheet_stands_in_where_nothing_was_measured(config: dict[str, object], inputs: Inputs) -> None:
    found = card(row("prefill", 0.25), inputs, config, [replace(MEASURED, bandwidth_bytes_per_s=None), SHEET])
    assert found["mbu"] == found["ceilings"]["data-sheet"]["mbu"]
    assert found["mfu"] == found["ceilings"]["measured"]["mfu"]


def test_decoding_is_counted_at_the_middle_step(config: dict[str, object], inputs: Inputs) -> None:
    found = card(row("decode", 0.1, 0.1, 0.2, 0.2), inputs, config, [MEASURED])
    # Four layers, two of four key heads of width 8 on a rank, keys and values, float32; steps 0 to 3, the middle is 1.
    position = 4 * 2 * 2 * 8 * 4
    assert found["kv_read_bytes"] == 2 * (20 + 1) * position
    assert found["kv_write_bytes"] == 2 * position
    assert found["median_s"] == pytest.approx(0.15)
    assert found["padding_share"] < found["kv_padding_share"] < 5 / 40, "5 of 40 positions of the prompt are padding"


def test_without_ceilings_and_without_values_the_counts_remain(config: dict[str, object], inputs: Inputs) -> None:
    found = card(replace(row("prefill"), values_s=()), inputs, config, [MEASURED])
    assert found["flops"] > 0
    assert not {"mbu", "mfu", "median_s"} & set(found)
    assert "ceilings" not in card(row("prefill", 1.0), inputs, config)


def test_what_cannot_be_counted_says_why(inputs: Inputs) -> None:
    assert card(row("prefill", 1.0), inputs, {"model_type": "gpt"})["missing"].startswith("config.json: model_type is")


def test_rows_are_as_long_as_the_longest_and_frames_of_zeros_are_none(
    config: dict[str, object], inputs: Inputs
) -> None:
    pixels = np.array(inputs["pixel_values"])
    pixels[1, 1:] = 0
    computed, asked = of_tensors({**inputs, "pixel_values": pixels}, config)
    assert computed == Request((20, 20), ((3,), (1,)), 64)
    assert asked == Request((20, 15), ((3,), (1,)), 64)


def test_a_measured_row_carries_its_card() -> None:
    scenario = load_scenarios(fixtures.file("scenarios.toml"))["mllama-photo"]
    with RemoteTarget("truth:prefill_ms=2,jitter=0") as target:
        bench = Bench(target, 1, [scenario], checkpoint=None, repeats=2, cell_s=0.05, threads=1, ceilings=[MEASURED])
        prefill, preprocess = (bench.measure(Cell(scenario, phase, 1)) for phase in ("prefill", "preprocess"))
    cost = prefill.checks["cost"]
    assert cost["weights_bytes"] > 0
    assert cost["mbu"] == cost["ceilings"]["measured"]["mbu"] > 0
    assert "cost" not in preprocess.checks


def shown(rows: list[Measurement]) -> str:
    stream = io.StringIO()
    shares.show(rows, Console(file=stream, width=80, highlight=False))
    return stream.getvalue()


def test_the_table_shows_both_shares_and_what_they_are_of(config: dict[str, object], inputs: Inputs) -> None:
    rows = []
    for tp in (1, 2):
        one = row("prefill", 0.25, tp=tp)
        cost: dict[str, Any] = card(one, inputs, config, [MEASURED, SHEET]) | {"mbu": 0.125, "mfu": 0.0625}
        rows.append(replace(one, checks={"cost": cost}))
    said = " ".join(shown(rows).split())
    assert "one-photo prefill 12 / 6.2 12 / 6.2" in said
    assert "ceilings of a rank, measured, 2 ranks at once: 1 GB/s, 0.01 TFLOP/s float32 (probes of eager)" in said
    assert "ceilings of a rank, data-sheet: 4 GB/s (H200)" in said
    assert max(map(len, shown(rows).splitlines())) <= 80


def test_there_is_no_table_where_no_row_knows_a_share() -> None:
    assert shown([row("prefill", 1.0), replace(row("decode", 1.0), checks={"cost": {"flops": 1}})]) == ""
