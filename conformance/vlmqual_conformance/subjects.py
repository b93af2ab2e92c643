"""The fixtures of the suite: the target or library under test, alive again after every crash.

A target case takes `session` (the checkpoint of its golden, or the tiny one of its family, opened once and kept),
`ranks` (the same over several ranks), `target`, `info`, `judge`; a library case takes `library`. None of them is ever
in this process: see `vlmqual_contract.remote`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

import pytest

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.policy import Judge
from vlmqual_conformance.references import Over
from vlmqual_conformance.rules import Sayings
from vlmqual_conformance.waivers import Waiver
from vlmqual_contract import fixtures
from vlmqual_contract.errors import TargetFailure, TargetHung, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.remote import LibraryProcess, RemoteSession, RemoteTarget
from vlmqual_contract.subject import RemoteLibrary
from vlmqual_contract.target import Capability, Info, Model, Options

#: Cache positions, enough for the longest golden case and its steps; rows of the widest golden case.
MAX_LENGTH = 2048
ROWS = 2
#: Compute threads of every worker: the models are tiny, and sums come in the same order on every machine.
THREADS = 1
#: After so many hung cases in a row no further case of a target is tried; each would take its whole time limit.
PATIENCE = 5
#: Ranks of the level parallel.
RANKS = 2
#: The checkpoint of cases that are about no golden of another.
TINY = {"idefics": "idefics-tiny", "idefics3": "idefics3-tiny", "mllama": "mllama-tiny"}


class TargetKeeper:
    """Holds the target's worker and the one model that is open in it.

    Attributes:
        text: target string.
        info: what the target says of itself.
        hung: cases in a row that ended because the target hung.
        memory: what one case computed and others use as well.
    """

    def __init__(
        self, text: str, *, python: str | None = None, limits: Limits | None = None, threads: int | None = THREADS
    ) -> None:
        self.text = text
        self._threads = threads
        self.hung = 0
        self.memory: dict[Hashable, object] = {}
        self._python = python
        self._limits = limits or Limits()
        self._target: RemoteTarget | None = None
        self._session: RemoteSession | None = None
        self._opened: tuple[Model, Options] | None = None
        self._refused: dict[tuple[Model, Options], tuple[int, TargetFailure | UsageError]] = {}
        self._ranks: dict[int, RemoteTarget] = {}
        self._over_ranks: dict[int, tuple[tuple[Model, Options], RemoteSession]] = {}
        self.info: Info = self.target().info

    def target(self) -> RemoteTarget:
        """The target, started again when its process is gone.

        Raises:
            TargetHung: it has hung in the last `PATIENCE` cases.
        """
        if self.hung >= PATIENCE:
            raise TargetHung(f"not tried: the target hung in each of the {self.hung} cases before")
        if self._target is None or not self._target.alive:
            self._session = self._opened = None
            self._target = RemoteTarget(self.text, python=self._python, threads=self._threads, limits=self._limits)
        return self._target

    def session(self, model: Model, options: Options) -> RemoteSession:
        """An opened model; the one opened before stays open until another is asked for.

        Raises:
            TargetFailure, UsageError: the target cannot open it; after two times that is not tried again.
        """
        key = (model, options)
        target = self.target()
        if self._session is not None and self._opened == key:
            return self._session
        times, error = self._refused.get(key, (0, None))
        if error is not None and times >= 2:
            raise error
        try:
            self._session, self._opened = None, None
            self._session = target.open(model, options)
        except (TargetFailure, UsageError) as failure:
            self._refused[key] = (times + 1, failure)
            raise
        self._opened = key
        return self._session

    def ranks(self, size: int, model: Model, options: Options) -> RemoteSession:
        """A model opened over `size` ranks, which are started once; it stays open until another is asked for.

        Raises:
            TargetFailure, UsageError: the ranks do not come up; that is not tried a third time.
        """
        key = (model, options)
        target = self._ranks.get(size)
        if target is None or not target.alive:
            target = None
            self._over_ranks.pop(size, None)
        if size in self._over_ranks and self._over_ranks[size][0] == key:
            return self._over_ranks[size][1]
        times, error = self._refused.get(key, (0, None))
        if error is not None and times >= 2:
            raise error
        self._over_ranks.pop(size, None)  # opening another model closes the one before
        try:
            if target is None:
                target = RemoteTarget(
                    self.text, tp=size, python=self._python, threads=self._threads, limits=self._limits
                )
                self._ranks[size] = target
            self._over_ranks[size] = (key, target.open(model, options))
        except (TargetFailure, UsageError) as failure:
            self._refused[key] = (times + 1, failure)
            raise
        return self._over_ranks[size][1]

    def ended(self, error: BaseException | None) -> None:
        """Take note of how a case ended."""
        self.hung = self.hung + 1 if isinstance(error, TargetHung) else 0

    def stop(self) -> None:
        """End every process."""
        for target in [*self._ranks.values(), *([self._target] if self._target else [])]:
            target.stop()


class LibraryKeeper:
    """Holds the library's worker.

    Attributes:
        name: name of the library.
        version: its version.
        families: families whose classes it has.
        emulated: True when it runs over an emulator.
        hung: cases in a row that ended because the library hung.
    """

    def __init__(self, text: str, *, python: str | None = None, limits: Limits | None = None) -> None:
        self._text = text
        self.hung = 0
        self._python = python
        self._limits = limits or Limits()
        self._process: LibraryProcess | None = None
        library = self.library()
        self.name, self.version = library.name, library.version
        self.families, self.emulated = library.families, library.emulated

    def library(self) -> RemoteLibrary:
        """The library, started again when its process is gone.

        Raises:
            TargetHung: it has hung in the last `PATIENCE` cases.
        """
        if self.hung >= PATIENCE:
            raise TargetHung(f"not tried: the library hung in each of the {self.hung} cases before")
        if self._process is None or not self._process.alive:
            self._process = LibraryProcess(self._text, python=self._python, threads=1, limits=self._limits)
        return self._process.library

    def ended(self, error: BaseException | None) -> None:
        """Take note of how a case ended."""
        self.hung = self.hung + 1 if isinstance(error, TargetHung) else 0

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.stop()


KEEPER = pytest.StashKey[TargetKeeper | LibraryKeeper]()
#: The user's checkpoint that a run is over, None for the fixtures.
OVER = pytest.StashKey[Over | None]()
FAMILY = pytest.StashKey[str]()
#: What a case is given by waivers.
WAIVERS = pytest.StashKey[tuple[Waiver, ...]]()


def demand(info: Info, needs: Iterable[Capability]) -> None:
    """Go on only where the target offers all of these.

    Raises:
        NotApplicable: names what is missing.
    """
    if missing := sorted(set(needs) - info.capabilities):
        raise NotApplicable(f"the target does not declare {', '.join(missing)}")


def options_for(info: Info, tp: int = 1) -> Options:
    """How the suite opens every model: for the widest golden batch, with taps where the target has them."""
    return Options(tp=tp, max_length=MAX_LENGTH, batch=ROWS, taps=Capability.TAPS in info.capabilities)


def tiny(family: str) -> Model:
    """The tiny checkpoint of a family."""
    return Model(str(fixtures.checkpoint(TINY[family])), family)


def checkpoint_of(item: pytest.Item, family: str) -> str:
    """Name of the checkpoint that a case's golden belongs to, or of the tiny one of its family."""
    parameters = getattr(item, "callspec", None)  # tests without parameters have none
    golden = parameters.params.get("case") if parameters is not None else None
    return golden.checkpoint if isinstance(golden, Golden) else TINY[family]


@pytest.fixture
def keeper(request: pytest.FixtureRequest) -> TargetKeeper:
    """The holder of the target, for what the other fixtures do not offer."""
    keeper = request.config.stash[KEEPER]
    assert isinstance(keeper, TargetKeeper), "this run is about a library, not a target"
    return keeper


@pytest.fixture
def target(keeper: TargetKeeper) -> RemoteTarget:
    """The target under test."""
    return keeper.target()


@pytest.fixture
def info(keeper: TargetKeeper) -> Info:
    """What the target says of itself."""
    return keeper.info


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    """The checkpoint that the case's golden belongs to, or the tiny one of the case's family."""
    family = request.node.stash[FAMILY]
    return Model(str(fixtures.checkpoint(checkpoint_of(request.node, family))), family)


@pytest.fixture
def session(model: Model, keeper: TargetKeeper) -> RemoteSession:
    """The case's checkpoint, opened in the target."""
    return keeper.session(model, options_for(keeper.info))


@pytest.fixture
def ranks(model: Model, keeper: TargetKeeper) -> RemoteSession:
    """The case's checkpoint, opened over `RANKS` ranks with one thread each."""
    return keeper.ranks(RANKS, model, options_for(keeper.info, tp=RANKS))


@pytest.fixture
def judge(info: Info, pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Judge:
    """Collects comparisons; the plugin puts `worst` and `component` into the verdict."""
    sayings = Sayings() if pytestconfig.getoption("vlmqual_rules") else None
    return Judge(info.dtype, sayings=sayings, waivers=request.node.stash.get(WAIVERS, ()))


@pytest.fixture
def library(request: pytest.FixtureRequest) -> RemoteLibrary:
    """The library under test, in its worker."""
    keeper = request.config.stash[KEEPER]
    assert isinstance(keeper, LibraryKeeper), "this run is about a target, not a library"
    return keeper.library()


@pytest.fixture(scope="session")
def checkpoint_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for checkpoints that differ from a fixture in a file or two."""
    return tmp_path_factory.mktemp("checkpoints")
