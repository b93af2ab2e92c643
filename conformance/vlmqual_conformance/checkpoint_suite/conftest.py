"""The checkpoint, its sessions, and the prompts that its tests are repeated for."""

from __future__ import annotations

from typing import Any

import pytest

from vlmqual_conformance.checkpoint_suite.asking import Asker, length
from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.references import Over, Reference
from vlmqual_conformance.subjects import OVER, RANKS, TargetKeeper
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import Capability, Info, Model, Options

#: Stands where the name of a prompt would, so that a run without a reference shows what it did not judge.
NONE = "no-reference"
OWN = "own"


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark that stands for a requirement of whatever family the checkpoint is of."""
    config.addinivalue_line("markers", f"{OWN}(number): requirement FAMILY-CKPT-number that the test checks")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tie a test to the requirement of the checkpoint's family."""
    over = item.config.stash.get(OVER, None)
    if over is not None and (mark := item.get_closest_marker(OWN)) is not None:
        item.add_marker(requirement(f"{over.model.family.upper()}-CKPT-{mark.args[0]}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat tests that take `case` for every prompt of the reference, `pictured` for those with images."""
    over = metafunc.config.stash.get(OVER, None)
    prompts: list[dict[str, Any]] = list(over.reference.record["prompts"]) if over and over.reference else []
    for name, wanted in (("case", prompts), ("pictured", [item for item in prompts if item["images"]])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [item["name"] for item in wanted] or [NONE], indirect=True)


@pytest.fixture
def over(request: pytest.FixtureRequest) -> Over:
    """The checkpoint that the run is over."""
    found = request.config.stash[OVER]
    assert found is not None, "these tests are about a user's checkpoint"
    return found


@pytest.fixture
def reference(over: Over) -> Reference:
    """The checkpoint's reference."""
    if over.reference is None:
        raise NotApplicable("no reference of the checkpoint is given; vlmqual reference makes one")
    return over.reference


@pytest.fixture
def case(request: pytest.FixtureRequest, reference: Reference) -> Golden:
    """A prompt of the reference."""
    return reference.golden(request.param)


@pytest.fixture
def pictured(request: pytest.FixtureRequest, reference: Reference) -> Golden:
    """A prompt of the reference that has images."""
    if request.param == NONE:
        raise NotApplicable("no prompt of the reference has images")
    return reference.golden(request.param)


@pytest.fixture
def model(over: Over) -> Model:
    """The checkpoint, in the place of the fixtures'."""
    return over.model


def _options(over: Over, info: Info, tp: int = 1) -> Options:
    return Options(tp=tp, max_length=length(over), batch=2 if Capability.BATCH in info.capabilities else 1)


@pytest.fixture
def session(over: Over, keeper: TargetKeeper) -> RemoteSession:
    """The checkpoint, opened in the target without taps."""
    return keeper.session(over.model, _options(over, keeper.info))


@pytest.fixture
def ranks(over: Over, keeper: TargetKeeper) -> RemoteSession:
    """The checkpoint, opened over `RANKS` ranks."""
    return keeper.ranks(RANKS, over.model, _options(over, keeper.info, RANKS))


@pytest.fixture
def asker(keeper: TargetKeeper, session: RemoteSession, over: Over) -> Asker:
    """Puts questions to the target."""
    return Asker(keeper, session, over)
