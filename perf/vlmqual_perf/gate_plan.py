"""From arguments to a comparison: who is compared, over which cells, by which rule; refuses what cannot be compared."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmqual_contract import fixtures, machine
from vlmqual_contract.discovery import code_digest, suite_version
from vlmqual_contract.errors import UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.remote import RemoteTarget
from vlmqual_contract.scenario import Scenario, load_catalogue
from vlmqual_contract.target import Capability, Info, Options
from vlmqual_perf import gate_recorded
from vlmqual_perf.gate_launches import Arm, Name, Settings
from vlmqual_perf.gate_recorded import MACHINE, Recorded, differences, told
from vlmqual_perf.gate_run import Comparison
from vlmqual_perf.gate_statistics import FEWEST, Rule
from vlmqual_perf.plan import cells, model_of, sizes_of

PHASES = ("preprocess", "vision", "prefill", "decode", "ttft")
SUITE = "smoke"


@dataclass(frozen=True)
class Plan:
    """A comparison and what is said about it.

    Attributes:
        comparison: what will be compared.
        infos: what each side says of itself, by "A" and "B".
        differs: one clause for everything in which machines, targets or versions differ.
        notes: sentences for the reader.
    """

    comparison: Comparison
    infos: Mapping[str, Mapping[str, Any]]
    differs: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def rehearsal(self) -> bool:
        """An emulated target takes part, so that no figure says anything about a device."""
        return any(info.get("emulated") for info in self.infos.values())

    def identity(self) -> dict[str, Any]:
        """Plain data that has to be equal for a later run to go on with this one's launches."""
        comparison = self.comparison
        sides = [comparison.baseline, comparison.candidate]
        return {
            "arms": [_identity(side) for side in sides],
            "infos": json.loads(json.dumps(self.infos, sort_keys=True, default=str)),
            "cells": [cell.case for cell in comparison.cells],
            "rule": vars(comparison.rule),
            "session": comparison.session,
            "seed": comparison.seed,
            **settings_identity(comparison.settings),
        }


def settings_identity(settings: Settings) -> dict[str, Any]:
    """Plain data about how and where launches are made."""
    own = settings.checkpoint
    return {
        **settings.plain(),
        "checkpoint": str(own or ""),
        "config": hashlib.sha256((own / "config.json").read_bytes()).hexdigest()[:16] if own else "",
        "machine": machine.describe(),
        "suite": suite_version(),
        "fixtures": fixtures.digest(),
    }


def _identity(side: Arm | Recorded) -> dict[str, Any]:
    if isinstance(side, Arm):
        return {"target": side.target, "python": side.python or "", "code": code_digest(side.target)}
    return {"source": str(side.source), "digest": side.digest, "launches": len(side.launches)}


def plan(args: argparse.Namespace) -> Plan:
    """The comparison that the arguments ask for.

    Raises:
        UsageError: an argument is not valid, a target cannot do what is asked, or the sides cannot be compared.
    """
    if args.max_launches % 2 or args.max_launches < FEWEST:
        raise UsageError(f"--max-launches {args.max_launches}: an even number of at least {FEWEST} is valid")
    baseline = side("A", args.baseline, args.baseline_python, args)
    same = baseline.subject if isinstance(baseline, Recorded) else baseline.target
    candidate = side("B", args.candidate or same, args.candidate_python, args)
    if isinstance(candidate, Recorded) and not isinstance(baseline, Recorded):
        raise UsageError("a recorded --candidate can be compared with a recorded --baseline only")
    notes = []
    if isinstance(baseline, Arm) and isinstance(candidate, Arm) and _identity(baseline) == _identity(candidate):
        notes.append("both sides are the same: whatever is found is a false alarm, or the machine")
    sides = (baseline, candidate)
    recorded = [one for one in sides if isinstance(one, Recorded)]
    if args.trust is not None and not recorded:
        raise UsageError(f"--trust {args.trust} is for recorded launches; both sides are launched")
    settings = settings_of(args, recorded)
    scenarios, phases, sizes = chosen(args, recorded)
    asked: dict[tuple[str, str | None], dict[str, Any]] = {}
    infos: dict[str, dict[str, Any]] = {}
    for one in sides:
        if isinstance(one, Recorded):
            infos[one.name] = dict(one.info)
            continue
        key = (one.target, one.python)
        asked[key] = asked.get(key) or plain(check(one, scenarios, sizes, settings, args.rehearse))
        infos[one.name] = asked[key]
    fixed = all(info.get("fixed_shapes") for info in infos.values())
    wanted = cells(scenarios, phases, sizes, checkpoint=settings.checkpoint, fixed_shapes=fixed)
    for one in recorded:
        there = {case for launch in one.launches for case in launch.cells}
        wanted = [cell for cell in wanted if cell.case in there]
    if not wanted:
        where = "".join(f"; {one.source} has to have it" for one in recorded)
        raise UsageError(f"no cell is left to compare in {', '.join(phases)}{where}")
    differs = _differs(sides, infos, args.allow_different_machine)
    comparison = Comparison(
        baseline=baseline,
        candidate=candidate,
        cells=tuple(wanted),
        rule=Rule(pairs=args.max_launches, margin=args.margin / 100),
        settings=settings,
        seed=args.seed,
        session=args.session_noise / 100,
    )
    if recorded:
        notes.append(
            "unpaired: the arms were not launched side by side, so that a difference between sessions of "
            f"{args.session_noise:g} % (--session-noise) is allowed for"
        )
    found = Plan(comparison, infos, tuple(differs), tuple(notes))
    said = ("rehearsal: an emulated target is compared, which says nothing about a device",)
    return replace(found, notes=(*found.notes, *said)) if found.rehearsal else found


def side(name: Name, text: str, python: str | None, args: argparse.Namespace) -> Arm | Recorded:
    """A side: a file or folder of recorded launches, else a target string.

    Raises:
        UsageError: the file is not there, or an interpreter is named for recorded launches.
    """
    path = Path(text)
    if path.suffix in (".json", ".jsonl") or path.is_dir():
        if python is not None:
            raise UsageError(f"{text} is recorded; an interpreter ({python}) is for a target that is launched")
        if not path.exists():
            raise UsageError(f"{text} does not exist")
        return gate_recorded.read(name, path, args.trust)
    return Arm(name, text, python)


def settings_of(args: argparse.Namespace, recorded: Sequence[Recorded] = ()) -> Settings:
    """How launches are made; as the recorded ones were, where the user does not say otherwise."""
    if args.checkpoint is not None and not (args.checkpoint / "config.json").is_file():
        raise UsageError(f"--checkpoint {args.checkpoint} has no config.json")
    earlier = recorded[0].plan if recorded else {}
    largest = max(sizes_of(args.tp)) if args.tp else max([1, *_recorded_sizes(recorded)])
    threads = args.threads or earlier.get("threads") or max(1, machine.cores() // largest)
    for one in recorded:
        if one.plan.get("threads", threads) != threads:
            raise UsageError(f"{one.source} ran with {one.plan['threads']} threads for each rank, not with {threads}")
    return Settings(
        threads=threads,
        repeats=args.repeats or earlier.get("repeats", Settings.repeats),
        cell_s=args.cell_seconds or earlier.get("cell_s", Settings.cell_s),
        limits=Limits(call_s=args.timeout),
        checkpoint=args.checkpoint,
    )


def chosen(
    args: argparse.Namespace, recorded: Sequence[Recorded] = ()
) -> tuple[list[Scenario], list[str], tuple[int, ...]]:
    """Scenarios, phases and sizes: those that are asked for, else those that were recorded, else the default."""
    catalogue = load_catalogue(fixtures.file("scenarios.toml"))
    found = {case for one in recorded for launch in one.launches for case in launch.cells}
    if args.suite is None and recorded:
        scenarios = [scenario for scenario in catalogue.scenarios.values() if _among(scenario.id, found, 0)]
    else:
        scenarios = catalogue.select(args.suite or SUITE)
    phases = list(PHASES)
    if args.phases is not None:
        phases = [phase for phase in args.phases.split(",") if phase]
    elif recorded:
        phases = list(dict.fromkeys(case.split("/")[1] for case in sorted(found)))
    sizes = sizes_of(args.tp) if args.tp else _recorded_sizes(recorded) or (1,)
    return scenarios, phases, sizes


def _among(name: str, cases: set[str], place: int) -> bool:
    return any(case.split("/")[place] == name for case in cases)


def _recorded_sizes(recorded: Sequence[Recorded]) -> tuple[int, ...]:
    return tuple(sorted({launch.tp for one in recorded for launch in one.launches}))


def check(arm: Arm, scenarios: Sequence[Scenario], sizes: Sequence[int], settings: Settings, rehearse: bool) -> Info:
    """Ask a target, in one process and before anything is loaded, whether it can do all of this.

    Raises:
        UsageError: it cannot, or is emulated and this is no rehearsal.
    """
    with RemoteTarget(arm.target, python=arm.python, limits=settings.limits) as target:
        info = target.info
        if info.emulated and not rehearse:
            raise UsageError(
                f"target {arm.target!r} is emulated: its latency says nothing about a device; "
                "--rehearse compares it all the same and says so"
            )
        if max(sizes) > 1 and Capability.TENSOR_PARALLEL not in info.capabilities:
            raise UsageError(f"target {arm.target!r} does not split a model over devices: it lacks tensor-parallel")
        for scenario in scenarios:
            if scenario.family not in info.families:
                raise UsageError(f"target {arm.target!r} does not open {scenario.family}, which {scenario.id} needs")
            for size in sizes:
                target.check(model_of(scenario, settings.checkpoint), Options(tp=size, batch=scenario.batch))
    return info


def plain(info: Info) -> dict[str, Any]:
    """What a target says of itself, as plain data."""
    return {
        **vars(info),
        "capabilities": sorted(str(item) for item in info.capabilities),
        "families": list(info.families),
    }


def _differs(sides: Sequence[Arm | Recorded], infos: Mapping[str, Mapping[str, Any]], allowed: bool) -> list[str]:
    """What differs between the sides, baseline first.

    Raises:
        UsageError: they ran on different machines and that is not allowed, or with different fixtures.
    """
    here = machine.describe()
    machines = [one.machine if isinstance(one, Recorded) else here for one in sides]
    if (found := differences(machines[0], machines[1], MACHINE)) and not allowed:
        raise UsageError(
            f"the machines differ ({'; '.join(found)}), so that times cannot be compared; "
            "--allow-different-machine does it all the same and says so"
        )
    digests = [one.fixtures if isinstance(one, Recorded) else fixtures.digest() for one in sides]
    if digests[0] != digests[1]:
        raise UsageError(
            f"the sides were measured with different fixtures ({digests[0][:12]} and {digests[1][:12]}), so perhaps "
            "with other scenarios; record the baseline again"
        )
    return [*(f"machine, {line}" for line in differences(machines[0], machines[1])), *told(infos["A"], infos["B"])]
