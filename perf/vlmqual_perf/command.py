"""`vlmqual perf`: how fast is it?"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from vlmqual_contract import fixtures, machine, nodes
from vlmqual_contract.discovery import code_digest, suite_version
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, Unsupported, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Header, Measurement, Writer
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import FAMILIES, Capability, Info, Options
from vlmqual_perf import outline, scaling, selfreport, timetable
from vlmqual_perf.bench import POSITIONS
from vlmqual_perf.forecast import Forecast, earlier
from vlmqual_perf.front import Front, show
from vlmqual_perf.plan import PHASES, Cell, cells, model_of, seed_of, sizes_of
from vlmqual_perf.progress import Reporter, table
from vlmqual_perf.runner import Runner, Settings
from vlmqual_perf.selection import Selection, select


class _Command:
    help = "measure the latency of every phase of a target over tensor-parallel sizes"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--target", action="append", metavar="T", help="target string; may be repeated (default: eager)")
        add("--tp", metavar="N[,N...]", help="tensor-parallel sizes, each checked against 1 (default: the suite's)")
        add("--suite", default="default", help="suite of scenarios, or the id of one (default: default)")
        add("--scenarios", type=Path, metavar="FILE", help="your own file of suites and scenarios")
        add("--family", choices=FAMILIES, help="only scenarios of this family")
        add("--phases", default=",".join(PHASES), metavar="P[,P...]", help=f"of {', '.join(PHASES)} (default: all)")
        add("--checkpoint", type=Path, metavar="DIR", help="your own checkpoint instead of the scenarios' tiny ones")
        add("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
        add("--threads", type=int, metavar="N", help="compute threads of each rank (default: cores / largest TP)")
        add("--repeats", type=int, default=7, metavar="N", help="least number of counted repetitions (7)")
        add(
            "--cell-seconds", type=float, metavar="S", help="time to spend on a cell beyond that (default: the suite's)"
        )
        add("--timeout", type=float, default=120.0, metavar="S", help="seconds for one answer of the target (120)")
        add("--scenario-timeout", type=float, metavar="S", help="seconds for one scenario at one size, without loading")
        add(
            "--order", choices=("random", "listed"), default="random", help="of checkpoints, scenarios, phases (random)"
        )
        add("--seed", type=int, metavar="N", help="of the random order (default: derived from what is measured)")
        add("--python", metavar="PATH", help="interpreter of the environment that the target lives in")
        add("--fresh", action="store_true", help="do not continue an unfinished run")
        add("--dry-run", action="store_true", help="only print what would be measured, compiled and kept, and how long")
        add("--device-memory", type=float, metavar="GIB", help="memory of a device, for --dry-run")
        add("--rehearse", action="store_true", help="run an emulated target too; every row is marked as a rehearsal")
        own = parser.add_argument_group("the harness itself", "measured on a simulated target whose times are known")
        own.add_argument("--self-check", action="store_true", help="only compare what is measured with what is true")
        own.add_argument(
            "--self-check-runs",
            type=int,
            default=100,
            metavar="N",
            help="runs with cold starts and bucket misses (100)",
        )
        nodes.declare(parser)
        front = parser.add_argument_group("pytest-benchmark", "the measured values through its table and files")
        front.add_argument("--benchmark-json", type=Path, metavar="FILE", help="write its JSON")
        front.add_argument("--benchmark-save", metavar="NAME", help="save the run in its storage")
        front.add_argument("--benchmark-compare", nargs="?", const="", metavar="NUM", help="compare with a saved run")
        front.add_argument("--benchmark-histogram", metavar="PREFIX", help="draw its histograms (needs pygal)")
        front.add_argument("--benchmark-storage", metavar="URI", help="where its saved runs are")

    def run(self, args: argparse.Namespace) -> int:
        """One target after the other; the worst of their exit codes."""
        if args.self_check:
            if args.self_check_runs < 1:
                raise UsageError(f"--self-check-runs {args.self_check_runs} is not positive")
            return selfreport.run(args.self_check_runs, args.results)
        targets: list[str] = args.target or ["eager"]
        front = [name for name, value in vars(args).items() if name.startswith("benchmark_") and value is not None]
        if len(targets) > 1 and front:
            raise UsageError(f"--{front[0].replace('_', '-')} is for one target; {len(targets)} are given")
        return max(self._one(argparse.Namespace(**{**vars(args), "target": target})) for target in targets)

    def _one(self, args: argparse.Namespace) -> int:
        """Plan, check, measure, show."""
        _valid(args)
        chosen = select(args.suite, file=args.scenarios, family=args.family, checkpoint=args.checkpoint)
        sizes = chosen.suite.tp if args.tp is None else sizes_of(args.tp)
        phases = [phase for phase in args.phases.split(",") if phase]
        cells(chosen.scenarios, phases, sizes)
        front = Front(
            args.benchmark_json,
            args.benchmark_save,
            args.benchmark_compare,
            args.benchmark_histogram,
            args.benchmark_storage,
        )
        if not args.dry_run:
            front.check()
        limits = Limits(call_s=args.timeout)
        with RemoteTarget(args.target, python=args.python, limits=limits) as target:
            info = target.info
            if args.tp is None and Capability.TENSOR_PARALLEL not in info.capabilities:
                sizes = (1,)
            if info.emulated and not (args.rehearse or args.dry_run):
                raise UsageError(
                    f"target {args.target!r} is emulated: its latency says nothing about a device; "
                    "--rehearse runs it all the same and marks every figure"
                )
            impossible = _impossible(target, chosen.scenarios, sizes, args.checkpoint)
            together = min(max(sizes), args.nproc_per_node or max(sizes))
            threads = args.threads if args.threads is not None else max(1, machine.cores() // together)
            header = _header(args, chosen, sizes, threads, info)
            plan = cells(
                chosen.scenarios,
                phases,
                sizes,
                checkpoint=args.checkpoint,
                fixed_shapes=info.fixed_shapes,
                seed=header.plan.get("seed"),
            )
            if not plan:
                raise UsageError(f"target {args.target!r} has nothing to measure in {', '.join(phases)}")
            forecast = Forecast(plan, earlier(args.results, args.target, header.plan), header.plan["cell_s"])
            if args.dry_run:
                memory = None if args.device_memory is None else int(args.device_memory * 2**30)
                console = Console(highlight=False)
                timetable.show(plan, impossible, forecast, header.plan, console)
                outline.show(target, chosen.scenarios, sizes, args.checkpoint, memory, POSITIONS, console)
                return EXIT_OK
        settings = Settings(
            target=args.target,
            threads=threads,
            python=args.python,
            limits=limits,
            repeats=args.repeats,
            cell_s=header.plan["cell_s"],
            checkpoint=args.checkpoint,
            rehearse=args.rehearse,
            emulated=info.emulated,
            dtype=info.dtype,
            scenario_s=chosen.limits_s(args.scenario_timeout),
            impossible=impossible,
        )
        with nodes.opened(args, max(sizes)) as others:
            writer = Writer.start(args.results, header, fresh=args.fresh)
            return _measure(plan, replace(settings, nodes=others), writer, forecast, front)


command = _Command()


def _measure(plan: Sequence[Cell], settings: Settings, writer: Writer, forecast: Forecast, front: Front) -> int:
    reporter = Reporter(plan, forecast, writer.done)
    reporter.start()
    try:
        Runner(settings, writer, reporter.update, reporter.say).run(plan)
    except KeyboardInterrupt:
        reporter.stop()
        said = f"interrupted; the same command goes on after {len(writer.done)} cells: {writer.path}"
        reporter.console.print(said, soft_wrap=True, markup=False)
        raise
    finally:
        reporter.stop()
    writer.finish()
    rows = _listed([row for row in writer.done.values() if isinstance(row, Measurement)], writer.header)
    table(rows, reporter.console)
    scaling.table(rows, reporter.console)
    failed = [row for row in rows if row.state == "failed"]
    for reason in dict.fromkeys(row.reason for row in failed):
        same = [row.case for row in failed if row.reason == reason]
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        reporter.console.print(f"FAILED {same[0]}{more}: {reason}", soft_wrap=True, markup=False)
    if front.wanted and any(row not in failed for row in rows):
        show(rows, front)
    reporter.console.print(str(writer.path), soft_wrap=True, markup=False)
    return EXIT_FAILED if failed else EXIT_OK


def _listed(rows: Sequence[Measurement], header: Header) -> list[Measurement]:
    """Rows in the order of the scenarios file, whatever order they were measured in."""
    scenarios: list[str] = header.plan["scenarios"]
    return sorted(rows, key=lambda row: (scenarios.index(row.scenario), PHASES.index(row.phase), row.tp))


def _valid(args: argparse.Namespace) -> None:
    """Refuse what is wrong on its own."""
    for name in ("repeats", "cell_seconds", "timeout", "scenario_timeout", "device_memory"):
        value = getattr(args, name)
        if value is not None and not (0 < value < float("inf")):
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive and finite")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads} is not positive")
    if args.seed is not None and args.order != "random":
        raise UsageError(f"--seed {args.seed} is for --order random; --order {args.order} has no use for it")
    if args.results.exists() and not args.results.is_dir():
        raise UsageError(f"results directory {args.results} is no directory")


def _impossible(
    target: RemoteTarget, scenarios: Sequence[Scenario], sizes: Sequence[int], checkpoint: Path | None
) -> dict[tuple[str, int], str]:
    """What the target refuses, asked in one process and before anything is loaded: scenario and size to the reason.

    Raises:
        UsageError: nothing is left that it would do, or a scenario's family or files are not there.
    """
    info = target.info
    refused: dict[tuple[str, int], str] = {}
    for scenario in scenarios:
        if scenario.family not in info.families:
            raise UsageError(
                f"target {target.text!r} does not open {scenario.family}, which {scenario.id} needs; "
                f"--family leaves others out (it opens {', '.join(info.families)})"
            )
        model = model_of(scenario, checkpoint)
        for size in sizes:
            try:
                if size > 1 and Capability.TENSOR_PARALLEL not in info.capabilities:
                    raise Unsupported(
                        f"target {target.text!r} does not split a model over devices: it lacks tensor-parallel"
                    )
                target.check(model, Options(tp=size, batch=scenario.batch))
            except (UsageError, Unsupported) as error:
                refused[scenario.id, size] = str(error)
    if len(refused) == len(scenarios) * len(sizes):
        raise UsageError(next(iter(refused.values())))
    return refused


def _header(args: argparse.Namespace, chosen: Selection, sizes: Sequence[int], threads: int, info: Info) -> Header:
    scenarios = [scenario.id for scenario in chosen.scenarios]
    seed = args.seed if args.seed is not None else seed_of(args.target, args.suite, scenarios, args.phases, list(sizes))
    return Header(
        kind="perf",
        subject=args.target,
        suite=suite_version(),
        info={**vars(info), "capabilities": sorted(str(item) for item in info.capabilities)},
        machine=machine.describe(),
        command=" ".join(["vlmqual", *sys.argv[1:]]),
        plan={
            "suite": args.suite,
            "scenarios": scenarios,
            "phases": args.phases,
            "tp": list(sizes),
            "threads": threads,
            "repeats": args.repeats,
            "cell_s": args.cell_seconds or chosen.suite.cell_s,
            "scenario_s": chosen.limits_s(args.scenario_timeout),
            "order": args.order,
            **({"seed": seed} if args.order == "random" else {}),
            "checkpoint": str(args.checkpoint or ""),
            "config": _digest(args.checkpoint / "config.json") if args.checkpoint else "",
            "code": code_digest(args.target),
            "python": args.python or "",
            "fixtures": fixtures.digest(),
            **({"scenarios_file": chosen.digest} if chosen.digest else {}),
            **({"nodes": args.nnodes, "ranks_of_a_node": args.nproc_per_node} if args.nnodes > 1 else {}),
            **({"rehearsal": True} if args.rehearse else {}),
        },
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
