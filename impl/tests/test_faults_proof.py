"""What trials are taken for, and that no trial is made twice."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vlmqual_conformance.catalogue import Case, requirements
from vlmqual_faults.catalogue import Variant, variant
from vlmqual_faults.findings import compared, show, write_matrix, write_summary
from vlmqual_faults.profiles import Asked
from vlmqual_faults.proof import Journal
from vlmqual_faults.trials import Trial, asked_of, judged

FAULT = variant("mllama", "patches-by-column")
(RULE,) = FAULT.requirements


def verdict(
    outcome: str, *names: str, component: str = "", worst: float | None = None, **details: Any
) -> dict[str, Any]:
    return {
        "case": "-".join(names),
        "outcome": outcome,
        "requirements": names,
        "component": component,
        "worst": worst,
        "reason": "so it is",
        "details": details,
    }


def trial(fault: Variant = FAULT, profile: str = "taps", *verdicts: dict[str, Any]) -> Trial:
    return judged(fault, profile, verdicts, "nothing came")


def shown(*trials: Trial, uncovered: tuple[str, ...] = ()) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    fine = show(trials, uncovered, console)
    assert isinstance(console.file, io.StringIO)
    return fine, console.file.getvalue()


CAUGHT = trial(FAULT, "taps", verdict("fail", RULE, component="vision.embeddings"), verdict("pass", "MLLAMA-DEC-001"))
HONEST = trial(variant("mllama", "honest-bfloat16"), "taps", verdict("pass", RULE, worst=0.5))


def test_a_fault_is_caught_by_cases_of_what_it_declares() -> None:
    assert (CAUGHT.caught, CAUGHT.declared, CAUGHT.missed, CAUGHT.cases) == (True, True, (), (1, 2))
    other = trial(FAULT, "taps", verdict("error", "MLLAMA-DEC-001"), verdict("pass", RULE))
    assert (other.caught, other.declared, other.missed) == (True, False, (RULE,))
    unseen = trial(FAULT, "taps", verdict("pass", RULE, worst=0.9), verdict("not-applicable", RULE))
    assert (unseen.caught, unseen.cases, unseen.worst) == (False, (0, 1), 0.9)


def test_the_component_is_the_first_in_the_order_of_the_data() -> None:
    failed = [verdict("fail", RULE, component=name) for name in ("text.norm", "vision.layers.10", "vision.layers.2")]
    assert trial(FAULT, "taps", *failed).component == "vision.layers.2"


def test_caught_faults_and_accepted_honest_variants_are_fine() -> None:
    fine, text = shown(CAUGHT, HONEST)
    assert fine
    assert "taps 1 of 1 (100.0%) 1 of 1 (100.0%) 1 of 1 (100.0%) 0 of 1" in " ".join(text.split())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (trial(FAULT, "taps", verdict("pass", RULE)), "SURVIVED  mllama patches-by-column"),
        (trial(FAULT, "taps", verdict("fail", "MLLAMA-DEC-001")), "MISSED    mllama patches-by-column"),
        (trial(FAULT, "taps"), "BROKEN    mllama patches-by-column (taps): no verdicts: nothing came"),
        (
            trial(variant("mllama", "honest-bfloat16"), "taps", verdict("fail", RULE)),
            "REJECTED  mllama honest-bfloat16 (taps): so it is",
        ),
    ],
    ids=["survived", "missed", "broken", "rejected"],
)
def test_what_must_not_be_fails_the_proof(wrong: Trial, says: str) -> None:
    fine, text = shown(CAUGHT, wrong)
    assert not fine
    assert says in text


def test_a_must_without_a_fault_fails_the_proof() -> None:
    fine, text = shown(CAUGHT, uncovered=("MLLAMA-DEC-005",))
    assert not fine
    assert "UNPROVEN  MLLAMA-DEC-005" in text


def test_a_fault_that_a_narrow_profile_does_not_show_lowers_a_rate_only() -> None:
    fine, text = shown(CAUGHT, trial(FAULT, "last-logits", verdict("pass", RULE)))
    assert fine
    assert "last-logits 0 of 1 (0.0%)" in " ".join(text.split())


def test_another_component_than_expected_is_said_and_fails_nothing() -> None:
    fine, text = shown(replace(CAUGHT, component="vision.layers.0"))
    assert fine
    assert "COMPONENT mllama patches-by-column: vision.layers.0 was named, not vision.embeddings" in text


def test_the_matrix_has_a_row_for_each_fault_and_says_who_caught_it(tmp_path: Path) -> None:
    (path,) = write_matrix([CAUGHT, HONEST], tmp_path)
    (row,) = csv.DictReader(path.read_text("utf-8").splitlines())
    assert (row["fault"], row[RULE], row["component"]) == ("patches-by-column", "caught", "vision.embeddings")


def test_the_summary_counts_by_family_and_profile(tmp_path: Path) -> None:
    narrow = trial(FAULT, "last-logits", verdict("pass", RULE))
    path = write_summary([CAUGHT, HONEST, narrow], ["MLLAMA-DEC-005"], tmp_path, {"jobs": 2}, {"mllama": {"a": "b"}})
    found = json.loads(path.read_text("utf-8"))
    assert (found["format"], found["jobs"], found["variants"]) == (2, 2, {"mllama": {"a": "b"}})
    assert found["rates"]["mllama"]["taps"] == {
        "faults": 1,
        "caught": 1,
        "declared": 1,
        "expected": 1,
        "named": 1,
        "honest": 1,
        "rejected": 0,
        "derived": False,
    }
    assert found["rates"]["mllama"]["last-logits"]["caught"] == 0
    assert (found["unproven"], found["wrong"], len(found["trials"])) == (["MLLAMA-DEC-005"], [], 3)


# rules of comparison --------------------------------------------------------------------------------------------------


def looks(*failed: str, looked: tuple[str, ...] = ("budget", "cosine")) -> dict[str, list[str]]:
    return {"looked": list(looked), "failed": list(failed)}


def test_a_rule_fails_in_a_trial_when_it_fails_in_one_case() -> None:
    found = trial(FAULT, "taps", verdict("fail", RULE, rules=looks("budget")), verdict("pass", "X", rules=looks()))
    assert found.rules == {"budget": True, "cosine": False}
    assert trial(FAULT, "taps", verdict("fail", RULE)).rules == {}


def test_an_answer_that_does_not_come_fails_by_every_rule_that_looks_at_an_honest_one() -> None:
    honest = Asked({RULE: frozenset({"decode/logits"})}, {RULE: ("cosine", "top-5")})
    silent = judged(FAULT, "taps", [verdict("error", RULE, rules=looks(looked=()))], "", honest)
    assert silent.rules == {"cosine": True, "top-5": True}
    raised = {**verdict("fail", RULE), "reason": "raised IndexError: no such position"}
    assert judged(FAULT, "taps", [raised], "", honest).rules == {"cosine": True, "top-5": True}
    assert judged(FAULT, "taps", [verdict("fail", RULE)], "", honest).rules == {}


def test_rules_are_asked_about_the_steps_after_some_prompts_whatever_a_variant_is_judged_by() -> None:
    some, other = (
        {**verdict("fail", "MLLAMA-DEC-001", rules=looks("budget")), "case": f"test_decode.py::test_steps[{name}]"}
        for name in ("photo-one-tile", "text-long")
    )
    assert trial(FAULT, "taps", some).rules == {"budget": True, "cosine": False}
    assert trial(FAULT, "taps", other).rules == {}


def test_a_fault_of_the_model_is_asked_the_steps_after_these_prompts() -> None:
    every = [
        Case(f"test_decode.py::test_steps[{name}]", ("MLLAMA-DEC-001",)) for name in ("photo-one-tile", "text-long")
    ]
    every.append(Case("test_vision.py::test_features", (RULE,)))
    assert asked_of(FAULT, every, requirements()) == (every[2].name, every[0].name)
    images = replace(FAULT, level="images")
    assert asked_of(images, every, requirements()) == (every[2].name,)


def test_rules_compete_on_faults_of_the_model_by_what_a_harness_sees() -> None:
    seen = trial(FAULT, "all-logits", verdict("fail", RULE, rules=looks("budget")))
    honest = trial(variant("mllama", "honest-bfloat16"), "all-logits", verdict("pass", RULE, rules=looks("cosine")))
    images = replace(seen, level="images", rules={"cosine": True})
    found = {
        each.rule: (each.caught, each.faults, each.rejected, each.honest) for each in compared([seen, images, honest])
    }
    assert found["suite all-logits"] == (1, 1, 0, 1)
    assert found["budget"] == (1, 1, 0, 1)
    assert found["cosine"] == (0, 1, 1, 1)
    assert found["exact-text"] == (0, 1, 0, 1)
    assert compared([CAUGHT, HONEST]) == []  # trials in which no rule was asked


# the journal ----------------------------------------------------------------------------------------------------------


def test_a_trial_is_found_again_by_a_later_run_unless_that_is_fresh(tmp_path: Path) -> None:
    journal = Journal(tmp_path, fresh=False)
    assert not journal.has(FAULT, "taps", "quick")
    journal.put(FAULT, "taps", "quick", CAUGHT)
    again = Journal(tmp_path, fresh=False)
    assert again.get(FAULT, "taps", "quick") == CAUGHT
    assert not again.has(FAULT, "taps", "all")
    assert not again.has(FAULT, "last-logits", "quick")
    assert not Journal(tmp_path, fresh=True).has(FAULT, "taps", "quick")


def test_a_variant_that_says_something_else_now_is_tried_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, fresh=False)
    journal.put(FAULT, "taps", "quick", CAUGHT)
    assert not journal.has(replace(FAULT, requirements=("MLLAMA-DEC-001",)), "taps", "quick")
    assert not journal.has(replace(FAULT, changes=FAULT.changes * 2), "taps", "quick")


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path, fresh=False)
    journal.put(FAULT, "taps", "quick", CAUGHT)
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"key": "mllama/x')
    again = Journal(tmp_path, fresh=False)
    assert again.has(FAULT, "taps", "quick")
