"""Level prefill: logits of prompts, with gold image features injected and from golden pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden, golden, goldens
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.subjects import TargetKeeper, options_for
from vlmqual_conformance.suite import checks, idefics_files
from vlmqual_conformance.suite.idefics_files import Stored, Tensors, stored
from vlmqual_conformance.suite.idefics_images import (
    FAMILY,
    as_features,
    cases,
    continued,
    settings,
    several,
    states,
    unseeing,
)
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, Info

TEXT_RULES = tuple(f"IDEFICS-DECODER-{number:03}" for number in range(1, 8))
IMAGE_RULES = tuple(f"IDEFICS-CROSS-{number:03}" for number in (1, 2, 4, 5))
TABLE, MORE_ROWS = "model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"
HEAD, MORE_COLUMNS = "lm_head.weight", "lm_head.additional_fc.weight"


def with_rules() -> list[Any]:
    """Every golden with the rules that it is about beyond those of all."""
    found = []
    for case in goldens(FAMILY):
        ids = []
        if settings(case.checkpoint)["qk_layer_norms"]:
            ids.append("IDEFICS-CROSS-003")
        if unseeing(case).any():
            ids.append("IDEFICS-CROSS-006")
        if several(case):
            ids.append("IDEFICS-CROSS-007")
        found.append(pytest.param(case, id=case.name, marks=[requirement(*ids)] if ids else []))
    return sorted(found, key=lambda parameter: parameter.values[0].checkpoint)


# goldens --------------------------------------------------------------------------------------------------------------


@requirement(*IMAGE_RULES, *TEXT_RULES)
@pytest.mark.parametrize("case", with_rules())
def test_logits_of_a_prompt_with_gold_features(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_at_the_end(session, info, judge, case)


@requirement("IDEFICS-DECODER-006", "IDEFICS-DECODER-007", needs=[Capability.ALL_LOGITS])
@pytest.mark.parametrize("case", cases(lambda case: case.has("prefill/all_logits")))
def test_logits_of_every_position(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_at_every_position(session, info, judge, case)


@requirement("IDEFICS-DECODER-009")
@pytest.mark.parametrize("case", cases())
def test_logits_of_a_prompt_from_pixels(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    checks.logits_from_pixels(session, info, judge, case)


@requirement("IDEFICS-DECODER-006", needs=[Capability.ALL_LOGITS])
@pytest.mark.parametrize("name", ["two-images", "text-only"])
def test_tokens_that_come_later_do_not_change_earlier_positions(
    session: RemoteSession, info: Info, judge: Judge, name: str
) -> None:
    checks.earlier_positions_keep(session, info, judge, golden(FAMILY, name))


# images ---------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-CROSS-005")
@pytest.mark.parametrize("case", cases(several))
def test_features_in_another_order_belong_to_other_columns_of_the_mask(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    there = session.prefill(case.text, case.features).logits()
    here = session.prefill(case.text, as_features(case, states(case)[:, ::-1])).logits()
    noise = case.noise("prefill/logits", info.dtype)
    checks.told_apart(judge, "prefill/logits (images exchanged)", here, there, noise, "two images are not told apart")


@requirement("IDEFICS-CROSS-002")
@pytest.mark.parametrize("case", cases(lambda case: case.name in ("photo", "resampler-photo")))
def test_the_order_of_the_features_of_an_image_does_not_matter(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    order = np.random.default_rng(3).permutation(states(case).shape[2])
    mixed = session.prefill(case.text, as_features(case, states(case)[:, :, order])).logits()
    noise = case.noise("prefill/logits", info.dtype)
    gold = case.array("prefill/logits")
    judge.same("prefill/logits (features in another order)", mixed, gold, (noise, noise))
    judge.verdict()


# checkpoints with other tensors ---------------------------------------------------------------------------------------


def opened(
    keeper: TargetKeeper, info: Info, folder: Path, change: Any, settings: dict[str, Any] | None = None
) -> RemoteSession:
    """The tiny checkpoint with other tensors and settings."""
    return keeper.session(idefics_files.copy(folder / "changed", change, settings=settings), options_for(info))


@requirement("IDEFICS-DECODER-001", "IDEFICS-DECODER-007")
def test_the_additional_vocabulary_is_a_continuation_of_the_first(
    keeper: TargetKeeper, info: Info, judge: Judge, tmp_path: Path
) -> None:
    def joined(tensors: Tensors) -> Tensors:
        made = {name: value for name, value in tensors.items() if name not in (MORE_ROWS, MORE_COLUMNS)}
        for first, second in ((TABLE, MORE_ROWS), (HEAD, MORE_COLUMNS)):
            made[first] = Stored(np.concatenate([tensors[first].bits, tensors[second].bits]))
        return made

    case, config = golden(FAMILY, "two-images"), settings()
    rows = config["vocab_size"] + config["additional_vocab_size"]
    assert (case.text["input_ids"] >= config["vocab_size"]).any(), f"{case.name} has no additional id"
    changed = opened(keeper, info, tmp_path, joined, {"vocab_size": rows, "additional_vocab_size": 0})
    seen = changed.prefill(case.text, case.features).logits()
    judge.compare("prefill/logits", seen, case.array("prefill/logits"), case.noise("prefill/logits", info.dtype))
    judge.verdict()


@requirement("IDEFICS-DECODER-007", "IDEFICS-DEC-006")
def test_an_additional_id_is_chosen_where_its_logit_is_the_largest(
    keeper: TargetKeeper, info: Info, judge: Judge, tmp_path: Path
) -> None:
    case, words = golden(FAMILY, "photo"), int(settings()["vocab_size"])
    gold = case.array("prefill/logits")
    # Large enough that one of the additional logits leads every other one, and a power of two.
    factor = 2.0 ** np.ceil(np.log2(2 * np.abs(gold).max() / np.abs(gold[:, words:]).max()))
    sign = -1.0 if gold[0, words:].max() < -gold[0, words:].min() else 1.0

    def louder(tensors: Tensors) -> Tensors:
        return {**tensors, MORE_COLUMNS: stored(tensors[MORE_COLUMNS].wide() * factor * sign)}

    changed = opened(keeper, info, tmp_path, louder)
    step = changed.prefill(case.text, case.features)
    wanted = gold.copy()
    wanted[:, words:] *= factor * sign
    noise = case.noise("prefill/logits", info.dtype)
    judge.compare("prefill/logits", step.logits(), wanted, noise)
    judge.verdict()
    token = int(step.tokens()[0])
    assert token == int(wanted[0].argmax()), f"token {token} is chosen, not {int(wanted[0].argmax())}"
    assert token >= words, f"token {token} is not of the additional vocabulary"
    by_step = changed.decode(step).logits()
    at_once = changed.prefill(continued(case, token), case.features).logits()
    label = f"decode/logits (token {token} fed back, at once)"
    judge.same(label, by_step, at_once, (case.noise("decode/logits", info.dtype), noise))
    judge.verdict()


@requirement("IDEFICS-CROSS-004")
def test_a_gate_of_one_number_is_a_vector_of_equal_numbers(
    keeper: TargetKeeper, info: Info, judge: Judge, tmp_path: Path
) -> None:
    width = int(settings()["hidden_size"])

    def spread(tensors: Tensors) -> Tensors:
        return {
            name: Stored(np.broadcast_to(value.bits, (1, 1, width)).copy()) if ".alpha_" in name else value
            for name, value in tensors.items()
        }

    case = golden(FAMILY, "photo")
    changed = opened(keeper, info, tmp_path, spread, {"alpha_type": "vector"})
    seen = changed.prefill(case.text, case.features).logits()
    judge.compare("prefill/logits", seen, case.array("prefill/logits"), case.noise("prefill/logits", info.dtype))
    judge.verdict()


@requirement("IDEFICS-CROSS-004")
@pytest.mark.parametrize("closed", ["alpha_cross_attn", "alpha_dense"])
def test_a_gate_of_zero_closes_its_branch_and_no_other(
    keeper: TargetKeeper, info: Info, judge: Judge, tmp_path: Path, closed: str
) -> None:
    def shut(tensors: Tensors) -> Tensors:
        return {
            name: Stored(np.zeros_like(value.bits)) if name.endswith(closed) else value
            for name, value in tensors.items()
        }

    case = golden(FAMILY, "photo")
    noise = case.noise("prefill/logits", info.dtype)
    changed = opened(keeper, info, tmp_path, shut)
    there = changed.prefill(case.text, case.features).logits()
    here = changed.prefill(case.text, as_features(case, -states(case))).logits()
    if closed == "alpha_cross_attn":
        judge.same("prefill/logits (another image behind closed gates)", here, there, (noise, noise))
        judge.verdict()
    else:
        label = "prefill/logits (another image, feed-forward closed)"
        checks.told_apart(judge, label, here, there, noise, "the gate of the feed-forward closes the attention too")
    label = f"prefill/logits ({closed} closed, open)"
    gold = case.array("prefill/logits")
    checks.told_apart(judge, label, there, gold, noise, f"{closed} is not looked at")
