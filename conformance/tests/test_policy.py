from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance import goldens, policy
from vlmqual_conformance.outcomes import NotApplicable, is_ours, outcome_of, sentence
from vlmqual_conformance.policy import BadAnswer, Judge
from vlmqual_contract import distance
from vlmqual_contract.errors import TargetCrashed, TargetHung, TargetRaised, Unsupported, UsageError
from vlmqual_contract.records import Outcome

FAMILIES = ("idefics3", "mllama")
GOLD = np.array([[3.0, 4.0], [0.0, 5.0]])  # two vectors of length 5


def test_the_error_is_the_farthest_vector_relative_to_the_usual_length():
    value = GOLD + np.array([[0.0, 0.0], [0.3, 0.4]])
    assert distance.error(value, GOLD) == pytest.approx(0.5 / 5.0)
    assert distance.error(value, np.array([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx(
        np.hypot(0.3, 5.4) / np.sqrt(25 / 2)
    ), "a vector of gold that is zero must not blow the error up"


def test_positions_of_padding_do_not_count_even_when_they_are_nan():
    gold = np.stack([GOLD, GOLD])
    value = gold.copy()
    value[1, 0] = np.nan
    value[0, 1] += [0.0, 1.0]
    mask = np.array([[1, 1], [0, 1]])
    judge = Judge("float32")
    judge.compare("text.norm", value, gold, noise=0.05, mask=mask)
    assert judge.findings[0].error == pytest.approx(1.0 / 5.0)
    assert judge.findings[0].ratio == pytest.approx(0.2 / (policy.FACTOR * 0.05))


def test_a_bad_vector_is_seen_among_many_good_ones():
    gold = np.ones((1000, 4))
    value = gold.copy()
    value[500] = -1.0
    assert distance.error(value, gold) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (GOLD[:1], r"logits has shape \(1, 2\), not \(2, 2\)"),
        (GOLD.astype(np.int64), "logits is int64, not floating point"),
        (np.where(GOLD == 5, np.nan, GOLD), "logits holds NaN in 1 of 4 places"),
        (np.where(GOLD == 5, np.inf, GOLD), "logits holds infinity in 1 of 4 places"),
    ],
)
def test_what_is_no_answer_is_told_apart_from_a_wrong_answer(value, sentence):
    with pytest.raises(BadAnswer, match=sentence):
        Judge("float32").compare("logits", value, GOLD, noise=1.0)


def test_the_verdict_names_the_component_where_the_error_first_left_its_budget():
    judge = Judge("bfloat16")
    judge.compare("prefill/logits", GOLD * 2, GOLD, noise=0.01)
    judge.compare("text.layers.10", GOLD * 1.5, GOLD, noise=0.1)
    judge.compare("text.layers.2", GOLD * 1.5, GOLD, noise=0.1)
    judge.compare("text.embeddings", GOLD * 1.01, GOLD, noise=0.1)
    with pytest.raises(AssertionError) as caught:
        judge.verdict()
    assert judge.first_out is not None
    assert judge.first_out.component == "text.layers.2", "layer 2 comes before layer 10 and before the logits"
    assert judge.worst is not None
    assert judge.worst.component == "prefill/logits"
    assert str(caught.value).startswith("text.layers.2 is 2.5 times its budget (error 0.5, budget 0.2 in bfloat16)")
    assert "prefill/logits, 50 times" in str(caught.value)


def test_on_the_limit_is_within_budget():
    judge = Judge("float32")
    judge.compare("prefill/logits", np.array([[2.0]]), np.array([[1.0]]), noise=1.0 / policy.FACTOR)
    assert judge.findings[0].ratio == 1.0
    judge.verdict()


def test_two_answers_of_the_target_share_the_sum_of_both_budgets():
    judge = Judge("float32")
    judge.same("prefill/logits", GOLD * 1.3, GOLD, (0.05, 0.1))
    assert judge.findings[0].budget == pytest.approx(policy.FACTOR * 0.15)
    judge.verdict()
    judge.same("prefill/logits", GOLD * 1.31, GOLD, (0.05, 0.1))
    with pytest.raises(AssertionError, match=r"1\.03 times its budget"):
        judge.verdict()


def test_a_case_that_compares_nothing_cannot_pass():
    with pytest.raises(AssertionError, match="compared nothing"):
        Judge("float32").verdict()


def test_data_passes_the_vision_tower_before_the_text_model():
    names = [
        "decode/logits.02",
        "prefill/logits",
        "text.norm",
        "text.layers.11",
        "text.layers.3",
        "text.embeddings",
        "features/image_hidden_states",
        "connector",
        "vision.post_layernorm",
        "vision.layers.0",
        "vision.embeddings",
    ]
    shuffled = sorted(names)
    assert sorted(shuffled, key=policy.data_order) == names[::-1]


def test_the_kept_states_of_mllama_come_after_all_layers_and_before_the_connector():
    names = [
        "vision.embeddings",
        "vision.layers.0",
        "vision.layers.4",
        "vision.layernorm_post",
        "vision.global_layers.0",
        "vision.global_layers.1",
        "vision.intermediate_states",
        "connector",
        "features/cross_attention_states",
        "text.embeddings",
    ]
    assert sorted(sorted(names), key=policy.data_order) == names
    judge = Judge("float32")
    for name in ("features/cross_attention_states", "connector", "vision.intermediate_states"):
        judge.compare(name, GOLD * 2, GOLD, noise=0.1)
    judge.compare("vision.global_layers.1", GOLD, GOLD, noise=0.1)
    with pytest.raises(AssertionError, match=r"^vision\.intermediate_states is 5 times its budget"):
        judge.verdict()


def test_a_step_of_decoding_stands_before_the_next_one_and_its_logits_behind_its_layers():
    names = [
        "prefill/logits",
        "decode.01/text.embeddings",
        "decode.01/text.layers.0",
        "decode.01/text.layers.10",
        "decode.01/text.norm",
        "decode/logits.01",
        "decode.02/text.cross_layers.0",
        "decode.02/text.layers.0",
        "decode/logits.02",
        "decode.12/text.embeddings",
        "decode/logits.12 (by step, at once)",
    ]
    assert sorted(sorted(names), key=policy.data_order) == names


def test_blocks_of_idefics_stand_before_the_layers_of_their_numbers():
    names = [
        "vision.layers.2",
        "resampler.blocks.0",
        "resampler.blocks.1",
        "features/perceiver_embeddings",
        "text.embeddings",
        "text.cross_layers.0",
        "text.layers.0",
        "text.layers.1",
        "text.cross_layers.2",
        "text.layers.2",
        "text.cross_layers.10",
        "text.layers.10",
        "text.norm",
    ]
    assert sorted(sorted(names), key=policy.data_order) == names


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (None, Outcome.PASS, ""),
        (AssertionError("the row is 3\nassert 3 == 4"), Outcome.FAIL, "the row is 3"),
        (AssertionError("first\nsecond\n\nrest"), Outcome.FAIL, "first second"),
        (TargetRaised("IndexError", "list index"), Outcome.FAIL, "raised IndexError: list index"),
        (UsageError("heads do not divide"), Outcome.FAIL, "refused: heads do not divide"),
        (TargetCrashed("ended"), Outcome.ERROR, "ended"),
        (TargetHung("no answer"), Outcome.ERROR, "no answer"),
        (BadAnswer("NaN"), Outcome.ERROR, "NaN"),
        (Unsupported("tp"), Outcome.NOT_APPLICABLE, "tp"),
        (NotApplicable("no taps"), Outcome.NOT_APPLICABLE, "no taps"),
        (KeyError("x"), Outcome.ERROR, "the test itself failed: KeyError: 'x'"),
    ],
)
def test_what_a_test_raised_decides_the_outcome(error, outcome, reason):
    assert outcome_of(error) == (outcome, reason)
    assert is_ours(error) == reason.startswith("the test itself")


def test_a_reason_is_cut_to_what_a_reader_can_take():
    assert len(sentence("word " * 500)) <= 400


@pytest.mark.parametrize("family", FAMILIES)
def test_every_golden_has_noise_for_every_dtype_and_every_judged_tensor(family):
    assert len(goldens.goldens(family)) > 10
    for golden in goldens.goldens(family):
        for dtype in policy.DTYPES:
            for tensor in ("prefill/logits", "decode/logits"):
                assert golden.noise(tensor, dtype) > 0, f"{golden.name} has no noise of {tensor} in {dtype}"
            for prefix in ("taps/vision", "taps/prefill"):
                for name in golden.components(prefix):
                    assert golden.noise(f"{prefix}/{name}", dtype) > 0
            if golden.has_images:
                for tensor in (golden.hidden, "chain/logits"):
                    assert golden.noise(tensor, dtype) > 0, f"{golden.name} has no noise of {tensor} in {dtype}"


@pytest.mark.parametrize("family", FAMILIES)
def test_honest_arms_are_nearer_to_gold_in_wider_dtypes(family):
    for golden in goldens.goldens(family):
        noises = [golden.noise("prefill/logits", dtype) for dtype in ("float64", "float32", "float16", "bfloat16")]
        assert noises == sorted(noises), f"{golden.name}: noise does not grow from float64 to bfloat16: {noises}"


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_tokens_in_float32_are_a_demand_on_every_step_of_every_golden(family):
    """Gold's margin has to exceed what an honest float32 target may be off, or the demand would be empty or unfair."""
    for golden in goldens.goldens(family):
        ordered = np.sort(golden.logits[:-1], axis=-1)
        margin = (ordered[..., -1] - ordered[..., -2]).min()
        budget = (
            policy.FACTOR * golden.noise("decode/logits", "float32") * distance.length(golden.array("decode/logits"))
        )
        assert margin > 2 * budget, (
            f"{golden.name}: two tokens lie {margin:.2g} apart, float32 may move them {budget:.2g}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_tokens_are_the_likeliest_of_golden_logits(family):
    for golden in goldens.goldens(family):
        assert np.array_equal(golden.logits[:-1].argmax(-1), golden.tokens), golden.name


def test_a_golden_knows_what_a_target_must_offer():
    needs = {name: goldens.golden("idefics3", name).needs() for name in ("text-only", "batch-left", "photo-whole")}
    assert {name: sorted(value) for name, value in needs.items()} == {
        "text-only": [],
        "batch-left": ["batch", "padding", "vision"],
        "photo-whole": ["vision"],
    }
    assert sorted(goldens.golden("idefics3", "masked-pixels").needs(injected=False)) == ["pixel-mask"]
    assert not goldens.golden("idefics3", "padding-frames").needs(injected=False), "whole frames hide nothing in part"
    needs = {name: goldens.golden("mllama", name).needs() for name in ("text-only", "text-beside-image", "two-images")}
    assert {name: sorted(value) for name, value in needs.items()} == {
        "text-only": [],
        "text-beside-image": ["batch", "padding", "vision"],
        "two-images": ["vision"],
    }


def test_the_makers_of_goldens_are_in_the_manifest():
    assert goldens.makers("idefics3")["transformers"] == "4.46.3"
    assert goldens.makers("mllama")["transformers"] == "4.45.2"
    assert goldens.makers("idefics")["transformers"] == "4.46.3"
    assert goldens.makers("another") == {}


def test_a_gold_of_zeros_is_met_by_zeros_only():
    zeros = np.zeros((2, 3))
    assert distance.error(zeros, zeros) == 0.0
    assert distance.error(zeros + 1e-9, zeros) == float("inf")
