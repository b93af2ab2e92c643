"""`vlmqual gate`: did it become slower?"""

from __future__ import annotations

import argparse
import math
from contextlib import closing
from pathlib import Path

from rich.console import Console

from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, UsageError
from vlmqual_perf import gate_plan, gate_report, gate_run
from vlmqual_perf.baseline_command import save
from vlmqual_perf.gate_forecast import noise_of
from vlmqual_perf.gate_journal import Journal
from vlmqual_perf.gate_plan import Plan
from vlmqual_perf.gate_progress import Reporter
from vlmqual_perf.gate_run import Outcome, Table


class _Gate:
    help = "compare the latency of a candidate with a baseline, with known rates of error"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        side = "target string, baseline file (.json), results of perf (.jsonl) or a folder of those"
        add("--baseline", default="eager", metavar="A", help=f"{side} (default: eager)")
        add("--candidate", metavar="B", help="the same (default: the baseline's target)")
        add("--baseline-python", metavar="PATH", help="interpreter of the environment that the baseline lives in")
        add("--candidate-python", metavar="PATH", help="interpreter of the candidate's")
        add("--tp", metavar="N[,N...]", help="tensor-parallel sizes (default: 1, or those that were recorded)")
        add("--suite", help=f"suite of scenarios, or the id of one (default: {gate_plan.SUITE})")
        phases = ", ".join(gate_plan.PHASES)
        add("--phases", metavar="P[,P...]", help=f"phases of `vlmqual perf` (default: {phases})")
        add("--checkpoint", type=Path, metavar="DIR", help="your own checkpoint instead of the scenarios' tiny ones")
        add("--threads", type=int, metavar="N", help="compute threads of each rank (default: cores / largest TP)")
        add("--repeats", type=int, metavar="N", help="least number of counted repetitions in a launch (7)")
        add("--cell-seconds", type=float, metavar="S", help="time to spend on a cell in a launch beyond that (0.5)")
        add("--timeout", type=float, default=120.0, metavar="S", help="seconds for one answer of a target (120)")
        add("--margin", type=float, default=3.0, metavar="PERCENT", help="change that does not matter (3)")
        add("--max-launches", type=int, default=20, metavar="N", help="of each arm (20)")
        add("--seed", type=int, default=1, metavar="S", help="of the order of the arms (1)")
        add(
            "--noise",
            default="1,2",
            metavar="L,I|FILE",
            help="for the forecast: percent between launches and between "
            "repetitions (1,2), or a gate.json or baseline file",
        )
        add(
            "--session-noise",
            type=float,
            default=1.0,
            metavar="PERCENT",
            help="what sessions differ by; used where the arms are not launched side by side (1)",
        )
        add("--results", type=Path, default=Path("results/gate"), metavar="DIR", help="default: results/gate")
        add("--fresh", action="store_true", help="do not go on with an unfinished gate")
        add("--strict", action="store_true", help="`cannot tell` fails as well")
        add("--dry-run", action="store_true", help="only print the plan and what could be seen")
        add("--rehearse", action="store_true", help="compare emulated targets too; the report says so")
        add("--allow-different-machine", action="store_true", help="compare with what was recorded on another machine")
        files = parser.add_argument_group("baseline files")
        files.add_argument("--save-baseline", type=Path, metavar="FILE", help="record launches of --baseline instead")
        files.add_argument("--sign", type=Path, metavar="KEY", help="private key to sign the file with")
        files.add_argument("--trust", type=Path, metavar="KEY", help="public key that has to have signed what is read")

    def run(self, args: argparse.Namespace) -> int:
        """Plan, forecast, launch, judge."""
        _check(args)
        if args.save_baseline is not None:
            return save(args)
        if args.sign is not None:
            raise UsageError("--sign is for --save-baseline")
        noise = noise_of(args.noise)
        console = Console(highlight=False)
        plan = gate_plan.plan(args)
        forecast = gate_report.announce(plan, noise, console)
        if args.dry_run:
            return EXIT_OK
        comparison = plan.comparison
        arms = comparison.arms()
        if not arms:
            return _conclude(args, plan, gate_run.run(comparison, None, _silent), {"forecast": forecast}, console)
        sizes = len({cell.tp for cell in comparison.cells})
        with closing(Journal(args.results, plan.identity(), fresh=args.fresh)) as journal:
            with Reporter(sizes * sum(map(len, arms)), len(arms), journal) as reporter:
                table = gate_run.run(comparison, journal, reporter.update)
            code = _conclude(args, plan, table, {"forecast": forecast, "journal": journal.path.name}, console)
            journal.finish()
        return code


command = _Gate()


def _conclude(args: argparse.Namespace, plan: Plan, table: Table, more: dict[str, object], console: Console) -> int:
    outcomes = table.outcomes()
    code = _code(outcomes, args.strict)
    path = args.results / gate_report.NAME
    gate_report.write(path, plan, table, outcomes, {**more, "exit": code})
    gate_report.show(plan, outcomes, console)
    console.print(str(path), soft_wrap=True, markup=False)
    return code


def _code(outcomes: list[Outcome], strict: bool) -> int:
    """A regression fails; a cell whose launches fail leaves the gate incomplete."""
    words = {one.verdict for one in outcomes}
    if "regressed" in words:
        return EXIT_FAILED
    if any(one.broken for one in outcomes):
        return EXIT_INCOMPLETE
    return EXIT_FAILED if strict and "cannot tell" in words else EXIT_OK


def _check(args: argparse.Namespace) -> None:
    for name in ("margin", "timeout", "cell_seconds", "repeats", "threads"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive and finite")
    if not 0 <= args.session_noise < 100:
        raise UsageError(f"--session-noise {args.session_noise}: a percentage from 0 to 100 is valid")
    if args.margin >= 100:
        raise UsageError(f"--margin {args.margin:g}: a percentage below 100 is valid")
    if args.results.exists() and not args.results.is_dir():
        raise UsageError(f"results directory {args.results} is no directory")


def _silent(block: int, launch: object, cells: int) -> None:
    """Nothing is launched, nothing is said."""
