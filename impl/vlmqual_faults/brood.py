"""One session of the suite that is collected once and forked for every subject, until the first case that fails.

Run as a process of its own it reads orders from its standard input, one JSON object a line, and answers each with one
on its standard output when its fork has ended. When its input ends, so does it, with everything that it started.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from vlmqual_conformance import catalogue, goldens, outcomes, subjects
from vlmqual_conformance.conductor import CASE, Conductor
from vlmqual_contract import fixtures
from vlmqual_contract.errors import TargetHung, VlmqualError
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Outcome

_BAD = (Outcome.FAIL, Outcome.ERROR)
_GRACE_S = 5.0


@dataclass(frozen=True)
class Order:
    """What one fork is to do.

    Attributes:
        name: comes back with the answer.
        subject: target string, or name of a library with its options.
        folder: for results and temporary files; it is there, and empty.
        core: requirements whose cases come first.
        whole: judge by all other cases as well.
        first: stop at the first case that fails.
        call_s: seconds for one answer of the target.
        quiet_s: seconds after which a fork of which nothing is heard is ended.
    """

    name: str
    subject: str
    folder: str
    core: tuple[str, ...] = ()
    whole: bool = True
    first: bool = True
    call_s: float = 20.0
    quiet_s: float = 120.0


@dataclass(frozen=True)
class Answer:
    """How a fork ended.

    Attributes:
        name: of the order.
        fate: "passed"; "failed" by a case; "broken", no model could be opened; "hung", by a time limit; "lost", the
            fork itself went wrong.
        case: that failed first, "" for none.
        requirements: of that case.
        core: whether that case is of the core.
        reason: one sentence, "" where all passed.
        cases: how many were tried.
    """

    name: str
    fate: str
    case: str = ""
    requirements: tuple[str, ...] = ()
    core: bool = False
    reason: str = ""
    cases: int = 0


class Brood:
    """The pytest plugin of such a session."""

    def __init__(self) -> None:
        self._order: Order | None = None
        self._to_parent = -1
        self._answer = Answer("", "lost")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Fork for every order; each fork returns from here and goes on as a session of its own."""
        conductor = session.config.pluginmanager.get_plugin("vlmqual-conductor")
        keeper = session.config.stash[subjects.KEEPER]
        assert isinstance(conductor, Conductor)
        keeper.stop()
        self._order, self._to_parent = _serve()
        order = self._order
        self._answer = Answer(order.name, "passed")
        os.environ["PYTEST_DEBUG_TEMPROOT"] = order.folder
        results = Path(order.folder) / "results"
        plan = replace(conductor.plan, results=results, fresh=True, timeout_s=order.call_s)
        changed = replace(plan, target=order.subject) if plan.target else replace(plan, library=order.subject)
        conductor.plan = changed
        conductor.pytest_sessionstart()
        made = session.config.stash[subjects.KEEPER]
        if made is keeper:
            self._broken("the subject did not come up")
        try:
            if isinstance(made, subjects.TargetKeeper):
                made.session(subjects.tiny(conductor.plan.families[0]), subjects.options_for(made.info))
        except VlmqualError as error:
            made.stop()
            self._broken(outcomes.sentence(str(error)))
        session.items[:] = _core_first(session.items, order)

    def _broken(self, reason: str) -> None:
        assert self._order is not None
        self._tell(Answer(self._order.name, "broken", reason=reason))
        os._exit(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Stop where a case failed."""
        report = yield
        assert self._order is not None
        case, error = item.stash[CASE], call.excinfo.value if call.excinfo is not None else None
        if call.when == "setup":
            self._answer = replace(self._answer, cases=self._answer.cases + 1)
        outcome, reason = outcomes.outcome_of(error)
        if outcome in _BAD and self._answer.fate == "passed":
            core = not set(self._order.core).isdisjoint(case.ids)
            fate = "hung" if isinstance(error, TargetHung) else "failed"
            self._answer = Answer(self._order.name, fate, case.name, case.ids, core, reason, self._answer.cases)
            if self._order.first:
                item.session.shouldstop = "a case failed"
        self._tell({"at": case.name})
        return report

    def ended(self) -> None:
        """Give the answer of a fork; the session that was started has none."""
        if self._order is not None:
            self._tell(self._answer)

    def _tell(self, what: Answer | Mapping[str, Any]) -> None:
        values = asdict(what) if isinstance(what, Answer) else what
        os.write(self._to_parent, json.dumps(values).encode() + b"\n")


def _core_first(items: Sequence[pytest.Item], order: Order) -> list[pytest.Item]:
    """First one case of each requirement of the core, then a second one of each, and so on; then all others."""
    counts: Counter[str] = Counter()
    ranks = []
    for item in items:
        names = [name for name in item.stash[CASE].ids if name in order.core]
        counts.update(names)
        ranks.append(min((counts[name] for name in names), default=len(items)))
    ranked = sorted(zip(ranks, items, strict=True), key=lambda pair: pair[0])
    return [item for rank, item in ranked if order.whole or rank < len(items)]


@dataclass
class _Fork:
    order: Order
    pid: int
    pipe: int
    heard: float = field(default_factory=time.monotonic)
    text: bytes = b""
    late: bool = False


def _serve() -> tuple[Order, int]:
    """In the session that was started: never returns. In each fork: its order, and where to say how it goes."""
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ)
    forks: dict[int, _Fork] = {}
    orders = b""
    while True:
        for key, _ in waiting.select(0.5):
            found = os.read(key.fd, 2**16)
            if key.fd != 0:
                fork = forks[key.fd]
                fork.heard, fork.text = time.monotonic(), fork.text + found
                if not found:
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    del forks[key.fd]
                    os.waitpid(fork.pid, 0)
                    _say(_answer(fork))
                continue
            if not found:
                _end(list(forks.values()))
            *whole, orders = (orders + found).split(b"\n")
            for line in whole:
                order = Order(**json.loads(line))
                from_fork, to_parent = os.pipe()
                pid = os.fork()
                if pid == 0:
                    _quiet()
                    for pipe in forks:
                        os.close(pipe)
                    os.close(from_fork)
                    return order, to_parent
                os.close(to_parent)
                forks[from_fork] = _Fork(order, pid, from_fork)
                waiting.register(from_fork, selectors.EVENT_READ)
        for fork in forks.values():
            since = time.monotonic() - fork.heard
            if since > fork.order.quiet_s and not fork.late:
                fork.late = True
                os.kill(fork.pid, signal.SIGINT)  # it ends its worker
            elif since > fork.order.quiet_s + _GRACE_S and fork.late:
                os.kill(fork.pid, signal.SIGKILL)


def _answer(fork: _Fork) -> Answer:
    """What a fork said last, or what became of it."""
    lines = [json.loads(line) for line in fork.text.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    if lines and "fate" in lines[-1] and not fork.late:
        return Answer(**{**lines[-1], "requirements": tuple(lines[-1]["requirements"])})
    last = lines[-1].get("at", "") if lines else ""
    if fork.late:
        return Answer(fork.order.name, "hung", reason=f"nothing was heard for {fork.order.quiet_s:g} s after {last}")
    return Answer(fork.order.name, "lost", reason=f"the session ended after {last or 'its start'}")


def _say(answer: Answer) -> None:
    os.write(1, json.dumps(asdict(answer)).encode() + b"\n")


def _end(forks: list[_Fork]) -> None:
    """End this process and its forks."""
    for number in (signal.SIGINT, signal.SIGKILL):
        for fork in forks:
            os.kill(fork.pid, number)
        deadline = time.monotonic() + _GRACE_S
        while forks and time.monotonic() < deadline:
            forks = [fork for fork in forks if os.waitpid(fork.pid, os.WNOHANG) == (0, 0)]
            time.sleep(0.05)
    os._exit(0)


def _quiet() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(family: str, subject: str, python: str) -> None:
    """Collect the cases of a family, then serve.

    Args:
        family: `model_type`.
        subject: `--vlmqual-target=NAME` or `--vlmqual-library=NAME`, unchanged.
        python: what starts workers.
    """
    answers = os.dup(1)
    os.dup2(2, 1)  # what pytest and the conductor say
    plugin = Brood()
    for name in fixtures.names():
        fixtures.file(name)
    for golden in goldens.goldens(family):
        for each in golden.names:
            golden.array(each)
    os.dup2(answers, 1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    code = pytest.main(
        [
            *(str(catalogue.SUITE), "-c", os.devnull, "--rootdir", str(catalogue.SUITE), "--import-mode=importlib"),
            *("-p", "vlmqual_conformance.plugin", "-p", "no:cacheprovider", "-p", "no:terminal", "--capture=no"),
            *(subject, f"--vlmqual-python={python}", f"--vlmqual-family={family}"),
            f"--vlmqual-timeout={Limits().call_s}",
        ],
        plugins=[plugin],
    )
    plugin.ended()
    os._exit(int(code))


if __name__ == "__main__":
    main(*sys.argv[1:])
