"""Other rules of comparison, by their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.policy import BadAnswer, Judge
from vlmqual_conformance.rules import RULES, Sayings, looking, passing

LOGITS = "decode/logits.03"
GOLD = np.array([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])  # (B, V)
ALL = {"cosine", "top-5", "exact-text", "torch-close", "numpy-close"}


def moved(row: int, token: int, by: float) -> np.ndarray:
    value = GOLD.copy()
    value[row, token] += by
    return value


def test_gold_itself_passes_by_every_rule() -> None:
    assert passing(LOGITS, GOLD, GOLD, "float32") == ALL
    assert passing("features/x", GOLD, GOLD, "float32") == {"cosine", "torch-close", "numpy-close"}


@pytest.mark.parametrize(
    ("component", "rules"),
    [
        ("features/image_hidden_states", {"budget", "cosine", "torch-close", "numpy-close"}),
        ("prefill/logits", set(RULES)),
        ("prefill/all_logits", set(RULES)),
        ("decode/logits.07", set(RULES)),
        ("text.layers.3", set()),
        ("decode.07/text.layers.3", set()),  # a tap of a step
        ("connector", set()),
    ],
)
def test_rules_look_at_what_a_harness_sees_and_at_no_tap(component: str, rules: set[str]) -> None:
    assert set(looking(component)) == rules


def test_exact_text_asks_for_the_same_largest_logit_in_every_row() -> None:
    assert "exact-text" in passing(LOGITS, moved(1, 6, 0.9), GOLD, "float32")
    assert "exact-text" not in passing(LOGITS, moved(1, 6, 1.1), GOLD, "float32")


def test_top_5_asks_that_each_ones_first_is_among_the_others_first_five() -> None:
    assert "top-5" in passing(LOGITS, moved(0, 4, 10.0), GOLD, "float32")  # gold's fifth came first
    assert "top-5" not in passing(LOGITS, moved(0, 5, 10.0), GOLD, "float32")  # gold's sixth did
    assert "top-5" in passing(LOGITS, moved(0, 0, -4.5), GOLD, "float32")  # gold's first came fifth: 8 7 6 5 4.5
    assert "top-5" not in passing(LOGITS, moved(0, 0, -5.5), GOLD, "float32")  # it came sixth


def test_the_cosine_is_that_of_the_whole_tensor() -> None:
    aside = np.zeros_like(GOLD)
    aside[0, :2] = 8.0, -9.0  # at a right angle to gold
    square = float((GOLD**2).sum())

    def tilted(cosine: float) -> np.ndarray:
        return GOLD + aside * np.sqrt(square * (1 / cosine**2 - 1) / float((aside**2).sum()))

    assert "cosine" in passing(LOGITS, tilted(0.9901), GOLD, "float32")
    assert "cosine" not in passing(LOGITS, tilted(0.9899), GOLD, "float32")
    assert "cosine" in passing(LOGITS, 3 * GOLD, GOLD, "float32")


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [("float32", 1.3e-6, 1e-5), ("bfloat16", 1.6e-2, 1e-5), ("float16", 1e-3, 1e-5), ("float64", 1e-7, 1e-7)],
)
def test_torchs_tolerances_are_those_of_the_dtype_for_every_element(
    dtype: str, relative: float, absolute: float
) -> None:
    limit = absolute + relative * GOLD[1, 2]
    assert "torch-close" in passing(LOGITS, moved(1, 2, 0.99 * limit), GOLD, dtype)
    assert "torch-close" not in passing(LOGITS, moved(1, 2, 1.01 * limit), GOLD, dtype)


def test_numpys_tolerances_do_not_ask_for_the_dtype() -> None:
    limit = 1e-8 + 1e-5 * GOLD[1, 2]
    for dtype in ("float32", "bfloat16"):
        assert "numpy-close" in passing(LOGITS, moved(1, 2, 0.99 * limit), GOLD, dtype)
        assert "numpy-close" not in passing(LOGITS, moved(1, 2, 1.01 * limit), GOLD, dtype)


def test_positions_of_padding_do_not_count() -> None:
    mask = np.array([[1, 0]])
    assert passing("prefill/all_logits", moved(1, 3, 99.0)[None], GOLD[None], "float32", mask) == ALL
    assert "cosine" not in passing("prefill/all_logits", moved(0, 7, 99.0)[None], GOLD[None], "float32", mask)


# in a case ------------------------------------------------------------------------------------------------------------


def test_a_judge_asks_the_rules_only_where_a_session_does() -> None:
    plain = Judge("float32")
    plain.compare(LOGITS, GOLD, GOLD, 1e-6)
    assert plain.sayings is None


def test_a_rule_that_fails_once_has_failed_in_the_case() -> None:
    judge = Judge("float32", sayings=Sayings())
    judge.compare("features/x", GOLD, GOLD, 1e-6)
    judge.compare("text.layers.0", -GOLD, GOLD, 1e-6)  # a tap: nobody looks
    assert judge.sayings is not None
    assert judge.sayings.plain() == {"looked": ["budget", "cosine", "numpy-close", "torch-close"], "failed": []}
    judge.compare(LOGITS, moved(1, 6, 1.1), GOLD, 1e-6)
    judge.compare("decode/logits.04", GOLD, GOLD, 1e-6)
    assert judge.sayings.plain() == {
        "looked": sorted(RULES),
        "failed": ["budget", "exact-text", "numpy-close", "torch-close"],
    }


def test_two_answers_of_the_target_are_no_comparison_with_gold() -> None:
    judge = Judge("float32", sayings=Sayings())
    judge.same(LOGITS, GOLD, -GOLD, (1e-6, 1e-6))
    assert judge.sayings == Sayings()


def test_an_answer_of_another_shape_fails_by_every_rule() -> None:
    judge = Judge("float32", sayings=Sayings())
    with pytest.raises(BadAnswer):
        judge.compare(LOGITS, GOLD[:1], GOLD, 1e-6)
    assert judge.sayings is not None
    assert judge.sayings.failed == set(RULES)
