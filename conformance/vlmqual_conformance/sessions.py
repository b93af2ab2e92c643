"""One pytest session as a process of its own: its command line, its environment, its end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlmqual_conformance.catalogue import CHECKPOINT, FIXTURES, Scope
from vlmqual_contract.discovery import LIBRARIES, TARGETS, installed, parse
from vlmqual_contract.errors import EXIT_INCOMPLETE, EXIT_USAGE, UsageError

_PYTEST_USAGE = 4


@dataclass(frozen=True)
class Session:
    """What one session is asked to do.

    Attributes:
        kind: "target" or "library".
        subject: target string, or name of the library with its options.
        results: folder of results files.
        timeout_s: seconds for one answer.
        python: interpreter of the subject's environment, or None for this one.
        families: families to be judged, empty for all.
        levels: levels to be judged, empty for all.
        requirements: only cases that carry one of these ids, empty for all.
        cases: only the cases of exactly these names, empty for all.
        keyword: pytest's `-k`.
        known: further files of known failures.
        waivers: files of waivers.
        fresh: do not continue an unfinished run.
        rules: write down what other rules of comparison would have said, see `rules`.
        checkpoint: a user's own, in the place of the fixtures; None where it is the reference's, or none at all.
        reference: folder of the checkpoint's reference, or None.
    """

    kind: str
    subject: str
    results: Path
    timeout_s: float
    python: str | None = None
    families: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    keyword: str = ""
    known: tuple[Path, ...] = ()
    fresh: bool = False
    rules: bool = False
    checkpoint: Path | None = None
    reference: Path | None = None
    waivers: tuple[Path, ...] = ()

    @property
    def scope(self) -> Scope:
        """Where tests and requirements are."""
        return FIXTURES if self.checkpoint is None and self.reference is None else CHECKPOINT

    @property
    def name(self) -> str:
        """As in the header of the results file."""
        return self.subject if self.kind == "target" else f"library {self.subject}"

    @property
    def files(self) -> list[Path]:
        """What pytest collects: the whole suite, or the files of the cases that are asked for."""
        suite = self.scope.suite
        return [suite / name for name in dict.fromkeys(map(file_of, self.cases))] or [suite]


@dataclass(frozen=True)
class Ended:
    """How the session of one subject ended.

    Attributes:
        subject: target string, or "library NAME".
        exit: exit code.
        library: name of the library that the subject uses or is, with its options.
        path: results file, "" where none was begun.
        said: what a quiet session wrote to standard error.
    """

    subject: str
    exit: int
    library: str = ""
    path: str = ""
    said: str = ""


def file_of(case: str) -> str:
    """Name of the test file that a case stands in."""
    return case.partition("::")[0]


def check(session: Session) -> None:
    """Find the mistakes that can be found without starting anything.

    Raises:
        UsageError: the subject is not there, or the time limit is none.
    """
    group = TARGETS if session.kind == "target" else LIBRARIES
    spec, points = parse(session.subject), installed(group)
    if spec.file and not Path(spec.file).is_file():
        raise UsageError(f"target file {spec.file} does not exist")
    if spec.kind and spec.kind not in points and session.python is None:
        names = ", ".join(points) or "none"
        raise UsageError(f"{session.kind} {spec.kind!r} is not installed; installed are {names}")
    if not session.timeout_s > 0:
        raise UsageError(f"--timeout {session.timeout_s:g} is no time; it has to be above 0 seconds")


def run(
    session: Session, *, quiet: bool = False, output: IO[bytes] | None = None, python: str = sys.executable
) -> Ended:
    """Run one session to its end, also when the user interrupts it.

    Args:
        session: what to do.
        quiet: print nothing; what it writes to standard error is in `Ended.said`.
        output: file that takes what it would print, and what it writes to standard error.
        python: interpreter that runs pytest.
    """
    with tempfile.TemporaryDirectory(prefix="vlmqual-") as folder, tempfile.TemporaryFile() as errors:
        status = Path(folder) / "status.json"
        command = [python, *_pytest(session, folder), f"--vlmqual-status={status}"]
        code = _wait(_started(command, subprocess.DEVNULL if quiet else output, errors if quiet else output))
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip()
        if code == _PYTEST_USAGE:
            return Ended(session.name, EXIT_USAGE, said=said)
        if not status.is_file():
            return Ended(session.name, EXIT_INCOMPLETE, said=said)
        state: dict[str, Any] = json.loads(status.read_text("utf-8"))
    # The status is written at the start as well: the exit code of a session that died says that it did.
    exit = state["exit"] if code == state["exit"] else EXIT_INCOMPLETE
    return Ended(session.name, exit, state["library"], state["path"], said)


def _pytest(session: Session, folder: str) -> list[str]:
    """The arguments of an interpreter that runs pytest without any configuration file or plugin but ours."""
    return [
        *("-m", "pytest", *map(str, session.files)),
        *("-c", os.devnull, "--rootdir", str(session.scope.suite), "--import-mode=importlib"),
        *("-p", "vlmqual_conformance.plugin", "-p", "no:cacheprovider", "-p", "no:terminal"),
        *("-p", "no:unraisableexception"),  # it collects garbage again and again at the end; the suite leaves none
        *(f"--basetemp={folder}/tmp",),
        *(["-k", session.keyword] if session.keyword else []),
        f"--vlmqual-{session.kind}={session.subject}",
        *[f"--vlmqual-family={family}" for family in session.families],
        *[f"--vlmqual-level={level}" for level in session.levels],
        *[f"--vlmqual-requirement={name}" for name in session.requirements],
        *[f"--vlmqual-case={name}" for name in session.cases],
        f"--vlmqual-results={session.results}",
        f"--vlmqual-timeout={session.timeout_s}",
        f"--vlmqual-command={shlex.join(['vlmqual', *sys.argv[1:]])}",
        *[f"--vlmqual-known={path}" for path in session.known],
        *[f"--vlmqual-waivers={path}" for path in session.waivers],
        *(["--vlmqual-fresh"] if session.fresh else []),
        *(["--vlmqual-rules"] if session.rules else []),
        *([f"--vlmqual-checkpoint={session.checkpoint}"] if session.checkpoint else []),
        *([f"--vlmqual-reference={session.reference}"] if session.reference else []),
        *([f"--vlmqual-python={session.python}"] if session.python else []),
    ]


def _started(command: list[str], output: IO[bytes] | int | None, errors: IO[bytes] | None) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.Popen(command, env=environment, stdout=output, stderr=errors)


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
