"""`vlmqual proof`: does the suite catch every fault, and leave every honest variant in peace?"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlmqual_contract import machine
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, UsageError
from vlmqual_contract.target import FAMILIES
from vlmqual_faults.catalogue import Variant, variants
from vlmqual_faults.findings import show, without_fault, write_matrix, write_summary
from vlmqual_faults.nursery import Nursery
from vlmqual_faults.target import PROFILES
from vlmqual_faults.trials import Trial, run, wanted

_SOURCES = ("vlmqual_impl", "vlmqual_faults", "vlmqual_conformance", "vlmqual_contract")
_ABOUT_TRIALS = ("proof.py", "findings.py")  # they read trials, and change none


class _Command:
    help = "run the suite against implementations that are wrong on purpose, and against honest ones"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--family", action="append", choices=FAMILIES, help="only this family; may be repeated")
        add("--full", action="store_true", help="every fault by every case and in every profile; resumable")
        add(
            "--profile",
            action="append",
            choices=tuple(PROFILES),
            help="what targets offer (default: taps; --full: all)",
        )
        add("--variant", action="append", metavar="NAME", help="only this fault or honest variant; may be repeated")
        add("--results", type=Path, default=Path("results/proof"), metavar="DIR", help="default: results/proof")
        add("--jobs", type=int, default=machine.cores(), metavar="N", help="trials at one time (default: cores)")
        add("--timeout", type=float, default=60.0, metavar="S", help="seconds for one answer of a target (60)")
        add("--fresh", action="store_true", help="do not continue an earlier run")
        add("--list", action="store_true", help="print the faults and honest variants, start nothing")

    def run(self, args: argparse.Namespace) -> int:
        """Run the trials that are not there yet, then say what they prove."""
        chosen = _chosen(args.family or FAMILIES, args.variant)
        if args.list:
            _list(chosen)
            return EXIT_OK
        if args.jobs < 1:
            raise UsageError(f"--jobs {args.jobs} is not positive")
        profiles = args.profile or (tuple(PROFILES) if args.full else ("taps",))
        pairs = [(each, profile) for each in chosen for profile in profiles]
        journal = Journal(args.results, fresh=args.fresh)
        work = [(each, profile) for each, profile in pairs if not journal.has(each, profile, args.full)]
        _measure(work, args, journal)
        found = [journal.get(each, profile, args.full) for each, profile in pairs]
        trials = [trial for trial in found if trial is not None]
        faults = [each for each in chosen if each.kind == "fault"]
        uncovered = [] if args.variant else without_fault(args.family or FAMILIES, faults)
        fine = show(trials, uncovered, Console(highlight=False))
        print(f"  results: {write_summary(trials, uncovered, args.results)}")
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
        self.path = folder / f"proof-{_digest()}.jsonl"
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
    def key(variant: Variant, profile: str, whole: bool) -> str:
        """What a trial is found by."""
        changes = hashlib.sha256(repr((variant.changes, variant.requirements)).encode()).hexdigest()[:12]
        return f"{variant.family}/{variant.name}/{profile}/{'all' if whole else 'quick'}/{changes}"

    def has(self, variant: Variant, profile: str, whole: bool) -> bool:
        """Whether a trial was made already."""
        return self.key(variant, profile, whole) in self._rows

    def get(self, variant: Variant, profile: str, whole: bool) -> Trial | None:
        """A trial that was made."""
        return self._rows.get(self.key(variant, profile, whole))

    def put(self, variant: Variant, profile: str, whole: bool, trial: Trial) -> None:
        """Write a trial."""
        key = self.key(variant, profile, whole)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "trial": trial.plain()}) + "\n")
            self._rows[key] = trial


def _measure(work: Sequence[tuple[Variant, str]], args: argparse.Namespace, journal: Journal) -> None:
    if not work:
        return
    folder = Path(tempfile.mkdtemp(prefix="vlmqual-proof-"))

    def one(variant: Variant, profile: str) -> Trial:
        own = folder / f"{variant.family}-{variant.name}-{profile}"
        names = () if args.full else wanted(variant)
        start = time.monotonic()
        trial = run(variant, profile, names, own, args.timeout, nursery.python)
        shutil.rmtree(own, ignore_errors=True)
        return replace(trial, seconds=round(time.monotonic() - start, 1))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    nursery = Nursery()
    try:
        with nursery, Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(args.jobs) as pool:
            task = bar.add_task("trials", total=len(work))
            waiting = {pool.submit(one, *each): each for each in work}
            try:
                for done in as_completed(waiting):
                    variant, profile = waiting[done]
                    journal.put(variant, profile, args.full, done.result())
                    bar.update(task, advance=1, description=f"{variant.family} {variant.name}"[:40])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    for name in _SOURCES:
        spec = find_spec(name)
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".toml") and "tables" not in path.parts and path.name not in _ABOUT_TRIALS:
                    whole.update(path.read_bytes())
    return whole.hexdigest()[:12]
