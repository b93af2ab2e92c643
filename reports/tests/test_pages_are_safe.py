from __future__ import annotations

import re

import pytest

from vlmqual_reports.page import fact, ms, number, plain

HOSTILE = "<script>alert(1)</script>\"'&amp;</td></table>| **x** `y` $\\frac$ {{ 7*7 }} \ud800 ‮ \n# h"


def poisoned(book, make_verdict, make_measurement):
    header = {
        "info": {HOSTILE: HOSTILE, "device": HOSTILE, "runtime": HOSTILE},
        "machine": {"host": HOSTILE, HOSTILE: [HOSTILE]},
    }
    rows = [
        make_verdict(
            f"{outcome} {HOSTILE}",
            outcome,
            [HOSTILE],
            reason=HOSTILE,
            component=HOSTILE,
            worst=2.0,
            family=HOSTILE,
            level=HOSTILE,
            dtype=HOSTILE,
            details={HOSTILE: HOSTILE, "expires": HOSTILE},
        )
        for outcome in ("pass", "fail", "error", "expected-fail", "not-applicable")
    ]
    plan = {HOSTILE: HOSTILE}
    book.write(book.header(subject=HOSTILE, command=HOSTILE, suite=HOSTILE, plan=plan, **header), rows)
    cells = [
        make_measurement(
            phase,
            [[0.1, 0.2], [0.1, 0.3]],
            tp,
            scenario=HOSTILE,
            reason=HOSTILE,
            state="noisy",
            dtype=HOSTILE,
            shape={HOSTILE: 1, "image_tokens": tokens},
            checks={HOSTILE: HOSTILE},
            tokens_digest=HOSTILE,
            family=HOSTILE,
        )
        for phase, tokens in ((HOSTILE, 1), ("decode", 1))
        for tp in (1, 2)
    ]
    book.write(book.header("perf", subject=HOSTILE, command=HOSTILE, **header), cells)


def test_text_from_results_is_shown_as_text_and_never_becomes_markup(book, make_verdict, make_measurement):
    poisoned(book, make_verdict, make_measurement)
    text = book.html()
    page = book.page()  # a stray closing tag would make this fail
    assert page.all("script") == []
    assert "<script" not in text
    assert "49" not in page.by_id("summary").all("code")[0].text, "an expression in a name was evaluated"
    assert "<script>alert(1)</script>" in page.by_id("failures").text
    known = {"class", "id", "href", "title", "scope", "rowspan", "colspan", "open", "role", "aria-label", "aria-hidden"}
    known |= {"tabindex", "lang", "charset", "name", "content", "http-equiv", "aria-labelledby"}
    drawn = {id(node) for svg in page.all("svg") for node in svg.walk()}
    for node in page.walk():
        strange = set(node.attributes) - known if id(node) not in drawn else set()
        assert not strange, f"<{node.tag}> has the attributes {strange}"


def test_markdown_keeps_its_tables_whatever_a_name_contains(book, make_verdict, make_measurement):
    poisoned(book, make_verdict, make_measurement)
    text = book.markdown()
    assert "<script" not in text
    table: int | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            table = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        table = table or cells
        assert cells == table, f"this row has another number of cells than its table: {line}"
    assert text.count("\n# ") == 0, "a line break in a name began a heading"


def test_the_page_loads_nothing_and_runs_nothing(book, make_verdict, make_measurement):
    book.write(book.header(), [make_verdict("a")])
    book.write(book.header("perf"), [make_measurement("decode", [[0.1, 0.2], [0.1, 0.2]], tp) for tp in (1, 2)])
    text = book.html()
    page = book.page()
    assert page.all("svg"), "without a plot this test would prove too little"
    for tag in ("script", "link", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "form"):
        assert page.all(tag) == [], f"the page has a <{tag}>"
    for node in page.walk():
        for name, value in node.attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith("#"), f"<{node.tag}> refers to {value}"
            assert not name.startswith("on"), f"<{node.tag}> has the handler {name}"
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", text), "the page names an address"
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    policy = [node.attributes.get("content", "") for node in page.all("meta") if "http-equiv" in node.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_plots_take_their_colours_from_the_page(book, make_measurement):
    book.write(book.header("perf"), [make_measurement("decode", [[0.1, 0.2], [0.1, 0.2]], tp) for tp in range(1, 9)])
    text = book.html()
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert svgs
    for svg in svgs:
        assert not re.search(r"#[0-9a-fA-F]{6}\b(?!-)", svg.replace("url(#", "")), "a plot has a colour of its own"
        for name in set(re.findall(r"var\((--[a-z0-9-]+)\)", svg)):
            assert f"{name}:" in text, f"the page does not define {name}"


def test_statuses_are_told_by_word_and_symbol_and_not_by_colour_alone(book, make_verdict):
    rows = [
        make_verdict(name, name, reason="r") for name in ("pass", "fail", "error", "expected-fail", "not-applicable")
    ]
    book.write(book.header(), rows)
    marks = book.page().all("span", "status")
    assert len(marks) > 5
    for mark in marks:
        symbol = mark.all("span", "mark")[0].text
        assert symbol
        assert mark.text.removeprefix(symbol).strip(), f"a status has no word beside {symbol!r}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (0.01234, "0.01234"),
        (0.5, "0.500"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (12345.6, "12,346"),
    ],
)
def test_milliseconds_keep_three_digits_that_matter(value, text):
    assert ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "\N{EN DASH}"), (0.78901, "0.789"), (3.42, "3.42"), (123456.0, "123,456")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_facts_are_one_line():
    assert fact({"torch": "2.13", "list": [1, 2.5]}) == "torch 2.13, list 1, 2.5"
    assert fact(16 * 2**30, "memory_bytes") == "16.0 GiB"


def test_plain_text_survives_markdown():
    assert plain("a|b\nc_d <e> 'f'") == "a\\|b c\\_d &lt;e&gt; &#39;f&#39;"
