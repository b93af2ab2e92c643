"""`vlmqual replay`: one case of the conformance suite alone, again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from vlmqual_conformance import catalogue, failures, replays, sessions
from vlmqual_conformance.replays import Replay
from vlmqual_conformance.sessions import Ended, Session
from vlmqual_contract import fixtures, records
from vlmqual_contract.discovery import parse, suite_version
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Outcome, Verdict

_WIDTH = 100
_SAID = "vlmqual conformance: "


class _Command:
    help = "run one case of the conformance suite alone, again, and say whether it still fails"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.epilog = (
            "Exit codes: 1 the case fails (a known failure, expected-fail, fails as well), 0 it passes, 2 bad usage or "
            "input, 3 the case could not be tried or was interrupted. The results of the run that FILE comes from are "
            "left as they are."
        )
        parser.add_argument(
            "file",
            type=Path,
            metavar="FILE",
            help="replay file (`vlmqual conformance` writes one for each failure into RESULTS/replay), or a results "
            "file (*.jsonl) together with --case",
        )
        parser.add_argument("--case", default="", metavar="NAME", help="case of the results file, by its full name")
        subject = parser.add_mutually_exclusive_group()
        subject.add_argument("--target", metavar="T", help="run it on this target instead of the recorded one")
        subject.add_argument("--library", metavar="L", help="run it on this library instead of the recorded one")
        parser.add_argument(
            "--python",
            metavar="PATH",
            help="interpreter of the subject's environment (default: the recorded one, and this one for a subject of "
            "another kind)",
        )
        parser.add_argument(
            "--timeout",
            type=float,
            metavar="S",
            help=f"seconds for one answer of the subject (default: as recorded, else {Limits().call_s:g})",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Run the case; 1 when it fails again."""
        replay = replays.read(args.file, args.case)
        trial = _Trial(replay, _session(args, replay))
        for line in _warnings(replay):
            print(f"vlmqual replay: warning: {line}", file=sys.stderr)
        return trial.run()


def _session(args: argparse.Namespace, replay: Replay) -> Session:
    """The session of the one case.

    Raises:
        UsageError: the case does not exist, or is not one of this kind of subject.
    """
    file = sessions.file_of(replay.case)
    files = sorted(path.name for path in _scope(replay).suite.glob("test_*.py"))
    if not replay.requirements or file.endswith(".toml"):
        raise UsageError(f"no test stands behind {replay.case!r}: there is nothing to run")
    if file not in files:
        raise UsageError(f"the suite has no case {replay.case!r}; it has no file {file!r}{replays.near(file, files)}")
    given = "target" if args.target else "library" if args.library else replay.kind
    if given != replay.kind:
        raise UsageError(f"{replay.case} is checked on a {replay.kind}; give --{replay.kind} instead of --{given}")
    subject = args.target or args.library or replay.subject
    alike = parse(subject).kind == parse(replay.subject).kind
    session = Session(
        kind=replay.kind,
        subject=subject,
        results=Path(),
        timeout_s=args.timeout if args.timeout is not None else replay.timeout_s or Limits().call_s,
        python=args.python or (replay.python if alike else "") or None,
        cases=(replay.case,),
        known=tuple(path for path in map(Path, replay.known) if path.is_file()),
        fresh=True,
        checkpoint=Path(replay.checkpoint) if replay.checkpoint else None,
        reference=Path(replay.reference) if replay.reference else None,
    )
    sessions.check(session)
    return session


def _scope(replay: Replay) -> catalogue.Scope:
    return catalogue.CHECKPOINT if replay.checkpoint else catalogue.FIXTURES


def _warnings(replay: Replay) -> list[str]:
    """What differs between the run that is recorded and this one."""
    found = [f"the file of known failures {path} is gone" for path in replay.known if not Path(path).is_file()]
    if replay.version != suite_version():
        found.append(f"recorded by vlmqual {replay.version or '?'}, this is {suite_version()}")
    elif not found and replay.suite != catalogue.digest(
        [*map(Path, replay.known), *catalogue.requirement_files(_scope(replay))]
    ):
        found.append("tests, requirements or known failures are not those of the recorded run")
    if replay.fixtures != fixtures.digest():
        found.append("the fixtures are not those of the recorded run")
    return found


@dataclass(frozen=True)
class _Trial:
    """A recorded case and the session that tries it again."""

    replay: Replay
    session: Session

    def run(self) -> int:
        """Print what is tried, try it, print what came of it; the exit code."""
        self._announce()
        with tempfile.TemporaryDirectory(prefix="vlmqual-replay-") as folder:
            ended = sessions.run(replace(self.session, results=Path(folder)), quiet=True)
            run = records.read(Path(ended.path)) if ended.path else None
        verdict = next((row for row in run.verdicts if row.case == self.replay.case), None) if run else None
        if run is None or verdict is None:
            return _not_run(ended)
        if ended.said:
            print(ended.said, file=sys.stderr)
        self._tell(verdict, emulated=bool(run.header.info.get("emulated")))
        print(self._conclusion(verdict))
        if verdict.outcome is Outcome.NOT_APPLICABLE:
            return EXIT_INCOMPLETE
        mended = _passed(verdict) and not _passed(self.replay)
        return EXIT_FAILED if verdict.outcome in replays.FAILED and not mended else EXIT_OK

    def _announce(self) -> None:
        replay, session = self.replay, self.session
        _line("case", replay.case)
        known = catalogue.requirements(_scope(replay))
        for name in replay.requirements:
            item = known.get(name)
            _line("requirement", f"{name} {item.keyword}: {item.statement}" if item else f"{name}, not in this suite")
        _line("subject", session.name + (f", python {session.python}" if session.python else ""))
        where = "" if session.subject == replay.subject else f" on {replay.subject}"
        _line("recorded", f"{replay.outcome}{where}" + (f": {replay.reason}" if replay.reason else ""))
        sys.stdout.flush()

    def _tell(self, verdict: Verdict, *, emulated: bool) -> None:
        if verdict.dtype or emulated:
            _line("dtype", (verdict.dtype or "none") + (", emulated" if emulated else ""))
        _line("outcome", verdict.outcome)
        _line("reason", verdict.reason)
        _line("observed", str(verdict.details.get("observed") or ""))
        _line("component", verdict.component)
        _line("worst", "" if verdict.worst is None else f"{verdict.worst:.4g} times the budget")

    def _conclusion(self, verdict: Verdict) -> str:
        """Whether that is what the file says."""
        before, now = self.replay.outcome, verdict.outcome
        if now is Outcome.NOT_APPLICABLE:
            return "not tried: now not-applicable"
        if _passed(verdict) and not _passed(self.replay):
            return "not reproduced: now pass, which a known failure does not expect"
        if _passed(self.replay) and not _passed(verdict):
            return f"not reproduced: passed although a known failure, now {now}"
        if before not in replays.FAILED:
            return f"as recorded: {now}" if now is before else f"not as recorded: was {before}, now {now}"
        if now not in replays.FAILED:
            return f"not reproduced: now {now}"
        differs = []
        if (before is Outcome.ERROR) != (now is Outcome.ERROR):
            differs.append(f"was {before}, now {now}")
        if self.replay.component != verdict.component:
            differs.append(f"component was {self.replay.component or 'none'}, now {verdict.component or 'none'}")
        words = "reproduced" + (" (expected-fail: a known failure)" if now is Outcome.EXPECTED_FAIL else "")
        return f"{words}, but otherwise: {'; '.join(differs)}" if differs else words


def _passed(row: Replay | Verdict) -> bool:
    """True for a known failure that passed: the run counts it as a failure, the case itself is right."""
    return row.outcome is Outcome.FAIL and row.reason.startswith(failures.PASSED)


def _not_run(ended: Ended) -> int:
    """Say why there is no verdict.

    Raises:
        UsageError: the session could not begin for a mistake of the user.
    """
    lines = ended.said.splitlines() or ["the session ended without a verdict"]
    if ended.exit == EXIT_USAGE:
        raise UsageError(lines[-1].removeprefix(_SAID))
    print(f"vlmqual replay: the case was not run: {lines[-1].removeprefix(_SAID)}", file=sys.stderr)
    return EXIT_INCOMPLETE


def _line(name: str, text: str) -> None:
    """One field, wrapped; nothing for an empty one."""
    if text:
        lines = textwrap.wrap(text, _WIDTH - 13, break_long_words=False, break_on_hyphens=False)
        print(f"{name:<13}" + ("\n" + " " * 13).join(lines))


command = _Command()
