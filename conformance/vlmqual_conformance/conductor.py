"""One pytest session as one run: starts the subject, chooses its cases, writes a verdict for each, says how it went."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vlmqual_conformance import (
    budgets,
    catalogue,
    failures,
    goldens,
    marks,
    outcomes,
    policy,
    progress,
    references,
    replays,
    subjects,
    waivers,
)
from vlmqual_conformance.catalogue import Case
from vlmqual_conformance.failures import Failure
from vlmqual_conformance.outcomes import outcome_of
from vlmqual_conformance.plan import Plan
from vlmqual_conformance.waivers import Waiver
from vlmqual_contract import fixtures, machine
from vlmqual_contract.discovery import code_digest, parse, suite_version
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, TargetFailure, VlmqualError
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Header, Outcome, Verdict, Writer, finite
from vlmqual_contract.requirement import LEVELS, Requirement
from vlmqual_contract.target import FAMILIES, Info

CASE = pytest.StashKey[Case]()


@dataclass
class _Running:
    """What is known of the case in flight."""

    error: BaseException | None = None
    text: str = ""
    seconds: float = 0.0
    judge: policy.Judge | None = None
    noted: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Counts:
    """What the collection found."""

    cases: list[Case] = field(default_factory=list)
    whole: bool = False


class Conductor:
    """Runs one subject: starts it, chooses its cases, writes its verdicts."""

    def __init__(self, config: pytest.Config, plan: Plan) -> None:
        self.plan = plan
        self._config = config
        self._found = _Counts()
        self._requirements: dict[str, Requirement] = {}
        self._failures: list[Failure] = []
        self._waivers: list[Waiver] = []
        self._keeper: subjects.TargetKeeper | subjects.LibraryKeeper | None = None
        self._writer: Writer | None = None
        self._reporter: progress.Reporter | None = None
        self._running = _Running()
        self._planned: list[str] = []
        self._stopped: tuple[str, int] | None = None
        self._chosen = self._several = False
        self._exit = EXIT_INCOMPLETE
        self._broken: list[str] = []

    # start and collection --------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Start the subject; what prevents that ends the session with one sentence."""
        try:
            known = catalogue.requirements(self.plan.scope)
            over = self.plan.over
            self._requirements = {k: r for k, r in known.items() if over is None or r.family == over.model.family}
            self._failures = [
                *failures.load_known(),
                *(failures.load_known(self.plan.known) if self.plan.known else ()),
            ]
            self._waive()
            limits = Limits(call_s=self.plan.timeout_s)
            if self.plan.target:
                self._keeper = subjects.TargetKeeper(
                    self.plan.target, python=self.plan.python, limits=limits, threads=self._threads
                )
                dtype = self._keeper.info.dtype
                if dtype not in policy.DTYPES:
                    valid = ", ".join(policy.DTYPES)
                    sentence = f"{self.plan.target} declares the compute dtype {dtype!r}; valid are {valid}"
                    self._stopped = (sentence, EXIT_USAGE)
                elif over is not None and over.reference is not None and dtype not in over.reference.dtypes:
                    sentence = f"{over.reference.folder} has no noise of {dtype}; make it with --dtypes float32,{dtype}"
                    self._stopped = (sentence, EXIT_USAGE)
            else:
                self._keeper = subjects.LibraryKeeper(self.plan.library, python=self.plan.python, limits=limits)
        except TargetFailure as failure:
            self._stopped = (f"{self.plan.subject} did not come up: {failure}", EXIT_FAILED)
        except VlmqualError as mistake:
            self._stopped = (str(mistake), EXIT_USAGE)
        if self._keeper is not None:
            self._config.stash[subjects.KEEPER] = self._keeper

    def _waive(self) -> None:
        """Read waivers, and compare the goldens' budgets with the lock.

        Raises:
            UsageError: a file is damaged, a user's waiver has expired, or a budget was changed.
        """
        today, ours = date.today(), waivers.load([waivers.OURS])
        self._waivers = [*ours, *waivers.load_live(self.plan.waivers, today)]
        if self.plan.target and self.plan.over is None:
            budgets.check(self.plan.families or FAMILIES, today=today, given=self._waivers)
        self._waivers = [waiver for waiver in self._waivers if not waiver.has_expired(today)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """End the session here when it could not start: pytest says nothing of an exit from here on."""
        if self._stopped is not None:
            self._leave(*self._stopped)

    def _leave(self, sentence: str, code: int = EXIT_USAGE) -> NoReturn:
        self._exit = code
        self._status()
        print(f"vlmqual conformance: {sentence}", file=sys.stderr)
        pytest.exit(sentence, returncode=code)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        """Check tests against requirements, then keep the cases of this subject, by family and level."""
        if not session.testsfailed:  # else a test file cannot be imported; pytest says which
            self._choose(items)
        yield
        self._chosen = not session.testsfailed

    def _choose(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.stash[CASE] = case_of(item)
        self._found.cases = [item.stash[CASE] for item in items]
        self._found.whole = _is_whole(self._config, self.plan.scope)
        if found := catalogue.problems(self._found.cases, self._requirements, whole=self._found.whole):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            self._leave(f"{found[0]}{more}")
        names = [case.name for case in self._found.cases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            self._leave(f"two cases are called {twice[0]}")
        if unknown := [name for name in self.plan.cases if name not in names]:
            self._leave(f"the suite has no case {unknown[0]!r}{replays.near(unknown[0], names)}")
        kept = [item for item in items if self._mine(item.stash[CASE])]
        kept.sort(key=self._place)
        items[:] = kept
        self._several = len({self._first(item.stash[CASE]).family for item in kept}) > 1
        for item in kept:
            case = item.stash[CASE]
            item.stash[subjects.FAMILY] = self._first(case).family
            item.stash[subjects.WAIVERS] = tuple(each for each in self._waivers if each.names(case.name, case.ids))

    def _first(self, case: Case) -> Requirement:
        return self._requirements[case.ids[0]]

    def _level_of(self, case: Case) -> str:
        """The level as a reader sees it: with the family where there are several."""
        first = self._first(case)
        return f"{first.family} {first.level}" if self._several else first.level

    def _place(self, item: pytest.Item) -> tuple[int, int, bool]:
        """By family, level and checkpoint: one is open at a time, and opening another takes its time."""
        first = self._first(item.stash[CASE])
        other = subjects.checkpoint_of(item, first.family) != subjects.TINY[first.family]
        return FAMILIES.index(first.family), LEVELS.index(first.level), other

    def _mine(self, case: Case) -> bool:
        first, plan = self._first(case), self.plan
        if (plan.cases and case.name not in plan.cases) or not _overlap(plan.requirements, case.ids):
            return False
        subject = "target" if plan.target else "library"
        return first.subject == subject and first.family in (plan.families or FAMILIES) and first.level in plan.levels

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Open the results file; cases with a verdict from an earlier, unfinished run are not run again."""
        if not self._chosen or self._config.option.collectonly:
            return
        rows = self._rows_without_a_test()
        self._planned = [item.stash[CASE].name for item in session.items] + [row.case for row in rows]
        if not self._planned:
            self._exit = EXIT_OK
            self._status()
            print(f"{self.plan.subject}: nothing is selected")
            pytest.exit("nothing is selected", returncode=EXIT_OK)
        try:
            self._writer = Writer.start(self.plan.results, self._header(), fresh=self.plan.fresh)
        except VlmqualError as mistake:
            self._leave(str(mistake))
        done = self._writer.done
        again = f", {len(done)} of them from a run that was not finished" if done else ""
        title = f"{self.plan.subject}\n  {self._about()}\n  {len(self._planned)} cases{again}"
        session.items[:] = [item for item in session.items if item.stash[CASE].name not in done]
        if not done:
            others = {case.name for case in self._found.cases} - set(self._planned)
            folder = self.plan.results / replays.folder(self.plan.subject)
            replays.tidy(folder, self._planned, others if self._found.whole else None)
        self._reporter = progress.Reporter(title, len(session.items))
        for row in rows:
            if row.case not in done:
                self._writer.add(row)
        self._status()

    def _rows_without_a_test(self) -> list[Verdict]:
        """Verdicts that need no test: requirements that cannot be tested, known failures that name nothing."""
        rows: list[Verdict] = []
        plan = self.plan
        if plan.library and not plan.keyword and not plan.cases:
            families = plan.families or FAMILIES
            for item in self._requirements.values():
                chosen = item.family in families and item.level in plan.levels
                if item.untested and chosen and _overlap(plan.requirements, [item.id]):
                    name = f"{item.family}.toml::{item.id}"
                    verdict = Verdict(name, (item.id,), item.family, item.level, Outcome.NOT_APPLICABLE, item.untested)
                    rows.append(verdict)
        for entry in self._concerned() if self._found.whole and not plan.select else ():
            if not any(entry.names(case.name, case.ids) for case in self._found.cases):
                text = f"the known failure {entry.case!r} of {entry.file} names nothing: {entry.reason}"
                rows.append(Verdict(f"{entry.file}::{entry.case}", (), "", "", Outcome.FAIL, text))
        for waiver in self._waivers if self._found.whole and plan.target and not plan.select else ():
            if waiver.case and not any(waiver.names(case.name, case.ids) for case in self._found.cases):
                text = f"the waiver of {waiver.case!r} in {waiver.file} names nothing: {waiver.reason}"
                rows.append(Verdict(f"{waiver.file}::{waiver.case}", (), "", "", Outcome.FAIL, text))
        return rows

    def _concerned(self) -> list[Failure]:
        name, version = self._library()
        dtype, runtime = (self._info.dtype, self._info.runtime) if self._info else ("", "")
        return [entry for entry in self._failures if entry.concerns(name, version, dtype, runtime)]

    @property
    def _info(self) -> Info | None:
        return self._keeper.info if isinstance(self._keeper, subjects.TargetKeeper) else None

    def _library(self) -> tuple[str, str]:
        """Name and version of the library whose known failures count."""
        if isinstance(self._keeper, subjects.LibraryKeeper):
            return self._keeper.name, self._keeper.version
        info = self._info
        assert info is not None, "the subject has not been started"
        name = parse(info.library).kind if info.library else ""
        return name, info.software.get(name) or info.version

    def _emulated(self) -> bool:
        subject = self._keeper if isinstance(self._keeper, subjects.LibraryKeeper) else self._info
        return subject is not None and subject.emulated

    def _about(self) -> str:
        if (info := self._info) is None:
            return " ".join(self._library()) + (" (emulated)" if self._emulated() else "")
        return f"{info.name} {info.version} on {info.device}, {info.runtime}, compute dtype {info.dtype}"

    def _header(self) -> Header:
        name, version = self._library()
        info = {**asdict(self._info), "capabilities": sorted(self._info.capabilities)} if self._info else {}
        families = self.plan.families or tuple(sorted({item.family for item in self._requirements.values()}))
        extra = [*self.plan.known, *self.plan.waivers, *catalogue.requirement_files(self.plan.scope)]
        return Header(
            kind="conformance",
            subject=self.plan.subject,
            suite=suite_version(),
            info=info or {"name": name, "version": version, "library": name, "emulated": self._emulated()},
            machine=machine.describe(),
            command=self.plan.command,
            plan={
                "families": list(families),
                "levels": list(self.plan.levels),
                "fixtures": fixtures.digest(),
                "suite": catalogue.digest(extra),
                "code": code_digest(self.plan.target or self.plan.library),
                "select": self.plan.select,
                "requirements": list(self.plan.requirements),
                "python": self.plan.python or "",
                "threads": self._threads or "",
                "calibration": self._is_calibration(families),
                "budget": f"{policy.FACTOR:g} x the noise of the worst honest arm",
                "waivers": [waiver.plain() for waiver in self._waivers],
                **self._own(),
            },
        )

    @property
    def _threads(self) -> int | None:
        """Compute threads of a worker; over a user's checkpoint the target chooses."""
        return subjects.THREADS if self.plan.over is None else None

    def _is_calibration(self, families: Iterable[str]) -> bool:
        """True when the subject's library is what made that by which it is judged."""
        name, version = self._library()
        if (over := self.plan.over) is not None:
            return over.reference is not None and over.reference.maker == (name, version)
        return any(goldens.makers(family).get(name) == version for family in families)

    def _own(self) -> dict[str, Any]:
        """Which checkpoint of the user's own, and by which reference."""
        if (over := self.plan.over) is None:
            return {}
        digest = over.reference.digest if over.reference else ""
        return {"checkpoint": over.name, "reference": digest, "over": over.paths}

    # one case --------------------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Around a case: remember what happens, then write its verdict."""
        case = item.stash[CASE]
        if self._reporter:
            self._reporter.starting(self._level_of(case))
        self._running = _Running()
        result = yield
        if self._keeper is not None:
            self._keeper.ended(self._running.error)
        self._running.noted = dict(item.user_properties)
        self._conclude(case)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Cases that cannot be tried on this target or library end here."""
        case = item.stash[CASE]
        family = self._first(case).family
        if isinstance(self._keeper, subjects.LibraryKeeper):
            if family not in self._keeper.families:
                raise outcomes.NotApplicable(f"{self._about()} has no classes of the family {family}")
        elif (info := self._info) is not None:
            if family not in info.families:
                raise outcomes.NotApplicable(f"the target does not open models of the family {family}")
            subjects.demand(info, catalogue.needs(case, self._requirements))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep what was raised first, the time of the call, and the comparisons."""
        report = yield
        if call.when == "call":
            self._running.seconds = call.duration
        judge = getattr(item, "funcargs", {}).get("judge")
        if isinstance(judge, policy.Judge):
            self._running.judge = judge
        if call.excinfo is not None and self._running.error is None:
            self._running.error = call.excinfo.value
            self._running.text = str(report.longrepr or "")
        return report

    def _conclude(self, case: Case) -> None:
        running, first = self._running, self._first(case)
        if isinstance(running.error, (KeyboardInterrupt, pytest.exit.Exception)):
            return
        outcome, reason = outcome_of(running.error)
        if outcomes.is_ours(running.error):
            self._broken.append(f"{case.name}\n{running.text or traceback.format_exception(running.error)}")
        entries = [entry for entry in self._concerned() if entry.names(case.name, case.ids)]
        judged = failures.judge(outcome, reason, entries, date.today())
        details: dict[str, Any] = {**judged.details, **running.noted}
        # What fails for another reason than a budget, a token for one, has no component but that of no numbers.
        worst, component = None, running.error.component if isinstance(running.error, policy.BadAnswer) else ""
        if (judge := running.judge) is not None and judge.findings:
            farthest, left = judge.worst, judge.first_out
            worst = finite(farthest.ratio) if farthest is not None else None
            shown = left or (farthest if outcome is Outcome.PASS else None)
            component = shown.component if shown is not None else component
            details |= waivers.used(judge.waived) if judged.outcome is Outcome.PASS else {}
            details["ratios"] = {finding.component: finite(round(finding.ratio, 4)) for finding in judge.findings}
        if judge is not None and judge.sayings is not None:
            details["rules"] = judge.sayings.plain()
        info = self._info
        verdict = Verdict(
            case=case.name,
            requirements=case.ids,
            family=first.family,
            level=first.level,
            outcome=judged.outcome,
            reason=judged.reason,
            worst=worst,
            component=component,
            dtype=info.dtype if info else "",
            seconds=round(running.seconds, 4),
            details=details,
        )
        if self._writer is not None:
            if verdict.outcome in replays.FAILED:
                verdict = self._replayable(verdict, self._writer)
            self._writer.add(verdict)
        if self._reporter is not None:
            self._reporter.ended(verdict)

    def _replayable(self, verdict: Verdict, writer: Writer) -> Verdict:
        """The verdict, naming the replay file that it now has."""
        plan, header = self.plan, writer.header
        path = replays.place(plan.subject, verdict.case)
        replay = replays.record(
            verdict,
            kind="target" if plan.target else "library",
            subject=plan.target or plan.library,
            python=plan.python or "",
            timeout_s=plan.timeout_s,
            known=tuple(map(str, plan.known)),
            emulated=self._emulated(),
            version=header.suite,
            suite=header.plan["suite"],
            fixtures=header.plan["fixtures"],
            run=header.run,
            **(plan.over.paths if plan.over else {}),
        )
        replays.write(plan.results / path, replay)
        return replace(verdict, details={**verdict.details, "replay": path.as_posix()})

    # end -------------------------------------------------------------------------------------------------------------

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Say why a test file cannot be collected."""
        if report.failed:
            print(f"{report.nodeid}: {report.longrepr}", file=sys.stderr)

    def pytest_internalerror(self, excrepr: object) -> None:
        """Say what went wrong in the machine itself."""
        print(excrepr, file=sys.stderr)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the footer when every case has its verdict; say how it went."""
        if self._keeper is not None:
            self._keeper.stop()
        if self._reporter is not None:
            self._reporter.close()
        writer = self._writer
        if writer is None:
            return
        if all(name in writer.done for name in self._planned):
            writer.finish()
            bad = {Outcome.FAIL, Outcome.ERROR}
            verdicts = [row for row in writer.done.values() if isinstance(row, Verdict)]
            self._exit = EXIT_FAILED if any(row.outcome in bad for row in verdicts) else EXIT_OK
            for text in self._broken:
                print(text, file=sys.stderr)
            print(progress.summary(verdicts, self._reporter.width if self._reporter else 80))
            print("\n".join([*references.told(verdicts), f"  {progress.counted(verdicts)}"]))
        else:
            done = sum(name in writer.done for name in self._planned)
            print(f"  incomplete: {done} of {len(self._planned)} cases have a verdict; the same command resumes")
        print(f"  results: {writer.path}")
        if any(isinstance(row, Verdict) and "replay" in row.details for row in writer.done.values()):
            print(f"  replay: {self.plan.results / replays.folder(self.plan.subject)}")
        session.exitstatus = self._exit
        self._status()

    def _status(self) -> None:
        if self.plan.status is None:
            return
        name = info.library if (info := self._info) is not None else self.plan.library
        path = str(self._writer.path) if self._writer else ""
        state = {"exit": self._exit, "library": name, "path": path}
        self.plan.status.write_text(json.dumps(state), "utf-8")


def case_of(item: pytest.Item) -> Case:
    """Name and marks of a test."""
    ids: list[str] = []
    needs: set[Any] = set()
    for mark in item.iter_markers(marks.NAME):
        ids += [name for name in mark.args if name not in ids]
        needs.update(mark.kwargs.get("needs", ()))
    name = f"{item.path.name}::{item.nodeid.partition('::')[2]}"
    names: Sequence[str] = getattr(item, "fixturenames", ())
    return Case(name, tuple(ids), frozenset(needs), catalogue.LIBRARY_FIXTURE in names)


def _overlap(wanted: Sequence[str], ids: Iterable[str]) -> bool:
    return not wanted or not set(wanted).isdisjoint(ids)


def _is_whole(config: pytest.Config, scope: catalogue.Scope) -> bool:
    """True when the whole suite is collected, not some files of it."""
    names = {str(arg) for arg in config.args}
    package = f"vlmqual_conformance.{scope.suite.name}"
    return package in names or any(Path(name).resolve() == scope.suite for name in names)
