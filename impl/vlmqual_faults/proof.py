"""`vlmqual proof`: does the suite catch every fault, and leave every honest variant in peace?"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from vlmqual_conformance import catalogue
from vlmqual_contract import machine
from vlmqual_contract.discovery import suite_version
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, UsageError
from vlmqual_contract.target import FAMILIES
from vlmqual_faults import cases
from vlmqual_faults.catalogue import Variant, variants
from vlmqual_faults.findings import WHOLE, show, without_fault, write_matrix, write_summary
from vlmqual_faults.nursery import Nursery
from vlmqual_faults.profiles import Asked, Row, asked, derived
from vlmqual_faults.progress import Steps
from vlmqual_faults.target import PROFILES
from vlmqual_faults.trials import Bench, Trial, asked_of, judged, observe

_SOURCES = ("vlmqual_impl", "vlmqual_conformance", "vlmqual_contract")
_OF_FAULTS = ("catalogue.py", "profiles.py", "quantised.py", "surgery.py", "target.py", "trials.py")


class _Command:
    help = "run the suite against implementations that are wrong on purpose, and against honest ones"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--family", action="append", choices=FAMILIES, help="only this family; may be repeated")
        add("--full", action="store_true", help="every case, and every profile run by itself; resumable")
        add(
            "--profile",
            action="append",
            choices=tuple(PROFILES),
            help="run this profile by itself (default: taps, and the narrower ones derived from it)",
        )
        add("--variant", action="append", metavar="NAME", help="only this fault or honest variant; may be repeated")
        add("--results", type=Path, default=Path("results/proof"), metavar="DIR", help="default: results/proof")
        add("--jobs", type=int, default=machine.cores(), metavar="N", help="trials at one time (default: cores)")
        add("--timeout", type=float, default=60.0, metavar="S", help="seconds for one answer of a target (60)")
        add("--fresh", action="store_true", help="do not continue an earlier run")
        add("--list", action="store_true", help="print the faults and honest variants, start nothing")

    def run(self, args: argparse.Namespace) -> int:
        """Make the trials that are not there yet, then say what they prove."""
        chosen = _chosen(args.family or FAMILIES, args.variant)
        if args.list:
            _list(chosen)
            return EXIT_OK
        if args.jobs < 1:
            raise UsageError(f"--jobs {args.jobs} is not positive")
        start = time.monotonic()
        started = datetime.now().astimezone()
        journal = Journal(args.results, fresh=args.fresh)
        proof = _Proof(chosen, args, journal)
        made = proof.run()
        trials = proof.trials()
        faults = [each for each in chosen if each.kind == "fault"]
        uncovered = [] if args.variant else without_fault(args.family or FAMILIES, faults)
        fine = show(trials, uncovered, Console(highlight=False))
        about = {
            "suite": suite_version(),
            "started": started.isoformat(timespec="seconds"),
            "command": shlex.join(["vlmqual", *sys.argv[1:]]),
            "mode": "full" if args.full else "quick",
            "machine": machine.describe(),
            "cores": machine.cores(),
            "jobs": args.jobs,
            "wall_s": round(time.monotonic() - start, 1),
            "made": made,
            "resumed": len(trials) - made,
        }
        says: dict[str, dict[str, str]] = {}
        for each in chosen:
            says.setdefault(each.family, {})[each.name] = each.says
        print(f"  {made} of {len(trials)} trials made in {about['wall_s']:.0f} s with {args.jobs} jobs")
        print(f"  results: {write_summary(trials, uncovered, args.results, about, says)}")
        for path in write_matrix(trials, args.results):
            print(f"  matrix: {path}")
        return EXIT_OK if fine else EXIT_FAILED


command = _Command()


class Journal:
    """Trials on disk, one line each, as they are made; those of other code are not found again.

    Attributes:
        path: of the file.
    """

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"proof-{_digest()}.trials"  # no file of results, for `vlmqual report`
        self._lock = threading.Lock()
        self._rows: dict[str, Trial] = {}
        if fresh:
            self.path.unlink(missing_ok=True)
        for line in self.path.read_text("utf-8").splitlines() if self.path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line in flight when the run was killed
            self._rows[row["key"]] = Trial.from_plain(row["trial"])

    @staticmethod
    def key(variant: Variant, profile: str, how: str) -> str:
        """What a trial is found by."""
        changes = hashlib.sha256(repr((variant.changes, variant.requirements)).encode()).hexdigest()[:12]
        return f"{variant.family}/{variant.name}/{profile}/{how}/{changes}"

    def has(self, variant: Variant, profile: str, how: str) -> bool:
        """Whether a trial was made already."""
        return self.key(variant, profile, how) in self._rows

    def get(self, variant: Variant, profile: str, how: str) -> Trial | None:
        """A trial that was made; its expectations are today's."""
        found = self._rows.get(self.key(variant, profile, how))
        return found and replace(found, expected=variant.component, level=variant.level)

    def put(self, variant: Variant, profile: str, how: str, trial: Trial) -> None:
        """Write a trial."""
        key = self.key(variant, profile, how)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "trial": trial.plain()}) + "\n")
            self._rows[key] = trial


class _Proof:
    """The trials of some variants.

    By itself runs every profile that is asked for. Where none is, that with taps is run, and the narrower ones are
    derived from it, see `profiles`.
    """

    def __init__(self, chosen: Sequence[Variant], args: argparse.Namespace, journal: Journal) -> None:
        self._chosen, self._journal, self._jobs = chosen, journal, args.jobs
        self._full = args.full
        self._derive = not (args.full or args.profile)
        self._profiles = tuple(args.profile or PROFILES)
        self._timeout_s = args.timeout
        self._cases: dict[Variant, tuple[str, ...]] = {}

    def _how(self, profile: str) -> str:
        return "all" if self._full else "derived" if self._derive and profile != WHOLE else "quick"

    def trials(self) -> list[Trial]:
        """Those that were made, by variant and profile."""
        found = (self._journal.get(each, p, self._how(p)) for each in self._chosen for p in self._profiles)
        return [trial for trial in found if trial is not None]

    def run(self) -> int:
        """Make those that are missing; how many that were."""
        work = {
            each: missing
            for each in sorted(self._chosen, key=lambda each: each.kind != "honest")  # the longest trials first
            if (missing := [p for p in self._profiles if not self._journal.has(each, p, self._how(p))])
        }
        if not work:
            return 0
        known, every = catalogue.requirements(), cases.collected()
        for each in work:
            self._cases[each] = cases.names(every, known, each.family) if self._full else asked_of(each, every, known)
        with (
            Nursery("worker") as worker,
            Nursery("suite") as suite,
            Steps("what an honest target is asked", sum(map(len, work.values()))) as steps,
            ThreadPoolExecutor(self._jobs) as pool,
        ):
            bench = Bench(worker.python, suite.python, self._timeout_s)
            try:
                honest = self._honest(work, pool, bench)
                waiting: dict[Future[dict[str, Trial]], Variant] = {}
                for each, missing in work.items():
                    waiting[pool.submit(self._one, each, missing, bench, honest.get(each.family, {}))] = each
                for done in as_completed(waiting):
                    each, made = waiting[done], done.result()
                    for profile, trial in made.items():
                        self._journal.put(each, profile, self._how(profile), trial)
                    steps.made(len(made.keys() & set(work[each])), f"{each.family} {each.name}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                suite.end()  # and the trials in flight with it
                worker.end()
                raise
        return sum(map(len, work.values()))

    def _honest(
        self, work: Mapping[Variant, Sequence[str]], pool: ThreadPoolExecutor, bench: Bench
    ) -> dict[str, dict[str, Asked]]:
        """What an honest target of each family is asked in every profile, over all cases of the work."""
        waiting: dict[tuple[str, str], Future[tuple[list[Row], str]]] = {}
        for family in dict.fromkeys(each.family for each in work):
            plain = next(each for each in variants(family, "honest") if each.dtype == "float32")
            asks = dict.fromkeys(name for each in work if each.family == family for name in self._cases[each])
            for profile in self._profiles:
                waiting[family, profile] = pool.submit(observe, plain, profile, list(asks), bench)
        found: dict[str, dict[str, Asked]] = {}
        for (family, profile), done in waiting.items():
            rows, said = done.result()
            if not rows:
                raise UsageError(f"an honest {family} target cannot be judged: {' '.join(said.split())[-300:]}")
            found.setdefault(family, {})[profile] = asked(rows)
        return found

    def _one(
        self, variant: Variant, missing: Sequence[str], bench: Bench, honest: Mapping[str, Asked]
    ) -> dict[str, Trial]:
        """The trials of a variant, by profile."""
        made: dict[str, Trial] = {}
        rows: list[Row] = []
        before = ""
        for profile in self._profiles if self._derive else missing:
            start = time.monotonic()
            asks: Sequence[str] = self._cases[variant]
            kept: list[Row] = []
            said = ""
            if self._derive and before:
                kept, asks = derived(rows, honest[before], honest[profile])
            rows = kept
            if asks:
                more, said = observe(variant, profile, asks, bench)
                rows = [*kept, *more]
            trial = judged(variant, profile, rows, said, honest[profile], derived=self._derive and bool(before))
            made[profile] = replace(trial, seconds=round(time.monotonic() - start, 1))
            before = profile
        return made


def _chosen(families: Iterable[str], names: Sequence[str] | None) -> list[Variant]:
    found = [each for family in families for each in variants(family)]
    if names:
        known = {each.name for each in found}
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"variant {unknown[0]!r} is unknown; --list shows those that there are")
        found = [each for each in found if each.name in names]
    if not found:
        raise UsageError("there are no faults of these families")
    return found


def _list(chosen: Iterable[Variant]) -> None:
    console = Console(highlight=False)
    for each in chosen:
        ids = ", ".join(each.requirements)
        console.print(
            f"{each.family:<9} {each.kind:<7} {each.level:<11} {each.name}: {each.says} [{ids}]", markup=False
        )


def _digest() -> str:
    """Of everything that decides what a trial says: code, suite, requirements and fixtures."""
    from importlib.util import find_spec

    from vlmqual_contract import fixtures

    whole = hashlib.sha256(str(fixtures.digest()).encode())
    own = Path(__file__).parent
    files = [own / name for name in _OF_FAULTS]
    for name in _SOURCES:
        spec = find_spec(name)
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            files += [path for path in sorted(Path(root).rglob("*")) if path.suffix in (".py", ".toml")]
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]
