"""What a target that shows less would have been told, derived and really run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from vlmqual_conformance.rules import RULES
from vlmqual_faults.catalogue import variant
from vlmqual_faults.nursery import Nursery
from vlmqual_faults.profiles import Row, asked, derived
from vlmqual_faults.trials import Bench, judged, observe

FAMILY = "idefics3"
TAP, LOGITS = "text.layers.0", "prefill/logits"


def row(case: str, outcome: str = "pass", reason: str = "", **ratios: float | None) -> dict[str, Any]:
    names = {"tap": TAP, "logits": LOGITS}
    details = {"ratios": {names[name]: ratio for name, ratio in ratios.items()}} if ratios else {}
    return {"case": case, "outcome": outcome, "reason": reason, "details": details, "worst": None, "component": ""}


WIDE = asked([row("both", tap=0.1, logits=0.1), row("taps", tap=0.1), row("plain", logits=0.1), row("none")])
NARROW = asked([row("both", logits=0.1), row("taps", "not-applicable"), row("plain", logits=0.1), row("none")])


def one(found: dict[str, Any]) -> tuple[Row | None, list[str]]:
    rows, unsure = derived([found], WIDE, NARROW)
    return (rows[0] if rows else None), unsure


def test_a_case_that_needs_what_is_not_shown_is_not_applicable() -> None:
    for outcome in ("pass", "fail", "error"):
        found, _ = one(row("taps", outcome, tap=7.0))
        assert found is not None
        assert (found["outcome"], found["component"]) == ("not-applicable", "")


def test_a_case_that_compares_no_tap_says_the_same() -> None:
    for case in ("plain", "none"):
        for outcome in ("pass", "fail", "error", "not-applicable"):
            given = row(case, outcome, "so it is")
            assert one(given) == (given, [])


def test_a_case_that_passed_passes_without_its_taps() -> None:
    found, unsure = one(row("both", tap=0.9, logits=0.2))
    assert found is not None
    assert (found["outcome"], found["worst"], found["component"], unsure) == ("pass", 0.2, LOGITS, [])


def test_a_case_whose_other_comparisons_left_their_budget_fails_by_these() -> None:
    found, _ = one(row("both", "fail", tap=90.0, logits=3.0))
    assert found is not None
    assert (found["outcome"], found["component"], found["worst"]) == ("fail", LOGITS, 3.0)
    found, _ = one(row("both", "fail", tap=90.0, logits=None))  # an infinite error stands as None in a file
    assert found is not None
    assert (found["outcome"], found["component"], found["worst"]) == ("fail", LOGITS, None)


@pytest.mark.parametrize(
    "given",
    [
        row("both", "fail", tap=90.0, logits=0.9),
        row("both", "fail", tap=90.0),
        row("both", "error", "text.layers.0 holds NaN in 3 of 9 places"),
        row("both", "fail", "raised IndexError"),
    ],
)
def test_a_case_that_a_tap_may_have_ended_is_to_be_run_again(given: dict[str, Any]) -> None:
    assert one(given) == (None, ["both"])


def test_after_cases_that_were_not_tried_everything_is_run_again() -> None:
    rows = [row("plain", logits=0.1), row("both", "error", "not tried: the target hung in each of the 5 cases before")]
    assert derived(rows, WIDE, NARROW) == ([], ["plain", "both"])


# derived and really run -----------------------------------------------------------------------------------------------

#: The first of them says what is asked; faults of every layer and of the tower.
VARIANTS = ("honest-mlp-split", "rms-epsilon", "shuffle-missing")
NARROWER = ("all-logits", "last-logits")
CASES = (
    "test_vision.py::test_image_features_are_within_budget[photo-whole]",
    "test_prefill.py::test_logits_at_the_end_of_a_prompt[photo-whole]",
    "test_prefill.py::test_logits_at_the_end_of_a_prompt[text-only]",
    "test_prefill.py::test_logits_at_every_position[text-only]",
    "test_prefill.py::test_logits_from_pixels[photo-whole]",
    "test_decode.py::test_greedy_tokens_of_forced_steps_are_golds[text-only]",
    "test_decode.py::test_logits_of_every_forced_step[text-only]",
)


@pytest.fixture(scope="module")
def bench(nursery: Nursery) -> Iterator[Bench]:
    with Nursery("suite") as suite:
        yield Bench(nursery.python, suite.python)


def test_what_is_derived_is_what_a_narrower_target_is_really_told(bench: Bench) -> None:
    told = {
        (name, profile): observe(variant(FAMILY, name), profile, CASES, bench)[0]
        for name in VARIANTS
        for profile in ("taps", *NARROWER)
    }
    honest = {profile: asked(told[VARIANTS[0], profile]) for profile in ("taps", *NARROWER)}
    assert {rule for rules in honest["taps"].rules.values() for rule in rules} == set(RULES)
    count = 0
    for name in VARIANTS:
        for before, profile in zip(("taps", *NARROWER), NARROWER, strict=False):
            real = {each["case"]: each for each in told[name, profile]}
            assert set(real) == set(CASES)
            found, unsure = derived(told[name, before], honest[before], honest[profile])
            assert {each["case"] for each in found} | set(unsure) == set(CASES)
            count += len(found)
            for each in found:
                own = real[each["case"]]
                assert (each["outcome"], each["component"]) == (own["outcome"], own["component"]), each["case"]
                if own["outcome"] != "not-applicable":
                    assert each["details"].get("rules") == own["details"].get("rules"), each["case"]
                    assert each["worst"] == pytest.approx(own["worst"], abs=1e-4), each["case"]
            one, other = (
                judged(variant(FAMILY, name), profile, rows, "", honest[profile])
                for rows in ([*found, *(real[case] for case in unsure)], list(real.values()))
            )
            assert replace(one, reason="", worst=None) == replace(other, reason="", worst=None)
    assert count > 35, "hardly anything was derived"
