"""`vlmqual perf`: how fast is it?"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlmqual_contract import fixtures, machine
from vlmqual_contract.discovery import code_digest, suite_version
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Header, Measurement, Writer
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.scenario import Scenario, load_scenarios, select
from vlmqual_contract.target import Capability, Info, Options
from vlmqual_perf import outline
from vlmqual_perf.bench import POSITIONS
from vlmqual_perf.front import Front, show
from vlmqual_perf.plan import PHASES, Cell, cells, model_of
from vlmqual_perf.progress import Reporter, table
from vlmqual_perf.runner import Runner, Settings


class _Command:
    help = "measure the latency of every phase of a target over tensor-parallel sizes"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--target", action="append", metavar="T", help="target string; may be repeated (default: eager)")
        add(
            "--tp",
            default="1",
            metavar="N[,N...]",
            help="tensor-parallel sizes (default: 1); each is checked against 1",
        )
        add("--suite", default="default", help="suite of scenarios, or the id of one (default: default)")
        add("--phases", default=",".join(PHASES), metavar="P[,P...]", help=f"of {', '.join(PHASES)} (default: all)")
        add("--checkpoint", type=Path, metavar="DIR", help="your own checkpoint instead of the scenarios' tiny ones")
        add("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
        add("--threads", type=int, metavar="N", help="compute threads of each rank (default: cores / largest TP)")
        add("--repeats", type=int, default=7, metavar="N", help="least number of counted repetitions (7)")
        add("--cell-seconds", type=float, default=1.5, metavar="S", help="time to spend on a cell beyond that (1.5)")
        add("--timeout", type=float, default=120.0, metavar="S", help="seconds for one answer of the target (120)")
        add("--python", metavar="PATH", help="interpreter of the environment that the target lives in")
        add("--fresh", action="store_true", help="do not continue an unfinished run")
        add("--dry-run", action="store_true", help="only print what would be measured, compiled and kept")
        add("--device-memory", type=float, metavar="GIB", help="memory of a device, for --dry-run")
        add("--rehearse", action="store_true", help="run an emulated target too; every row is marked as a rehearsal")
        front = parser.add_argument_group("pytest-benchmark", "the measured values through its table and files")
        front.add_argument("--benchmark-json", type=Path, metavar="FILE", help="write its JSON")
        front.add_argument("--benchmark-save", metavar="NAME", help="save the run in its storage")
        front.add_argument("--benchmark-compare", nargs="?", const="", metavar="NUM", help="compare with a saved run")
        front.add_argument("--benchmark-histogram", metavar="PREFIX", help="draw its histograms (needs pygal)")
        front.add_argument("--benchmark-storage", metavar="URI", help="where its saved runs are")

    def run(self, args: argparse.Namespace) -> int:
        """One target after the other; the worst of their exit codes."""
        targets: list[str] = args.target or ["eager"]
        front = [name for name, value in vars(args).items() if name.startswith("benchmark_") and value is not None]
        if len(targets) > 1 and front:
            raise UsageError(f"--{front[0].replace('_', '-')} is for one target; {len(targets)} are given")
        return max(self._one(argparse.Namespace(**{**vars(args), "target": target})) for target in targets)

    def _one(self, args: argparse.Namespace) -> int:
        """Plan, check, measure, show."""
        for name in ("repeats", "cell_seconds", "timeout"):
            if not (0 < getattr(args, name) < float("inf")):
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive and finite")
        if args.device_memory is not None and not (0 < args.device_memory < float("inf")):
            raise UsageError(f"--device-memory {args.device_memory} is not positive and finite")
        if args.results.exists() and not args.results.is_dir():
            raise UsageError(f"results directory {args.results} is no directory")
        sizes = _numbers(args.tp)
        scenarios = select(load_scenarios(fixtures.file("scenarios.toml")), args.suite)
        if args.checkpoint is not None and not (args.checkpoint / "config.json").is_file():
            raise UsageError(f"--checkpoint {args.checkpoint} has no config.json")
        phases = [phase for phase in args.phases.split(",") if phase]
        plan = cells(scenarios, phases, sizes)
        threads = args.threads if args.threads is not None else max(1, machine.cores() // max(sizes))
        if threads < 1:
            raise UsageError(f"--threads {threads} is not positive")
        if args.dry_run:
            memory = None if args.device_memory is None else int(args.device_memory * 2**30)
            with RemoteTarget(args.target, python=args.python, limits=Limits(call_s=args.timeout)) as target:
                _print_plan(cells(scenarios, phases, sizes, fixed_shapes=target.info.fixed_shapes), threads)
                outline.show(target, scenarios, sizes, args.checkpoint, memory, POSITIONS, Console(highlight=False))
            return EXIT_OK
        front = Front(
            args.benchmark_json,
            args.benchmark_save,
            args.benchmark_compare,
            args.benchmark_histogram,
            args.benchmark_storage,
        )
        front.check()
        limits = Limits(call_s=args.timeout)
        info = _check(args, scenarios, sizes, limits)
        if info.fixed_shapes:
            plan = cells(scenarios, phases, sizes, fixed_shapes=True)
        if not plan:
            raise UsageError(f"target {args.target!r} has nothing to measure in {', '.join(phases)}")
        header = Header(
            kind="perf",
            subject=args.target,
            suite=suite_version(),
            info={**vars(info), "capabilities": sorted(str(item) for item in info.capabilities)},
            machine=machine.describe(),
            command=" ".join(["vlmqual", *sys.argv[1:]]),
            plan={
                "suite": args.suite,
                "scenarios": [scenario.id for scenario in scenarios],
                "phases": args.phases,
                "tp": list(sizes),
                "threads": threads,
                "repeats": args.repeats,
                "cell_s": args.cell_seconds,
                "checkpoint": str(args.checkpoint or ""),
                "config": _digest(args.checkpoint / "config.json") if args.checkpoint else "",
                "code": code_digest(args.target),
                "python": args.python or "",
                "fixtures": fixtures.digest(),
                **({"rehearsal": True} if args.rehearse else {}),
            },
        )
        settings = Settings(
            target=args.target,
            threads=threads,
            python=args.python,
            limits=limits,
            repeats=args.repeats,
            cell_s=args.cell_seconds,
            checkpoint=args.checkpoint,
            rehearse=args.rehearse,
            emulated=info.emulated,
        )
        return _measure(plan, settings, Writer.start(args.results, header, fresh=args.fresh), front)


command = _Command()


def _measure(plan: Sequence[Cell], settings: Settings, writer: Writer, front: Front) -> int:
    reporter = Reporter(len(plan), len(writer.done))
    reporter.start()
    try:
        Runner(settings, writer, reporter.update).run(plan)
    except KeyboardInterrupt:
        reporter.stop()
        said = f"interrupted; the same command goes on after {len(writer.done)} cells: {writer.path}"
        reporter.console.print(said, soft_wrap=True, markup=False)
        raise
    finally:
        reporter.stop()
    writer.finish()
    rows = [row for row in writer.done.values() if isinstance(row, Measurement)]
    table(rows, reporter.console)
    failed = [row for row in rows if row.state == "failed"]
    for row in failed:
        reporter.console.print(f"FAILED {row.case}: {row.reason}", soft_wrap=True, markup=False)
    if front.wanted and any(row not in failed for row in rows):
        show(rows, front)
    reporter.console.print(str(writer.path), soft_wrap=True, markup=False)
    return EXIT_FAILED if failed else EXIT_OK


def _check(args: argparse.Namespace, scenarios: Sequence[Scenario], sizes: Sequence[int], limits: Limits) -> Info:
    """Ask the target, in one process and before anything is loaded, whether it can do all of this."""
    with RemoteTarget(args.target, python=args.python, limits=limits) as target:
        info = target.info
        if info.emulated and not args.rehearse:
            raise UsageError(
                f"target {args.target!r} is emulated: its latency says nothing about a device; "
                "--rehearse runs it all the same and marks every figure"
            )
        if max(sizes) > 1 and Capability.TENSOR_PARALLEL not in info.capabilities:
            raise UsageError(f"target {args.target!r} does not split a model over devices: it lacks tensor-parallel")
        for scenario in scenarios:
            if scenario.family not in info.families:
                raise UsageError(f"target {args.target!r} does not open {scenario.family}, which {scenario.id} needs")
            for size in sizes:
                target.check(model_of(scenario, args.checkpoint), Options(tp=size, batch=scenario.batch))
    return info


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--tp {text!r} is no list of numbers such as 1,2,4") from None
    if min(numbers) < 1:
        raise UsageError(f"--tp {text!r}: tensor-parallel sizes are positive")
    return numbers


def _print_plan(plan: Sequence[Cell], threads: int) -> None:
    console = Console(highlight=False)
    shown = Table(box=None, pad_edge=False)
    for name in ("cell", "images", "rows", "new tokens"):
        shown.add_column(name, justify="left" if name == "cell" else "right", overflow="fold")
    for cell in plan:
        scenario = cell.scenario
        shown.add_row(cell.case, str(len(scenario.images)), str(scenario.batch), str(scenario.new_tokens))
    console.print(shown)
    console.print(f"{len(plan)} cells, {threads} threads for each rank")
