"""`vlmqual conformance`: one pytest session for each target, and one for each library that the targets use."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmqual_conformance import catalogue, failures
from vlmqual_contract import fixtures
from vlmqual_contract.discovery import TARGETS, installed, parse
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.requirement import LEVELS
from vlmqual_contract.target import FAMILIES

DEFAULT_TARGET = "eager"
_PYTEST_USAGE = 4
_WORST_FIRST = (EXIT_USAGE, EXIT_INCOMPLETE, EXIT_FAILED, EXIT_OK)


@dataclass(frozen=True)
class Ended:
    """How the session of one subject ended.

    Attributes:
        subject: target string, or "library NAME".
        exit: exit code.
        library: name of the library that the subject uses or is.
        path: results file, "" where none was begun.
    """

    subject: str
    exit: int
    library: str = ""
    path: str = ""


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
        parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
        parser.add_argument("--python", metavar="PATH", help="interpreter of the environment that the targets live in")
        parser.add_argument(
            "--timeout", type=float, default=Limits().call_s, metavar="S", help="seconds for one answer of a target"
        )
        parser.add_argument("--fresh", action="store_true", help="begin anew instead of continuing an unfinished run")
        parser.add_argument("--no-library", action="store_true", help="leave out the libraries that the targets use")
        parser.add_argument("-k", dest="keyword", default="", metavar="EXPR", help="only cases that match, as pytest's")
        parser.add_argument("--known", type=Path, action="append", default=[], metavar="FILE", help="known failures")
        parser.add_argument("--dry-run", action="store_true", help="say what would be run, start nothing")

    def run(self, args: argparse.Namespace) -> int:
        """Judge every subject; the worst exit code."""
        targets = list(dict.fromkeys(args.target or [DEFAULT_TARGET]))
        _check(args, targets)
        if args.dry_run:
            return _plan(args, targets)
        ended: list[Ended] = []
        for target in targets:
            ended.append(_session(args, "target", target))
            if ended[-1].exit == EXIT_USAGE:
                return EXIT_USAGE
        if not args.no_library and not any(item.exit == EXIT_INCOMPLETE for item in ended):
            for library in dict.fromkeys(item.library for item in ended if item.library):
                ended.append(_session(args, "library", library))
                if ended[-1].exit == EXIT_USAGE:
                    return EXIT_USAGE
        if not any(item.path for item in ended) and all(item.exit == EXIT_OK for item in ended):
            raise UsageError("nothing is selected: no case belongs to these families and levels and to this expression")
        return next(code for code in _WORST_FIRST if any(item.exit == code for item in ended))


def _check(args: argparse.Namespace, targets: Sequence[str]) -> None:
    """Find the mistakes that can be found without starting anything."""
    points = installed(TARGETS)
    for text in targets:
        spec = parse(text)
        if spec.file and not Path(spec.file).is_file():
            raise UsageError(f"target file {spec.file} does not exist")
        if spec.kind and spec.kind not in points and args.python is None:
            raise UsageError(f"target {spec.kind!r} is not installed; installed are {', '.join(points) or 'none'}")
    if args.timeout <= 0:
        raise UsageError(f"--timeout {args.timeout:g} is no time; it has to be above 0 seconds")
    if args.results.exists() and not args.results.is_dir():
        raise UsageError(f"--results {args.results} is no folder")
    failures.load_known(args.known)
    fixtures.root()


def _session(args: argparse.Namespace, kind: str, subject: str) -> Ended:
    """Run one pytest session in a process of its own, to its end also when the user interrupts it."""
    with tempfile.TemporaryDirectory(prefix="vlmqual-") as folder:
        status = Path(folder) / "status.json"
        command = [
            *_pytest(args, folder),
            f"--vlmqual-{kind}={subject}",
            f"--vlmqual-results={args.results}",
            f"--vlmqual-timeout={args.timeout}",
            f"--vlmqual-command={shlex.join(['vlmqual', *sys.argv[1:]])}",
            f"--vlmqual-status={status}",
            *[f"--vlmqual-known={path}" for path in args.known],
            *(["--vlmqual-fresh"] if args.fresh else []),
            *([f"--vlmqual-python={args.python}"] if args.python else []),
        ]
        code = _wait(subprocess.Popen(command, env=_environment()))
        name = subject if kind == "target" else f"library {subject}"
        if code == _PYTEST_USAGE:
            return Ended(name, EXIT_USAGE)
        if not status.is_file():
            return Ended(name, EXIT_INCOMPLETE)
        state: dict[str, Any] = json.loads(status.read_text("utf-8"))
    # The status is written at the start as well: the exit code of a session that died says that it did.
    return Ended(name, state["exit"] if code == state["exit"] else EXIT_INCOMPLETE, state["library"], state["path"])


def _pytest(args: argparse.Namespace, folder: str) -> list[str]:
    """The command line of pytest without any configuration file or plugin but ours."""
    levels = [level for group in args.level or () for level in group]
    return [
        *(sys.executable, "-m", "pytest", str(catalogue.SUITE)),
        *("-c", os.devnull, "--rootdir", str(catalogue.SUITE), "--import-mode=importlib"),
        *("-p", "vlmqual_conformance.plugin", "-p", "no:cacheprovider", "-p", "no:terminal"),
        *(f"--basetemp={folder}/tmp",),
        *(["-k", args.keyword] if args.keyword else []),
        *[f"--vlmqual-family={family}" for family in args.family or ()],
        *[f"--vlmqual-level={level}" for level in levels],
    ]


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return environment


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a session. Ctrl-C reaches it as well; it then closes its results file, and we wait for that."""
    interrupted = False
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            if interrupted:  # the user insists
                process.send_signal(signal.SIGKILL)
            interrupted = True
            continue
        except BaseException:
            process.kill()
            raise
        if interrupted:
            raise KeyboardInterrupt
        return code


def _plan(args: argparse.Namespace, targets: Sequence[str]) -> int:
    """Print what would be run: requirements by level for each kind of subject."""
    levels = {level for group in args.level or () for level in group} or set(LEVELS)
    families = set(args.family or FAMILIES)
    chosen = [r for r in catalogue.requirements().values() if r.level in levels and r.family in families]
    for subject, kind in (
        *((target, "target") for target in targets),
        *([] if args.no_library else [("the libraries that these targets use", "library")]),
    ):
        counts: Counter[str] = Counter(item.level for item in chosen if item.subject == kind)
        print(f"{subject}: {sum(counts.values())} requirements")
        for level in LEVELS:
            if counts[level]:
                print(f"  {level:<12}{counts[level]:>4}")
    print(f"results would go to {args.results}; nothing was started")
    return EXIT_OK


command = _Command()
