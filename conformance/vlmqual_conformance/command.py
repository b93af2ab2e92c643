"""`vlmqual conformance`: one pytest session for each target, and one for each library that the targets use."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from vlmqual_conformance import catalogue, failures, replays, sessions, waivers
from vlmqual_conformance.references import over
from vlmqual_conformance.sessions import Ended, Session
from vlmqual_contract import fixtures
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.requirement import LEVELS
from vlmqual_contract.target import FAMILIES

DEFAULT_TARGET = "eager"
_WORST_FIRST = (EXIT_USAGE, EXIT_INCOMPLETE, EXIT_FAILED, EXIT_OK)


class _Command:
    help = "judge targets, and the libraries they use, against the requirements"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "--target",
            action="append",
            metavar="T",
            help=f"target string, kind[:key=value,...] or path.py:Name; may be repeated (default {DEFAULT_TARGET})",
        )
        parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be repeated")
        parser.add_argument(
            "--level", action="append", nargs="+", choices=LEVELS, metavar="L", help=f"only: {', '.join(LEVELS)}"
        )
        parser.add_argument(
            "--requirement",
            action="append",
            metavar="ID",
            help="only cases that carry this requirement id; may be repeated",
        )
        parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
        parser.add_argument("--python", metavar="PATH", help="interpreter of the environment that the targets live in")
        parser.add_argument(
            "--timeout", type=float, default=Limits().call_s, metavar="S", help="seconds for one answer of a target"
        )
        parser.add_argument(
            "--jobs",
            type=int,
            default=1,
            metavar="N",
            help="judge so many targets at a time; what is said of each is printed when it is done (default 1)",
        )
        parser.add_argument("--fresh", action="store_true", help="begin anew instead of continuing an unfinished run")
        parser.add_argument("--no-library", action="store_true", help="leave out the libraries that the targets use")
        parser.add_argument("-k", dest="keyword", default="", metavar="EXPR", help="only cases that match, as pytest's")
        parser.add_argument("--known", type=Path, action="append", default=[], metavar="FILE", help="known failures")
        parser.add_argument(
            "--waivers",
            type=Path,
            action="append",
            default=[],
            metavar="FILE",
            help="budgets that may be exceeded, with reason and expiry",
        )
        parser.add_argument(
            "--reference", type=Path, metavar="DIR", help="judge by a reference of your checkpoint (vlmqual reference)"
        )
        parser.add_argument(
            "--checkpoint",
            type=Path,
            metavar="DIR",
            help="judge over your checkpoint: relations that need no reference",
        )
        parser.add_argument("--dry-run", action="store_true", help="say what would be run, start nothing")

    def run(self, args: argparse.Namespace) -> int:
        """Judge every subject; the worst exit code."""
        targets = list(dict.fromkeys(args.target or [DEFAULT_TARGET]))
        _check(args, targets)
        if args.dry_run:
            return _plan(args, targets)
        ended = _ended([_session(args, "target", target) for target in targets], args.jobs)
        alone = args.no_library or args.checkpoint is not None or args.reference is not None
        if not alone and not {EXIT_USAGE, EXIT_INCOMPLETE} & {item.exit for item in ended}:
            libraries = dict.fromkeys(item.library for item in ended if item.library)
            ended += _ended([_session(args, "library", library) for library in libraries], args.jobs)
        if not any(item.path for item in ended) and all(item.exit == EXIT_OK for item in ended):
            raise UsageError("nothing is selected: no case belongs to these families, levels, requirements, expression")
        return next(code for code in _WORST_FIRST if any(item.exit == code for item in ended))


def _check(args: argparse.Namespace, targets: Sequence[str]) -> None:
    """Find the mistakes that can be found without starting anything."""
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs} is no number of targets; it has to be at least 1")
    for text in targets:
        sessions.check(_session(args, "target", text))
    if args.results.exists() and not args.results.is_dir():
        raise UsageError(f"--results {args.results} is no folder")
    about = over(args.checkpoint, args.reference)
    if about is not None and set(args.family or ()) - {about.model.family}:
        raise UsageError(f"--family {args.family[0]}: {about.model.path} is a checkpoint of {about.model.family}")
    known = catalogue.requirements(_scope(args)) if args.requirement else {}
    for name in args.requirement or ():
        if name not in known:
            raise UsageError(f"--requirement {name}: there is no such requirement{replays.near(name, known)}")
    failures.load_known(args.known)
    waivers.load_live(args.waivers, date.today())
    fixtures.root()


def _ended(wanted: Sequence[Session], jobs: int) -> list[Ended]:
    """Run sessions, so many at a time. The first that cannot be asked for what it should do is the last that begins."""
    ended: list[Ended] = []
    if jobs == 1 or len(wanted) < 2:
        for session in wanted:
            ended.append(sessions.run(session))
            if ended[-1].exit == EXIT_USAGE:
                break
        return ended
    with ThreadPoolExecutor(jobs) as pool:
        begun = [pool.submit(_told, session) for session in wanted]
        try:
            for future in as_completed(begun):
                found, said = future.result()
                print(said, end="", flush=True)
                ended.append(found)
        except KeyboardInterrupt:  # it reaches the sessions as well; those that have not begun do not begin
            pool.shutdown(cancel_futures=True)
            raise
    return ended


def _told(session: Session) -> tuple[Ended, str]:
    """Run a session beside others, and keep what it prints."""
    with tempfile.TemporaryFile() as output:
        ended = sessions.run(session, output=output)
        output.seek(0)
        return ended, output.read().decode("utf-8", "replace")


def _session(args: argparse.Namespace, kind: str, subject: str) -> Session:
    return Session(
        kind=kind,
        subject=subject,
        results=args.results,
        timeout_s=args.timeout,
        python=args.python,
        families=tuple(args.family or ()),
        levels=tuple(level for group in args.level or () for level in group),
        requirements=tuple(args.requirement or ()),
        keyword=args.keyword,
        known=tuple(args.known),
        waivers=tuple(args.waivers),
        fresh=args.fresh,
        checkpoint=args.checkpoint,
        reference=args.reference,
    )


def _scope(args: argparse.Namespace) -> catalogue.Scope:
    is_own = args.checkpoint is not None or args.reference is not None
    return catalogue.CHECKPOINT if is_own else catalogue.FIXTURES


def _plan(args: argparse.Namespace, targets: Sequence[str]) -> int:
    """Print what would be run: requirements by level for each kind of subject."""
    levels = {level for group in args.level or () for level in group} or set(LEVELS)
    about = over(args.checkpoint, args.reference)
    families = {about.model.family} if about else set(args.family or FAMILIES)
    known = catalogue.requirements(_scope(args))
    ids = set(args.requirement or known)
    chosen = [r for r in known.values() if r.level in levels and r.family in families and r.id in ids]
    for subject, kind in (
        *((target, "target") for target in targets),
        *([] if args.no_library or about else [("the libraries that these targets use", "library")]),
    ):
        counts: Counter[str] = Counter(item.level for item in chosen if item.subject == kind)
        print(f"{subject}: {sum(counts.values())} requirements")
        for level in LEVELS:
            if counts[level]:
                print(f"  {level:<12}{counts[level]:>4}")
    print(f"results would go to {args.results}; nothing was started")
    return EXIT_OK


command = _Command()
