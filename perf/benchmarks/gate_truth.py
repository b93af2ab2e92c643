"""Real gates over the truth target: one cell becomes slower by a known share, the others do not.

    python perf/benchmarks/gate_truth.py --gates 10 --slower 3

Every launch starts workers, and the machine's own noise is the noise. Decode takes 1 ms for a step, of the candidate
so many percent more; preprocess, vision and prefill take the same in both arms. Counted is how many gates call decode
regressed, and how many of the others are called anything but unchanged.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from rich.console import Console

from vlmqual_contract import fixtures
from vlmqual_contract.scenario import load_catalogue
from vlmqual_perf.gate_journal import Journal
from vlmqual_perf.gate_launches import Arm, Settings
from vlmqual_perf.gate_run import Comparison, run
from vlmqual_perf.gate_statistics import Rule
from vlmqual_perf.plan import cells

STEP_MS = 1.0


def main() -> int:
    """Print what came of each gate, and the counts; 1 when one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gates", type=int, default=5)
    parser.add_argument("--slower", type=float, default=3.0, metavar="PERCENT", help="0 for no change (3)")
    parser.add_argument("--max-launches", type=int, default=20)
    args = parser.parse_args()
    console = Console(highlight=False)
    scenarios = load_catalogue(fixtures.file("scenarios.toml")).select("idefics3-photo")
    chosen = tuple(cells(scenarios, ["preprocess", "vision", "prefill", "decode"], [1]))
    slow_ms = STEP_MS * (1 + args.slower / 100)
    counts: dict[str, Counter[str]] = {"decode": Counter(), "others": Counter()}
    launches: list[int] = []
    for index in range(args.gates):
        start = time.monotonic()
        comparison = Comparison(
            baseline=Arm("A", f"truth:step_ms={STEP_MS:g}"),
            candidate=Arm("B", f"truth:step_ms={slow_ms:g}"),
            cells=chosen,
            rule=Rule(pairs=args.max_launches),
            settings=Settings(threads=1, cell_s=0.1),
            seed=index,
        )
        with tempfile.TemporaryDirectory() as folder, closing(Journal(Path(folder), {})) as journal:
            table = run(comparison, journal, lambda *_: None)
        said = []
        for one in table.outcomes():
            phase = one.case.split("/")[1]
            counts["decode" if phase == "decode" else "others"][one.verdict] += 1
            if phase == "decode":
                launches.append(sum(one.case in launch.cells for launch in table.launches) // 2)
            change = f" {100 * one.estimate.change:+.1f} %" if one.estimate else ""
            said.append(f"{phase} {one.verdict}{change}")
        console.print(f"gate {index + 1}: {', '.join(said)}; {time.monotonic() - start:.0f} s", soft_wrap=True)
    console.print(f"decode, slower by {args.slower:g} %: {dict(counts['decode'])}")
    console.print(f"decode was decided after {sum(launches) / len(launches):.1f} launches of each arm on average")
    console.print(f"the others, without a change: {dict(counts['others'])}")
    alarms = counts["others"]["regressed"] + counts["others"]["improved"]
    if args.slower == 0:
        alarms += counts["decode"]["regressed"] + counts["decode"]["improved"]
        return 1 if alarms else 0
    return 1 if alarms or counts["decode"]["regressed"] < args.gates else 0


if __name__ == "__main__":
    sys.exit(main())
