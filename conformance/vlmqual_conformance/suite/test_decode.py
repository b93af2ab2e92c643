"""Level decode: sixteen steps with gold's tokens forced."""

from __future__ import annotations

import pytest

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.policy import Judge, checked
from vlmqual_conformance.subjects import TargetKeeper, demand
from vlmqual_conformance.suite import runs
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Info


@requirement("IDEFICS3-DEC-001")
@pytest.mark.parametrize("case", runs.cases())
def test_logits_of_every_forced_step(
    keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    demand(info, case.needs())
    runs.compare_steps(judge, runs.forced_run(keeper, session, case), case, info)
    judge.verdict()


@requirement("IDEFICS3-DEC-003")
@pytest.mark.parametrize("case", runs.cases())
def test_greedy_tokens_of_forced_steps_are_golds(
    keeper: TargetKeeper, session: RemoteSession, info: Info, case: Golden
) -> None:
    demand(info, case.needs())
    runs.exact_only(info)
    run = runs.forced_run(keeper, session, case)
    checked("decode/logits", run.logits, case.logits.shape)
    runs.same_tokens(run.tokens[:-1], case, info)


@requirement("IDEFICS3-DEC-002")
@pytest.mark.parametrize("case", runs.cases(lambda case: case.name in ("batch-left", "photo-whole", "text-only")))
def test_the_greedy_token_has_the_largest_logit(session: RemoteSession, info: Info, case: Golden) -> None:
    demand(info, case.needs())
    step = session.prefill(case.text, case.features)
    for index in range(4):
        logits, tokens = checked("logits", step.logits(), case.logits.shape[1:]), step.tokens()
        for row, token in enumerate(tokens):
            best = logits[row].max()
            assert logits[row, token] == best, (
                f"step {index}, row {row}: token {token} has logit {logits[row, token]:.6g}, the largest is {best:.6g}"
            )
        step = session.decode(step)
