"""`vlmqual baseline`: files of recorded launches, and the keys that sign them; also how `gate` makes such a file."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from rich.console import Console

from vlmqual_contract import fixtures, machine
from vlmqual_contract.discovery import suite_version
from vlmqual_contract.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from vlmqual_perf import baselines, gate_plan, gate_run
from vlmqual_perf.baselines import Baseline
from vlmqual_perf.gate_journal import Journal
from vlmqual_perf.gate_progress import Reporter
from vlmqual_perf.gate_recorded import Recorded
from vlmqual_perf.gate_statistics import FEWEST
from vlmqual_perf.plan import cells


def save(args: argparse.Namespace) -> int:
    """`vlmqual gate --save-baseline`: record launches of one target in a baseline file.

    Raises:
        UsageError: the arguments are not valid, the target cannot do what is asked, or a file cannot be written.
    """
    if args.candidate is not None or args.candidate_python is not None:
        raise UsageError("--save-baseline records --baseline; it takes no candidate")
    arm = gate_plan.side("A", args.baseline, args.baseline_python, args)
    if isinstance(arm, Recorded):
        raise UsageError(f"--save-baseline records launches of a target; {args.baseline} is recorded already")
    if args.save_baseline.suffix != ".json":
        raise UsageError(f"--save-baseline {args.save_baseline}: the name of a baseline file ends with .json")
    if args.max_launches < FEWEST:
        raise UsageError(f"--max-launches {args.max_launches}: at least {FEWEST} launches make a baseline")
    if args.save_baseline.exists():
        baselines.read(args.save_baseline, args.trust)
    settings = gate_plan.settings_of(args)
    scenarios, phases, sizes = gate_plan.chosen(args)
    info = gate_plan.plain(gate_plan.check(arm, scenarios, sizes, settings, args.rehearse))
    wanted = cells(
        scenarios, phases, sizes, checkpoint=settings.checkpoint, fixed_shapes=bool(info.get("fixed_shapes"))
    )
    if not wanted:
        raise UsageError(f"no cell is left to record in {', '.join(phases)}")
    identity = {**gate_plan.settings_identity(settings), "baseline": arm.target, "python": arm.python or ""}
    names = [cell.case for cell in wanted]
    console = Console(highlight=False)
    console.print(f"{args.max_launches} launches of {arm.target}, {len(names)} cells", soft_wrap=True, markup=False)
    if args.dry_run:
        return EXIT_OK
    identity |= {"cells": names, "launches": args.max_launches}
    with closing(Journal(args.results, identity, fresh=args.fresh)) as journal:
        with Reporter(args.max_launches * len(sizes), args.max_launches, journal) as reporter:
            launches = gate_run.record(arm, wanted, settings, args.max_launches, journal, reporter.update)
        new = Baseline(
            subject=arm.target,
            info=info,
            machine=machine.describe(),
            suite=suite_version(),
            fixtures=fixtures.digest(),
            plan={**settings.plain(), "checkpoint": str(settings.checkpoint or ""), "cells": names},
            launches=tuple(launches),
        )
        found = baselines.save(args.save_baseline, new, args.sign)
        journal.finish()
    _describe(args.save_baseline, found, None, console)
    few = False
    for name in names:
        readings = [one.cells[name] for one in launches if name in one.cells]
        count = sum(each.counts for each in readings)
        few = few or count < FEWEST
        if count < len(readings):
            last = next(f"{each.state}: {each.reason}" for each in reversed(readings) if not each.counts)
            said = (
                f"{name}: {count} of {len(readings)} launches count (a gate needs {FEWEST}), the last that does not is"
            )
            console.print(f"{said} {last}", soft_wrap=True, markup=False)
    return EXIT_INCOMPLETE if few else EXIT_OK


class _Baseline:
    help = "show or verify a baseline file of `vlmqual gate`, or make keys to sign one"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
        for name, said in (("show", "say what a file holds"), ("verify", "also that the owner of a key signed it")):
            action = actions.add_parser(name, help=said, description=said)
            action.add_argument("file", type=Path, metavar="FILE")
            action.add_argument("--trust", type=Path, metavar="KEY", required=name == "verify", help="public key")
        keygen = actions.add_parser("keygen", help="make KEY, to sign with, and KEY.pub, to verify with")
        keygen.add_argument("file", type=Path, metavar="KEY")

    def run(self, args: argparse.Namespace) -> int:
        """Do it."""
        console = Console(highlight=False)
        if args.action == "keygen":
            public = baselines.generate(args.file)
            console.print(f"{args.file} signs (keep it secret), {public} verifies", soft_wrap=True, markup=False)
            return EXIT_OK
        _describe(args.file, baselines.read(args.file, args.trust), args.trust, console)
        return EXIT_OK


command = _Baseline()


def _describe(path: Path, found: Baseline, trusted: Path | None, console: Console) -> None:
    count = len({(one.block, one.place) for one in found.launches})
    after = f", follows {found.previous[:12]}" if found.previous else ""
    lines = [
        f"{path}: version {found.version}{after}, made {found.made} by vlmqual {found.suite}",
        f"{count} launches of {found.subject}, {len(found.plan['cells'])} cells",
        f"on {found.machine.get('host')}, {found.machine.get('processor')}, {found.machine.get('cores')} cores",
        f"digest {found.digest}",
        _signed(found, trusted),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _signed(found: Baseline, trusted: Path | None) -> str:
    if not found.signer:
        return "not signed"
    return f"signed by {trusted}" if trusted else f"signature of key {found.signer}, not checked (--trust KEY does)"
