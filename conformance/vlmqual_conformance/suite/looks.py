"""Looking at a target for the precision detective: runs of the golden cases of its fingerprints."""

from __future__ import annotations

import numpy as np

from vlmqual_conformance.detective import Seen
from vlmqual_conformance.goldens import Golden, golden
from vlmqual_conformance.policy import checked
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite.runs import forced, forced_run
from vlmqual_contract import resemblance
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.resemblance import STEPS, Fingerprints
from vlmqual_contract.target import Capability, FloatArray


def look(family: str, prints: Fingerprints, keeper: TargetKeeper, session: RemoteSession) -> Seen:
    """Run those of the cases that the target's capabilities allow."""
    offered = keeper.info.capabilities
    text: dict[str, tuple[FloatArray, FloatArray]] = {}
    moved: dict[str, FloatArray] = {}
    for name in prints.cases:
        case = golden(family, name)
        if case.needs() <= offered:
            logits = _logits(keeper, session, case)
        elif case.needs(injected=False) <= offered:
            steps = STEPS[-1] if Capability.FORCED_TOKENS in offered else 0
            logits = forced(session, {**case.text, **case.pixels}, None, case.tokens[:steps]).logits
        else:
            continue
        gold = case.logits
        text[name] = _picked(logits, gold[: len(logits)])
        if (
            name in prints.moved
            and case.features is not None
            and {Capability.VISION, Capability.FORCED_TOKENS} <= offered
        ):
            beside = resemblance.shifted(case.features)
            there = forced(session, case.text, beside, case.tokens[: STEPS[-1]]).logits
            moved[name] = _picked(there, gold[: len(there)])[0]
    case = golden(family, prints.pictured)
    vision = None
    if Capability.VISION in offered and case.needs(injected=False) <= offered:
        name = case.hidden
        right = case.array(name)
        hidden = checked(name, session.vision(case.pixels).arrays()[name.removeprefix("features/")], right.shape)
        vision = resemblance.features_of(hidden), resemblance.features_of(right)
    return Seen(text, vision, moved)


def _logits(keeper: TargetKeeper, session: RemoteSession, case: Golden) -> FloatArray:
    """Of the run that other cases look at as well; only the prompt's where tokens cannot be forced."""
    if Capability.FORCED_TOKENS not in keeper.info.capabilities:
        return forced(session, case.text, case.features, []).logits
    return forced_run(keeper, session, case).logits


def _picked(logits: FloatArray, gold: FloatArray) -> tuple[FloatArray, FloatArray]:
    wide = checked("logits", np.asarray(logits), gold.shape)
    return resemblance.logits_of(wide), resemblance.logits_of(gold)
