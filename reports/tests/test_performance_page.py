from __future__ import annotations

import re

import numpy as np
import pytest

from vlmqual_reports.load import load
from vlmqual_reports.performance import blocks

RNG = np.random.default_rng(20270115)


def lines(book):
    run = next(run for run in load([book.folder]).newest if run.header.kind == "perf")
    return {(line.name.split(",")[0], line.tp): line for block in blocks(run) for line in block.lines}


def test_statistics_of_a_phase_are_those_of_its_repetitions(book, make_measurement):
    values = RNG.uniform(0.01, 0.02, 7)
    book.write(book.header("perf"), [make_measurement("prefill", [[value] for value in values])])
    line = lines(book)["prefill", 1]
    ordered = np.sort(values) * 1e3
    assert line.median_ms == pytest.approx(ordered[3], rel=1e-12)
    assert line.min_ms == pytest.approx(ordered[0], rel=1e-12)
    # Seven values: the 95th percentile lies 0.95 * 6 = 5.7 steps along the ordered values.
    assert line.p95_ms == pytest.approx(ordered[5] + 0.7 * (ordered[6] - ordered[5]), rel=1e-12)
    assert (line.count, line.repetitions) == (7, 7)
    shown = f"{ordered[3]:.2f}"
    assert shown in book.page().by_id("performance").text, f"the page does not show the median {shown} ms"


def test_decode_is_given_by_step_and_by_repetition(book, make_measurement):
    values = RNG.uniform(0.004, 0.006, (3, 5))
    values[:, 0] *= 3  # a slow first step tells the two apart
    book.write(book.header("perf"), [make_measurement("decode", values.tolist(), batch=2)])
    found = lines(book)
    itl, tpot = found["decode ITL", 1], found["decode TPOT", 1]
    assert itl.count == 15
    assert itl.median_ms == pytest.approx(np.sort(values.ravel())[7] * 1e3, rel=1e-12)
    assert tpot.count == 3
    means = np.sort([sum(row) / 5 for row in values.tolist()])
    assert tpot.median_ms == pytest.approx(means[1] * 1e3, rel=1e-12)
    assert tpot.tokens_per_s == pytest.approx(2 / means[1], rel=1e-12)
    assert itl.tokens_per_s is None


def test_repetitions_with_different_numbers_of_steps_weigh_by_themselves(book, make_measurement):
    book.write(book.header("perf"), [make_measurement("decode", [[0.001], [0.003, 0.003, 0.003]])])
    assert lines(book)["decode TPOT", 1].median_ms == pytest.approx(2.0)
    assert lines(book)["decode ITL", 1].median_ms == pytest.approx(3.0)


def test_speedup_is_the_ratio_of_medians_over_one_rank(book, make_measurement):
    book.write(
        book.header("perf"),
        [
            make_measurement("prefill", [[0.030], [0.032], [0.050]]),
            make_measurement("prefill", [[0.020], [0.016], [0.010]], tp=2),
        ],
    )
    found = lines(book)
    assert found["prefill", 1].scaling is None
    assert found["prefill", 2].scaling.speedup == pytest.approx(2.0)
    assert found["prefill", 2].scaling.interval is None, "three repetitions say nothing of their spread"
    for text in (book.page().by_id("performance").text, book.markdown()):
        assert "2.00\N{MULTIPLICATION SIGN}" in text
        assert "100 %" in text


def test_a_speedup_has_an_interval_and_so_has_its_efficiency(book, make_measurement):
    alone, four = [0.04, 0.041, 0.039, 0.042, 0.038], [0.02, 0.0205, 0.0195, 0.021, 0.019]
    rows = [make_measurement("prefill", [[value] for value in values], tp=tp) for tp, values in ((1, alone), (4, four))]
    book.write(book.header("perf"), rows)
    found = lines(book)["prefill", 4].scaling
    low, high = found.interval
    assert low < found.speedup < high
    assert found.speedup == pytest.approx(2.0)
    for text in (book.page().by_id("performance").text, book.markdown()):
        assert f"2.00\N{MULTIPLICATION SIGN} ({low:.2f} to {high:.2f})" in text
        assert f"50 % ({25 * low:.0f} to {25 * high:.0f})" in text


def test_an_impossible_size_is_shown_with_its_reason_in_a_few_letters(book, make_measurement):
    refused = {"state": "failed", "reason": "text_config: 6 attention heads do not divide by 4 ranks"}
    rows = [make_measurement("prefill", [[0.02]] * 5), make_measurement("prefill", [], tp=4, **refused)]
    book.write(book.header("perf"), rows)
    overview = book.page().by_id("performance").all("table")[0].rows()
    assert [row[2] for row in overview if row[1] == "4"] == ["✗ heads % 4"]


def test_scenarios_stand_in_the_plans_order_whatever_order_they_were_measured_in(book, make_measurement):
    rows = [make_measurement("prefill", [[0.01]], scenario=name) for name in ("c", "a", "b")]
    book.write(book.header("perf", plan={"scenarios": ["a", "b", "c"]}), rows)
    run = load([book.folder]).newest[0]
    assert [block.scenario for block in blocks(run)] == ["a", "b", "c"]


def test_threads_of_each_rank_are_shown(book, make_measurement):
    book.write(book.header("perf"), [make_measurement("prefill", [[0.01]], checks={"threads": 3})])
    assert "threads of each rank 3" in book.page().by_id("performance").text
    assert "threads of each rank 3" in book.markdown()


def test_no_speedup_is_claimed_without_a_sound_base(book, make_measurement):
    book.write(
        book.header("perf"),
        [
            make_measurement("prefill", [[0.02]], tp=2),
            make_measurement("vision", [[0.02]], tp=1, state="failed", reason="it crashed"),
            make_measurement("vision", [[0.01]], tp=2),
        ],
    )
    assert all(line.scaling is None for line in lines(book).values())
    assert "\N{MULTIPLICATION SIGN}" not in book.page().by_id("performance").text


def test_scenarios_batches_and_dtypes_are_never_pooled(book, make_measurement):
    book.write(
        book.header("perf"),
        [
            make_measurement("prefill", [[0.01]]),
            make_measurement("prefill", [[0.02]], batch=4),
            make_measurement("prefill", [[0.03]], scenario="two-pages"),
        ],
    )
    run = load([book.folder]).newest[0]
    found = [(block.scenario, block.batch, block.lines[0].median_ms) for block in blocks(run)]
    assert found == [("one-photo", 1, 10.0), ("one-photo", 4, 20.0), ("two-pages", 1, 30.0)]


def test_a_measurement_that_is_not_steady_is_marked_wherever_it_is_shown(book, make_measurement):
    book.write(
        book.header("perf"),
        [
            make_measurement("prefill", [[0.01], [0.02]], state="not-steady", reason="windows differ by 40 %"),
            make_measurement("vision", [[0.01], [0.01]]),
        ],
    )
    page = book.page()
    section = page.by_id("performance")
    overview = section.all("table")[0].rows()[1]
    assert "▲ not steady" in overview[3], "the overview shows an unsteady median without its mark"
    assert "not steady" not in overview[2]
    detail = next(row for row in section.all("table")[1].rows() if row[0] == "prefill")
    assert detail[-1] == "▲ not steady windows differ by 40 %"
    assert "1 not steady" in page.by_id("summary").text
    assert "▲ not steady: windows differ by 40 %" in book.markdown()


def test_a_failed_cell_is_a_result_and_its_figures_are_not(book, make_measurement):
    book.write(
        book.header("perf"),
        [
            make_measurement("prefill", [[0.123456]], state="failed", reason="tokens differ"),
            make_measurement("vision", [[0.1]]),
        ],
    )
    page = book.page()
    assert "✗ failed: 1 measurement" in page.by_id("summary").text
    assert "tokens differ" in page.by_id("performance").text
    assert "123.5" not in page.by_id("performance").all("table")[0].text, (
        "the overview shows the figure of a failed cell"
    )


def test_a_cell_without_values_has_no_figures(book, make_measurement):
    rows = [make_measurement("decode", [], state="failed", reason="it hung"), make_measurement("prefill", [[0.1]])]
    book.write(book.header("perf"), rows)
    line = lines(book)["decode ITL", 1]
    assert (line.median_ms, line.p95_ms, line.count) == (None, None, 0)
    assert "it hung" in book.page().by_id("performance").text


def test_a_run_without_measurements_is_incomplete(book):
    book.write(book.header("perf"), [])
    page = book.page()
    assert "incomplete: no measurement was made" in page.by_id("summary").text
    assert "No measurement." in page.by_id("performance").text


def test_performance_alone_is_measured_and_not_as_required(book, make_measurement):
    book.write(book.header("perf"), [make_measurement("prefill", [[0.1]])])
    page = book.page()
    assert page.by_id("summary").all("p", "verdict")[0].text == "● measured; conformance was not run"
    assert not [node for node in page.walk() if node.attributes.get("id") == "levels"]


def test_conformance_alone_has_no_performance_section(book, make_verdict):
    book.write(book.header(), [make_verdict("a")])
    page = book.page()
    assert not [node for node in page.walk() if node.attributes.get("id") == "performance"]
    assert not page.all("svg")


def test_conformance_and_performance_of_one_target_are_one_subject(book, make_verdict, make_measurement):
    book.write(book.header(), [make_verdict("a")])
    book.write(book.header("perf"), [make_measurement("prefill", [[0.1]])])
    cards = book.page().by_id("summary").all("article")
    assert len(cards) == 1
    assert cards[0].all("p", "verdict")[0].text == "✓ as required"
    assert "1 valid" in cards[0].text


def test_an_unfinished_performance_run_says_so_beside_its_figures(book, make_measurement):
    book.write(book.header("perf"), [make_measurement("prefill", [[0.1]])], finish=False)
    page = book.page()
    assert "Incomplete: it was stopped or is still running after 1 row." in page.by_id("performance").text
    assert page.by_id("summary").all("p", "verdict")[0].text.startswith("◐ incomplete")


def test_every_decode_step_is_a_point_of_the_distribution(book, make_measurement):
    book.write(
        book.header("perf"),
        [
            make_measurement("decode", [[0.001, 0.002, 0.003], [0.004, 0.005, 0.006]]),
            make_measurement("decode", [[0.001, 0.002], [0.0025, 0.0031]], tp=2),
        ],
    )
    figure = book.page().by_id("performance").all("figure")[0]
    assert "Decode steps" in figure.all("figcaption")[0].text
    uses = [node for node in figure.walk() if node.tag == "use"]
    markers: dict[str, int] = {}
    for node in uses:
        markers[node.attributes["xlink:href"]] = markers.get(node.attributes["xlink:href"], 0) + 1
    assert {6, 4} <= set(markers.values()), f"6 and 4 steps were measured, the points drawn are {markers}"
    texts = [node.text for node in figure.all("text")]
    assert {"TP 1", "TP 2"} <= set(texts)


def test_plots_follow_the_data_that_is_there(book, make_measurement):
    rows = [make_measurement("prefill", [[0.1], [0.11]], shape={"image_tokens": 169})]
    book.write(book.header("perf"), rows)
    assert not book.page().all("svg"), "one TP size and one scenario leave nothing to plot"
    rows.append(make_measurement("prefill", [[0.2]], scenario="two-pages", shape={"image_tokens": 338}))
    book.write(book.header("perf", started="2027-01-11T00:00:00+00:00"), rows)
    captions = [node.text for node in book.page().all("figcaption")]
    assert len(captions) == 1
    assert captions[0].startswith("Prefill over image tokens")
    rows.append(make_measurement("prefill", [[0.1]], tp=2, state="noisy", reason="scatter"))
    book.write(book.header("perf", started="2027-01-12T00:00:00+00:00"), rows)
    captions = [node.text for node in book.page().all("figcaption")]
    assert any(text.startswith("prefill: latency over TP sizes") and text.endswith("TP 2 noisy") for text in captions)


def test_prefill_over_image_tokens_is_drawn_for_each_family(book, make_measurement):
    rows = [
        make_measurement(
            "prefill", [[0.1 * tokens]], scenario=f"{family}-{tokens}", family=family, shape={"image_tokens": tokens}
        )
        for family in ("idefics3", "mllama")
        for tokens in (1, 2)
    ]
    book.write(book.header("perf"), rows)
    captions = [node.text for node in book.page().all("figcaption")]
    families = [name for text in captions for name in ("idefics3", "mllama") if f"tokens, {name}" in text]
    assert families == ["idefics3", "mllama"], f"models of two families share a chart: {captions}"


def test_ids_inside_the_plots_are_unique_in_the_page(book, make_measurement):
    rows = [
        make_measurement(phase, [[0.1, 0.2], [0.1, 0.2]] if phase == "decode" else [[0.1]], tp, scenario=name)
        for name in ("a", "b")
        for phase in ("prefill", "decode")
        for tp in (1, 2)
    ]
    book.write(book.header("perf"), rows)
    page = book.page()
    assert len(page.all("svg")) == 6
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids)), "two elements of the page share an id"
    used = re.findall(r"url\(#([^)]+)\)", book.html())
    assert used
    assert set(used) <= set(ids), "a plot refers to an id that the page does not have"


def test_buckets_and_padding_stand_beside_the_phases_of_fixed_shapes(book, make_measurement):
    fixed = {"bucket": "b2 c128 x 1", "asked": 64, "computed": 256}
    rows = [make_measurement("vision", [[0.02]]), make_measurement("prefill", [[0.03]], checks=fixed)]
    book.write(book.header("perf"), rows)
    assert lines(book)["prefill", 1].padding == pytest.approx(0.75)
    assert lines(book)["vision", 1].padding is None
    table = next(rows for node in book.page().all("table") if "bucket" in (rows := node.rows())[0])
    head, *body = table
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    assert (shown["prefill"]["bucket"], shown["prefill"]["padding"]) == ("b2 c128 x 1", "75 %")
    assert (shown["vision"]["bucket"], shown["vision"]["padding"]) == ("", "")
    text = book.markdown()
    assert "| tokens/s | bucket | padding | state |" in text
    assert "| b2 c128 x 1 | 75 % |" in text
    start = text.index("| phase | TP |")
    assert len({row.count("|") for row in text[start:].split("\n\n")[0].splitlines()}) == 1, "rows of unequal width"


def test_free_shapes_have_no_column_for_buckets(book, make_measurement):
    book.write(book.header("perf"), [make_measurement("prefill", [[0.03]])])
    assert "bucket" not in book.page().by_id("performance").text
    assert "bucket" not in book.markdown()


@pytest.mark.parametrize("where", ["info", "plan"])
def test_every_figure_of_an_emulated_run_carries_the_word(book, make_measurement, where):
    header = book.header("perf")
    given = {**getattr(header, where), "emulated" if where == "info" else "rehearsal": True}
    cells = [make_measurement("prefill", [[0.0321], [0.0321]]), make_measurement("decode", [[0.0123, 0.0123]])]
    book.write(book.header("perf", **{where: given}), cells)
    for text in (book.page().by_id("performance").text, book.markdown().partition("## Performance")[2]):
        figures = re.findall(r"(?:32\.10|12\.30|81\.3)( emulated)?", text)
        assert len(figures) >= 10, "the figures are not found on the page"
        assert all(figures), "a figure stands there without its mark"
    assert "say nothing about a device" in book.markdown()


def test_shares_of_the_ceilings_stand_beside_the_phases_that_have_them(book, make_measurement):
    measured = {
        "source": "probes of eager",
        "dtype": "float32",
        "bandwidth_bytes_per_s": 5e9,
        "flops_per_s": 4e10,
        "ranks": 1,
    }
    cost = {"cost": {"flops": 1, "mbu": 0.625, "mfu": 0.0125, "ceilings": {"measured": measured}}}
    book.write(
        book.header("perf"),
        [make_measurement("preprocess", [[0.01]] * 5), make_measurement("decode", [[0.01, 0.01]] * 5, checks=cost)],
    )
    found = lines(book)
    assert (found["decode ITL", 1].mbu, found["decode ITL", 1].mfu) == (0.625, 0.0125)
    assert found["decode TPOT", 1].mbu is None, "the share is of the median step"
    assert found["preprocess", 1].mbu is None
    text = book.page().by_id("performance").text
    assert "62.5 %" in text
    assert "1.25 %" in text
    assert "TP 1, measured: 5 GB/s, 0.04 TFLOP/s float32 (probes of eager)" in text
    assert "| tokens/s | MBU | MFU | state |" in book.markdown()


def test_without_a_share_there_is_no_column_for_it(book, make_measurement):
    book.write(book.header("perf"), [make_measurement("decode", [[0.01]] * 5, checks={"cost": {"flops": 1}})])
    assert "MBU" not in book.page().by_id("performance").text
    assert "MBU" not in book.markdown()


def test_a_99th_percentile_takes_a_thousand_values_and_collectives_are_shares_of_a_call(book, make_measurement):
    spent = {"collectives": {"calls": 3, "call_s": 0.010, "fastest_s": 0.002, "slowest_s": 0.005}}
    few = make_measurement("decode", [[0.01] * 111] * 9)
    many = make_measurement("decode", [[0.01] * 95 + [0.05] * 5] * 10, tp=2, checks=spent)
    book.write(book.header("perf"), [few, many])
    found = lines(book)
    assert found["decode ITL", 1].p99_ms is None, "999 values are too few"
    assert found["decode ITL", 1].collectives is None
    assert found["decode ITL", 2].p99_ms == pytest.approx(50.0)
    assert found["decode ITL", 2].collectives == pytest.approx((0.2, 0.5))
    page = book.page().by_id("performance").text
    assert "20 to 50 %" in page
    assert "p99" in page
