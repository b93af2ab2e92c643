"""`vlmqual mutants`: does the suite notice small changes that nobody thought of?

Mutants are drawn by seed from all that the suite's cases of a family evaluate in the bundled implementation. Not drawn
from are the classes of the documented library (`api`, `configs`), which no target is asked for, what happens over
several ranks (`tp`) and the target itself.
Each is judged by the suite until the first case that fails: by the target's cases, the core's first, and where all of
these pass by the library's cases.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from vlmqual_contract import fixtures
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, UsageError, VlmqualError
from vlmqual_contract.target import FAMILIES
from vlmqual_faults.brood import Answer, Order
from vlmqual_faults.mutation import Mutant, Span, find, functions, mutants
from vlmqual_faults.nursery import Nursery
from vlmqual_faults.progress import Steps
from vlmqual_faults.surgery import PACKAGE, SurgeryError
from vlmqual_faults.survivors import argument
from vlmqual_faults.trials import CORE

#: Modules of other subjects; those of the target itself, `target*`, are left out as well.
OTHERS = ("api", "configs", "tp", "command")
#: Of mutants that are not argued to be equivalent, so many have to be caught.
REQUIRED = 0.95
_DECIDING = ("vlmqual_impl", "vlmqual_conformance", "vlmqual_contract")
_CAUGHT = ("core", "suite", "library", "broken", "hung")
#: By what a mutant is judged, one after the other: what a session starts with, and what an order names.
_STAGES = (("--vlmqual-target=eager", "mutant:id={},threads=1"), ("--vlmqual-library=vlmqual_impl", "mutant:id={}"))

Reached = Mapping[str, frozenset[Span]]


class _Command:
    help = "run the suite against automatic mutants of the bundled implementation, drawn by seed"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--family", action="append", choices=FAMILIES, help="only this family; may be repeated")
        add("--count", type=int, default=200, metavar="N", help="mutants of each family (200)")
        add("--seed", type=int, default=1, metavar="S", help="which ones are drawn (1)")
        add("--mutant", action="append", metavar="ID", help="exactly this one instead; may be repeated")
        add("--results", type=Path, default=Path("results/mutants"), metavar="DIR", help="default: results/mutants")
        add("--jobs", type=int, default=1, metavar="N", help="mutants at one time (1)")
        add("--timeout", type=float, default=20.0, metavar="S", help="seconds for one answer of a target (20)")
        add("--fresh", action="store_true", help="do not continue an earlier run")
        add("--list", action="store_true", help="print the mutants that would be judged")

    def run(self, args: argparse.Namespace) -> int:
        """Judge the mutants that are not judged yet, then say what came of all."""
        for name in ("count", "jobs", "timeout"):
            if not getattr(args, name) > 0:
                raise UsageError(f"--{name} {getattr(args, name)} is not positive")
        args.results.mkdir(parents=True, exist_ok=True)
        fine, whole, rows = True, True, []
        for family in args.family or FAMILIES:
            chosen = _chosen(args, family)
            if args.list:
                for each in chosen:
                    print(f"{family} {each.id} (line {each.line}): {each.old}  ->  {each.new}")
                continue
            journal = Journal(args.results, family, fresh=args.fresh)
            for stage in range(len(_STAGES)):
                waiting = [each for each in chosen if journal.stage(each.id) == stage]
                _judge(family, stage, waiting, journal, args)
            found = [_argued(journal.rows[each.id], each) for each in chosen if journal.stage(each.id) == len(_STAGES)]
            whole = whole and len(found) == len(chosen)
            rows += found
            fine = show(found, Console(highlight=False)) and fine
        if args.list:
            return EXIT_OK
        print(f"  results: {write(rows, args)}")
        return EXIT_INCOMPLETE if not whole else EXIT_OK if fine else EXIT_FAILED


command = _Command()


@dataclass(frozen=True)
class Row:
    """What came of one mutant.

    Attributes:
        family: `model_type`.
        id: of the mutant.
        line: of its place.
        old: what stood there.
        new: what it put there.
        fate: caught by the "core", by the rest of the target's "suite" or by the "library"'s cases, "broken" (no model
            could be opened), "hung", "passed" (the target's cases, the library's are still to come), or "survived".
        case: that failed first.
        requirements: of that case.
        reason: why.
        seconds: that it took.
        verdict: of a survivor: one of `survivors.VERDICTS`, or "" where nobody has said anything.
        argument: why.
    """

    family: str
    id: str
    line: int
    old: str
    new: str
    fate: str
    case: str
    requirements: tuple[str, ...]
    reason: str
    seconds: float
    verdict: str = ""
    argument: str = ""


# which mutants --------------------------------------------------------------------------------------------------------


def sample(reached: Reached, count: int, seed: int) -> list[Mutant]:
    """Draw mutants, the same on every machine for the same code and the same pieces evaluated.

    Every function gives in proportion to its lines that were evaluated, as long as it has any mutants left.

    Args:
        reached: by module, the pieces that were evaluated.
        count: how many, fewer where there are no more.
        seed: which ones.
    """
    order: list[tuple[float, str, Mutant]] = []
    for module, spans in sorted(reached.items()):
        if module.partition(".")[0] in OTHERS or module.startswith("target"):
            continue
        for path, node in functions(import_module(f"{PACKAGE}.{module}")).items():
            lines = {span[0] for span in spans if node.lineno < span[0] <= (node.end_lineno or node.lineno)}
            found = mutants(module, path, spans) if lines else []
            found.sort(key=lambda each: _chance(seed, each.id))
            for place, each in enumerate(found):
                order.append(((place + _chance(seed, each.id, "place")) / len(lines), each.id, each))
    order.sort(key=lambda entry: entry[:2])
    return list(islice((each for _, _, each in order if _possible(each)), count))


def _chance(seed: int, *words: str) -> float:
    """A number in [0, 1) that looks random."""
    digest = hashlib.sha256(" ".join([str(seed), *words]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _possible(mutant: Mutant) -> bool:
    """Whether it can be put in at all; a closure over something that it drops cannot."""
    try:
        mutant.make()()
    except SurgeryError:
        return False
    return True


def _chosen(args: argparse.Namespace, family: str) -> list[Mutant]:
    if args.mutant:
        try:
            return [find(name) for name in args.mutant]
        except SurgeryError as error:
            raise UsageError(str(error)) from error
    return sample(_reached(family, args.results), args.count, args.seed)


def _reached(family: str, folder: Path) -> Reached:
    """What the target's cases of a family evaluate, found once for each state of code and suite."""
    path = folder / f"reached-{family}-{digest()}.json"
    if not path.is_file():
        print(f"{family}: looking what the suite evaluates", file=sys.stderr)
        together: dict[str, set[Span]] = {}
        with judges(family, _STAGES[0][0]) as judge:
            notes = judge.folder / "trace"
            notes.mkdir()
            judge.ask(Order("trace", f"mutant:trace={notes},threads=1", judge.room("traced"), first=False, call_s=300))
            answer = judge.answer()
            if answer.fate != "passed":
                raise VlmqualError(f"{family}: the suite does not pass unchanged: {answer.case} {answer.reason}")
            for note in notes.glob("*.json"):
                for module, spans in json.loads(note.read_text("utf-8")).items():
                    together.setdefault(module, set()).update(map(tuple, spans))
        path.write_text(json.dumps({module: sorted(spans) for module, spans in sorted(together.items())}), "utf-8")
    found: Mapping[str, Sequence[Sequence[int]]] = json.loads(path.read_text("utf-8"))
    return {module: frozenset((a, b, c, d) for a, b, c, d in spans) for module, spans in found.items()}


def digest() -> str:
    """Of everything that decides what comes of a mutant: code, suite, requirements, fixtures and these changes."""
    whole = hashlib.sha256(str(fixtures.digest()).encode())
    here = Path(__file__).parent
    files = [here / "mutation.py", here / "brood.py"]
    for name in _DECIDING:
        spec = find_spec(name)
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            files += [path for path in sorted(Path(root).rglob("*")) if path.suffix in (".py", ".toml")]
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


# judging --------------------------------------------------------------------------------------------------------------


class Judges:
    """The suite, collected once and forked for each order.

    Attributes:
        folder: temporary.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders: IO[bytes] = process.stdin
        self._answers: IO[bytes] = process.stdout
        self.folder = folder

    def room(self, name: str) -> str:
        """A new folder for one order."""
        return tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder)

    def ask(self, order: Order) -> None:
        """Send an order."""
        self._orders.write(json.dumps(asdict(order)).encode() + b"\n")
        self._orders.flush()

    def answer(self) -> Answer:
        """Wait for the next answer, of any order.

        Raises:
            VlmqualError: the session has ended.
        """
        line = self._answers.readline()
        if not line:
            raise VlmqualError("the session of the suite has ended; what it said stands above")
        values = json.loads(line)
        return Answer(**{**values, "requirements": tuple(values["requirements"])})


@contextmanager
def judges(family: str, subject: str = _STAGES[0][0]) -> Iterator[Judges]:
    """A session of the suite for a family, with workers that need not import anything.

    Args:
        family: `model_type`.
        subject: see `brood.main`.
    """
    folder = Path(tempfile.mkdtemp(prefix="vlmqual-mutants-"))
    try:
        with Nursery() as nursery:
            process = subprocess.Popen(
                [sys.executable, "-m", "vlmqual_faults.brood", family, subject, nursery.python],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us; the session ends with its input
            )
            with process:
                try:
                    yield Judges(process, folder)
                finally:
                    assert process.stdin is not None
                    process.stdin.close()
                    process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Journal:
    """Rows on disk, one line each, as they are made; those of other code are not found again.

    Attributes:
        path: of the file.
        rows: by id of the mutant.
    """

    def __init__(self, folder: Path, family: str, *, fresh: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"mutants-{family}-{digest()}.rows"
        self.rows: dict[str, Row] = {}
        if fresh:
            self.path.unlink(missing_ok=True)
        for line in self.path.read_text("utf-8").splitlines() if self.path.is_file() else ():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # the line in flight when the run was killed
            self.rows[values["id"]] = Row(**{**values, "requirements": tuple(values["requirements"])})

    def stage(self, name: str) -> int:
        """By which of the stages a mutant is judged next; their number where it has been judged by all."""
        if name not in self.rows:
            return 0
        return 1 if self.rows[name].fate == "passed" else len(_STAGES)

    def put(self, row: Row) -> None:
        """Write a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        self.rows[row.id] = row


def _judge(family: str, stage: int, work: Sequence[Mutant], journal: Journal, args: argparse.Namespace) -> None:
    if not work:
        return
    before, model, _ = CORE[family]
    subject, named = _STAGES[stage]
    waiting = list(reversed(work))
    running: dict[str, tuple[Mutant, str, float]] = {}
    by = "the library's cases" if stage else "the target's cases"
    with judges(family, subject) as judge, Steps(f"{family} by {by}", len(work)) as steps:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                each = waiting.pop()
                room = judge.room("mutant")
                running[each.id] = each, room, time.monotonic()
                judge.ask(Order(each.id, named.format(each.id), room, (*model, *before), call_s=args.timeout))
            answer = judge.answer()
            each, room, start = running.pop(answer.name)
            shutil.rmtree(room, ignore_errors=True)
            steps.made(1)
            if answer.fate == "lost":
                steps.say(f"LOST      {family} {each.id}: {answer.reason}")
                continue
            journal.put(_row(family, stage, each, answer, round(time.monotonic() - start, 1)))


def _row(family: str, stage: int, mutant: Mutant, answer: Answer, seconds: float) -> Row:
    names = {"failed": "core" if answer.core else "suite", "passed": "passed"}
    if stage:
        names = {"failed": "library", "passed": "survived"}
    fate, shown = names.get(answer.fate, answer.fate), (mutant.id, mutant.line, mutant.old, mutant.new)
    return Row(family, *shown, fate, answer.case, answer.requirements, answer.reason, seconds)


def _argued(row: Row, mutant: Mutant) -> Row:
    found = argument(mutant, row.family) if row.fate == "survived" else None
    return replace(row, verdict=found.verdict, argument=found.reason) if found else row


# what came of it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Of the mutants of one family, how many ended how."""

    made: int
    core: int
    suite: int
    library: int
    broken: int
    hung: int
    equivalent: int
    unit_tested: int
    unanswered: int

    @property
    def rate(self) -> float:
        """Caught by the suite, of those that are not argued to be equivalent."""
        counted = self.made - self.equivalent
        return (counted - self.unit_tested - self.unanswered) / counted if counted else 1.0


def count(rows: Sequence[Row]) -> Count:
    """Count how mutants ended; one that is answered by a case but survives all the same is unanswered."""
    fates = Counter(row.fate for row in rows)
    verdicts = Counter(row.verdict for row in rows)
    equivalent, unit_tested = verdicts["equivalent"], verdicts["unit-tested"]
    return Count(
        made=len(rows),
        **{fate: fates[fate] for fate in _CAUGHT},
        equivalent=equivalent,
        unit_tested=unit_tested,
        unanswered=fates["survived"] - equivalent - unit_tested,
    )


def show(rows: Sequence[Row], console: Console) -> bool:
    """Print what came of a family's mutants; True when enough were caught and something is said of each survivor."""
    if not rows:
        return True
    found = count(rows)
    console.print(f"\n{rows[0].family}", style="bold")
    console.print(
        f"  {found.made} mutants; caught by the core {found.core}, by the rest of the target's cases {found.suite}, by "
        f"the library's cases {found.library}, broken {found.broken}, hung {found.hung}; survived: equivalent "
        f"{found.equivalent}, seen by a unit test {found.unit_tested}, unanswered {found.unanswered}; rate "
        f"{found.rate:.1%}",
        markup=False,
        soft_wrap=True,
    )
    for row in rows:
        if row.fate == "survived" and row.verdict not in ("equivalent", "unit-tested"):
            console.print(
                f"SURVIVED  {row.family} {row.id} (line {row.line}): {row.old}  ->  {row.new}",
                markup=False,
                soft_wrap=True,
            )
    return found.rate >= REQUIRED and not found.unanswered


def write(rows: Sequence[Row], args: argparse.Namespace) -> Path:
    """`mutants.json`, for a report: counts by family, and every mutant with what came of it."""
    families = dict.fromkeys(row.family for row in rows)
    counts = {family: count([row for row in rows if row.family == family]) for family in families}
    whole: dict[str, Any] = {
        "format": 1,
        "seed": args.seed,
        "code": digest(),
        "counts": {family: {**asdict(found), "rate": round(found.rate, 4)} for family, found in counts.items()},
        "mutants": [asdict(row) for row in rows],
    }
    path: Path = args.results / "mutants.json"
    path.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    return path
