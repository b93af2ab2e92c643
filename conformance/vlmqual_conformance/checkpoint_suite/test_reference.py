"""Every prompt of a reference: features, logits, forced steps and greedy tokens of the target against it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vlmqual_conformance.checkpoint_suite.margins import close, margins, rounded
from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import Judge, checked
from vlmqual_conformance.references import Reference
from vlmqual_conformance.subjects import TargetKeeper, demand
from vlmqual_conformance.suite import checks, runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info

Note = Callable[[str, object], None]


@pytest.mark.own("001")
def test_image_features_are_those_of_the_reference(
    session: RemoteSession, info: Info, judge: Judge, pictured: Golden
) -> None:
    checks.features_within_budget(session, info, judge, pictured)


@pytest.mark.own("002")
def test_logits_with_the_references_features_are_its_logits(
    session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    checks.logits_at_the_end(session, info, judge, case)


@pytest.mark.own("003")
def test_logits_from_the_references_pixels_are_its_logits(
    session: RemoteSession, info: Info, judge: Judge, pictured: Golden
) -> None:
    checks.logits_from_pixels(session, info, judge, pictured)


@pytest.mark.own("004")
def test_logits_of_every_step_under_the_references_tokens_are_its_logits(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden, record_property: Note
) -> None:
    demand(info, case.needs())
    run = runs.forced_run(keeper, session, case)
    runs.compare_steps(judge, run, case, info)
    own = checked("logits", run.logits, case.logits.shape)
    gold, limits = margins(case.logits), close(case, info)
    record_property("margins", {"reference": rounded(gold), "target": rounded(margins(own)), "limits": rounded(limits)})
    judge.verdict()
    other = own.argmax(-1) != case.logits.argmax(-1)
    for step in np.flatnonzero((other & (gold > limits)).any(axis=1)):
        raise AssertionError(
            f"after {step} forced tokens the largest logit is another one than the reference's, which lies "
            f"{gold[step].max():.3g} before its second, {limits[step].max():.3g} would be noise"
        )


@pytest.mark.own("005")
def test_greedy_tokens_part_from_the_references_only_where_it_is_close(
    session: RemoteSession, info: Info, case: Golden, record_property: Note
) -> None:
    demand(info, case.needs())
    own = runs.free(session, case.text, case.features, len(case.tokens))
    gold, limits = margins(case.logits)[:-1, 0], close(case, info)[:-1, 0]
    differs = np.flatnonzero(own[:, 0] != case.tokens[:, 0])
    if not len(differs):
        record_property("divergence", None)
        return
    step = int(differs[0])
    said = {"step": step, "token": int(own[step, 0]), "reference": int(case.tokens[step, 0])}
    record_property(
        "divergence", said | {"margin": round(float(gold[step]), 5), "limit": round(float(limits[step]), 5)}
    )
    assert gold[step] <= limits[step], (
        f"token {step} is {own[step, 0]}, not {case.tokens[step, 0]}, although the reference's two largest logits lie "
        f"{gold[step]:.3g} apart, {limits[step]:.3g} would be noise"
    )


@pytest.mark.own("006")
def test_ids_and_masks_of_a_prompt_are_those_of_the_reference(
    session: RemoteSession, reference: Reference, case: Golden
) -> None:
    if (prompt := reference.prompt(case.name)) is None:
        raise NotApplicable("an image file of the prompt is gone or was changed since the reference was made")
    made = session.preprocess([prompt])
    for name, gold in case.text.items():
        array = checks.tensor_of(made, name)
        assert array.shape == gold.shape, f"{name} has shape {array.shape}, not {gold.shape}"
        wrong = np.argwhere(array != gold)
        assert not len(wrong), (
            f"{name} differs in {len(wrong)} places, first at {', '.join(map(str, wrong[0]))}: "
            f"{array[tuple(wrong[0])]}, not {gold[tuple(wrong[0])]}"
        )
