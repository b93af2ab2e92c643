"""What a target seems to compute in, from the way in which its answers differ from gold; see `detective`."""

from __future__ import annotations

from collections.abc import Callable

from vlmqual_conformance import detective
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import Finding, Judge
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_conformance.suite.looks import look
from vlmqual_contract.remote import RemoteSession

Record = Callable[[str, object], None]


@requirement("IDEFICS-PREC-001")
def test_idefics_is_computed_as_declared(
    keeper: TargetKeeper, session: RemoteSession, judge: Judge, record_property: Record
) -> None:
    computes_as_declared("idefics", keeper, session, judge, record_property)


@requirement("IDEFICS3-PREC-001")
def test_idefics3_is_computed_as_declared(
    keeper: TargetKeeper, session: RemoteSession, judge: Judge, record_property: Record
) -> None:
    computes_as_declared("idefics3", keeper, session, judge, record_property)


@requirement("MLLAMA-PREC-001")
def test_mllama_is_computed_as_declared(
    keeper: TargetKeeper, session: RemoteSession, judge: Judge, record_property: Record
) -> None:
    computes_as_declared("mllama", keeper, session, judge, record_property)


def computes_as_declared(
    family: str, keeper: TargetKeeper, session: RemoteSession, judge: Judge, record_property: Record
) -> None:
    """Look at the fingerprint's cases, say what the target seems to compute in, and fail where that is less."""
    prints = detective.fingerprints(family)
    seen = look(family, prints, keeper, session)
    if not seen.text:
        raise NotApplicable("the target offers too little for any case of the fingerprints")
    found = detective.find(prints, judge.dtype, seen)
    record_property("precision", found.plain())
    if found.unclear:
        raise NotApplicable(f"nothing can be said of the precision: {found}")
    judge.findings += [Finding(f"precision/{one.side}", one.size, one.limit) for one in found.opinions]
    assert not found.accused, str(found)
