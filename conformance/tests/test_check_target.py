from __future__ import annotations

from pathlib import Path

import pytest

from vlmqual_contract import cli
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE

TOY = f"{Path(__file__).with_name('toy_target.py')}:Toy"


def test_an_adapter_that_keeps_the_contract_is_told_so(capsys):
    assert cli.main(["check-target", TOY]) == EXIT_OK
    text = capsys.readouterr().out
    for phase in ("open", "preprocess", "prefill", "logits", "tokens", "decode", "close"):
        assert f"ok    idefics3: {phase}" in text
    assert "vision" not in text.partition("capabilities")[2].partition("ok")[2], "what is not declared is not asked for"
    assert "meets the contract" in text


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("raise", "FAIL  idefics3: prefill: IndexError: row 7"),
        ("crash", "SIGSEGV"),
        ("hang", "no answer to prefill"),
        ("float-tokens", "FAIL  idefics3: tokens: tokens are float64, not int64"),
        ("nan", "FAIL  idefics3: logits: logits has values that are not finite"),
        ("short", "FAIL  idefics3: logits: logits have shape"),
        ("none", "FAIL  idefics3: logits: logits: the target answered NoneType"),
        ("fixed", "FAIL  idefics3: costs: costs tell of decode, not of decode, prefill"),
        ("lists", "FAIL  idefics3: preprocess: preprocess: input_ids: the target answered list"),
    ],
)
def test_what_an_adapter_does_wrong_is_named_and_the_check_comes_to_its_end(capsys, bad, sentence):
    assert cli.main(["check-target", f"{TOY}:bad={bad}", "--timeout", "3"]) == EXIT_FAILED
    text = capsys.readouterr().out
    assert sentence in text
    assert "checks failed" in text


def test_a_target_that_does_not_start_is_the_users_mistake(capsys):
    assert cli.main(["check-target", f"{TOY}:bad=usage"]) == EXIT_USAGE
    assert "refused by the toy" in capsys.readouterr().err


def test_a_target_that_does_not_preprocess_is_fed_golden_inputs(capsys):
    assert cli.main(["check-target", f"{TOY}:bad=no-preprocess"]) == EXIT_OK
    text = capsys.readouterr().out
    assert "inputs of a golden" in text
    assert "ok    idefics3: decode" in text


def test_a_time_limit_has_to_be_positive(capsys):
    assert cli.main(["check-target", TOY, "--timeout", "-1"]) == EXIT_USAGE
    assert "--timeout -1" in capsys.readouterr().err
