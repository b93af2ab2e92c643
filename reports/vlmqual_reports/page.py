"""The pages: one self-contained HTML file and one Markdown file, made from the same view of the results.

The HTML page needs no script and loads nothing; its content policy forbids both. Everything that comes from a results
file is escaped, in HTML by Jinja's autoescape, in Markdown in addition by `plain`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from vlmqual_contract.records import Run, Verdict
from vlmqual_contract.scaling import Scaling
from vlmqual_reports import plots
from vlmqual_reports.conformance import Conformance, counts, observed, precisions, summarize, tightest
from vlmqual_reports.gates import Gate
from vlmqual_reports.load import Results, why_incomplete
from vlmqual_reports.performance import FEW, Block, Brief, blocks, briefs, phases, prefill_by_image_tokens, states
from vlmqual_reports.proofs import Proof
from vlmqual_reports.statements import Statements
from vlmqual_reports.subjects import State, Subject, headline, is_calibration, is_emulated, subjects, titles
from vlmqual_reports.waivers import Waiver, waivers

_TEMPLATES = Path(__file__).parent / "templates"

DASH = "\N{EN DASH}"

# Every status has a symbol and a word, so that nothing is told by colour alone.
STATUS = {
    "pass": ("✓", "pass"),
    "fail": ("✗", "fail"),
    "error": ("!", "error"),
    "expected-fail": ("△", "expected fail"),
    "not-applicable": (DASH, "not applicable"),
    "so-far": ("◐", "passed so far"),
    "not-run": ("○", "not run"),
    "elsewhere": ("·", "not of this subject"),
    "valid": ("✓", "valid"),
    "too-few": ("·", "too few values"),
    "noisy": ("≈", "noisy"),
    "not-steady": ("▲", "not steady"),
    "throttled": ("▼", "throttled"),
    "wrong-bucket": ("■", "wrong bucket"),
    "failed": ("✗", "failed"),
}
STATES = {
    State.OK: ("pass", "✓"),
    State.MEASURED: ("measured", "●"),
    State.INCOMPLETE: ("incomplete", "◐"),
    State.FAILED: ("fail", "✗"),
}
_DISTRIBUTION_CAPTION = (
    "Decode steps: share of steps that took at most so long; each point is one step, the slowest rank's"
)
_TP_CAPTION = "{phase}: latency over TP sizes; points are single values, bars are medians"
_PREFILL_CAPTION = (
    "Prefill over image tokens, {family}, all scenarios of batch 1; points are single values, lines join medians"
)


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it."""

    run: Run
    title: str
    newest: bool
    incomplete: str
    calibration: bool
    emulated: bool
    counts: Mapping[str, int]
    tightest: Verdict | None
    precisions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Figure:
    """A plot and its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class PerfView:
    """A performance run: its scenarios, each with its plots, and the plot over all scenarios."""

    view: RunView
    phases: tuple[str, ...]
    briefs: tuple[Brief, ...]
    overviews: tuple[Figure, ...]
    blocks: tuple[tuple[Block, tuple[Figure, ...]], ...]


@dataclass(frozen=True)
class View:
    """Everything that both templates draw."""

    written: str
    results: Results
    problems: tuple[str, ...]
    headline: str
    subjects: tuple[Subject, ...]
    runs: tuple[RunView, ...]
    older: tuple[RunView, ...]
    conformance: Conformance
    waivers: tuple[Waiver, ...]
    columns: tuple[RunView, ...]
    perf: tuple[PerfView, ...]
    machines: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    differences: tuple[str, ...]
    statements: Statements


def view(results: Results, statements: Statements, now: datetime) -> View:
    """Work out what the pages show.

    Args:
        results: the runs.
        statements: the requirements that are known here.
        now: the moment that is printed as the page's, and against whose day expiries are judged.
    """
    today = now.date()
    judged = [run for run in results.newest if run.header.kind == "conformance"]
    timed = [run for run in results.newest if run.header.kind == "perf"]
    columns = tuple(_run_view(run, title) for run, title in zip(judged, titles(judged), strict=True))
    rows = tuple(_run_view(run, title) for run, title in zip(timed, titles(timed), strict=True))
    found = subjects([*judged, *timed], today)
    older = tuple(_run_view(run, run.header.subject, newest=False) for run in results.older)
    machines: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for row in (*columns, *rows):
        machine = row.run.header.machine
        key = json.dumps(machine, sort_keys=True, default=str)
        machines.setdefault(key, (machine, []))[1].append(f"{row.title} ({row.run.header.kind})")
    return View(
        written=now.strftime("%Y-%m-%d %H:%M %Z").strip(),
        results=results,
        problems=(*results.problems, *statements.problems),
        headline="; ".join(filter(None, [headline(found), *_told(results)])),
        subjects=tuple(found),
        runs=(*columns, *rows),
        older=older,
        conformance=summarize(judged, statements, today),
        waivers=waivers(judged, today),
        columns=columns,
        perf=_perf_views(rows),
        machines=tuple((machine, tuple(used)) for machine, used in machines.values()),
        differences=tuple(_differences([machine for machine, _ in machines.values()])),
        statements=statements,
    )


def _told(results: Results) -> list[str]:
    """One clause for each proof, gate and self-check of the harness."""
    checked = [f"self-check of the harness: {'as required' if one.fine else 'failed'}" for one in results.checks]
    return [*map(_proven, results.proofs), *map(_gated, results.gates), *checked]


def _gated(gate: Gate) -> str:
    return f"gate of {gate.candidate}: {gate.line}"


def _proven(proof: Proof) -> str:
    families = ", ".join(family.name for family in proof.families)
    return f"proof of {families or 'nothing'}: {'as required' if proof.fine else 'failed'}"


def html(content: View) -> str:
    """The HTML page."""
    return _environment(finalize=False).get_template("page.html").render(_names(content))


def markdown(content: View) -> str:
    """The Markdown page, without plots."""
    text = _environment(finalize=True).get_template("page.md").render(_names(content))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def plain(value: object) -> Markup:
    """A value as Markdown that shows exactly its characters, on one line, also inside a table."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    return Markup(re.sub(r"([\\`*_\[\]|~#])", r"\\\1", str(escape(text))).replace("&\\#", "&#"))


def ms(value: float | None, mark: str = "") -> str:
    """Milliseconds with at least three significant digits and what follows them, a dash for None."""
    if value is None:
        return DASH
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 else 5
    return f"{value:,.{digits}f}{mark}"


def number(value: float | None, digits: int = 3, mark: str = "") -> str:
    """A number with so many significant digits and what follows it, a dash for None."""
    if value is None:
        return DASH
    return (f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:,.0f}") + mark


def share(part: int, whole: int) -> str:
    """So many of so many, with the percentage."""
    return f"{part} of {whole} ({part / whole:.1%})" if whole else f"{part} of {whole}"


def fact(value: object, name: str = "") -> str:
    """A value of a header or of details as text: lists and mappings on one line, bytes in GiB."""
    if name.endswith("_bytes") and isinstance(value, (int, float)) and value:
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(fact(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _names(content: View) -> dict[str, Any]:
    return {"view": content, "STATUS": STATUS, "STATES": STATES, "FEW": FEW, "counts": counts, "observed": observed}


def _environment(*, finalize: bool) -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=plain if finalize else None,
    )
    made.filters |= {
        "speedup": speedup,
        "efficiency": efficiency,
        "share": share,
        "ms": ms,
        "number": number,
        "fact": fact,
        "label": _label,
    }
    return made


def speedup(found: Scaling | None, mark: str = "") -> str:
    """A speed-up with its interval, as "1.82x (1.75 to 1.90)"."""
    if found is None:
        return DASH
    between = "" if found.interval is None else " ({:.2f} to {:.2f})".format(*found.interval)
    return f"{found.speedup:.2f}\N{MULTIPLICATION SIGN}{between}{mark}"


def efficiency(found: Scaling | None, mark: str = "") -> str:
    """An efficiency with its interval, for example "91 % (88 to 95)"."""
    if found is None:
        return DASH
    interval = found.efficiency_interval
    between = "" if interval is None else f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
    return f"{100 * found.efficiency:.0f} %{between}{mark}"


def _label(name: str) -> str:
    return name.replace("_", " ")


def _differences(machines: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(str(name) for machine in machines for name in machine)
    return [_label(name) for name in names if len({fact(machine.get(name, "")) for machine in machines}) > 1]


def _run_view(run: Run, title: str, *, newest: bool = True) -> RunView:
    judged = run.header.kind == "conformance"
    return RunView(
        run=run,
        title=title,
        newest=newest,
        incomplete=why_incomplete(run),
        calibration=is_calibration(run),
        emulated=is_emulated(run),
        counts=counts(run.verdicts) if judged else states(run),
        tightest=tightest(run) if judged else None,
        precisions=precisions(run) if judged else (),
    )


def _perf_views(rows: Sequence[RunView]) -> tuple[PerfView, ...]:
    views = []
    drawn = 0
    for row in rows:
        parts = []
        found = blocks(row.run)
        for block in found:
            figures = _figures(block, drawn)
            drawn += len(figures)
            parts.append((block, figures))
        overviews = []
        for family, points in prefill_by_image_tokens(found).items():
            if len({tokens for series in points.values() for tokens, _ in series}) > 1:
                overviews.append(Figure(plots.prefill(points, drawn), _PREFILL_CAPTION.format(family=family)))
                drawn += 1
        views.append(PerfView(row, tuple(phases(found)), tuple(briefs(found)), tuple(overviews), tuple(parts)))
    return tuple(views)


def _figures(block: Block, first: int) -> tuple[Figure, ...]:
    doubts: dict[str, str] = {}
    for cell in block.cells:
        if cell.state != "valid":
            doubts[cell.phase] = doubts.get(cell.phase, "") + f"; TP {cell.tp} {STATUS[cell.state][1]}"
    figures: list[Figure] = []
    steps = block.values_ms("decode")
    if any(len(values) > 1 for values in steps.values()):
        figures.append(Figure(plots.decode_steps(steps, first), _DISTRIBUTION_CAPTION + doubts.get("decode", "")))
    for phase in block.phases:
        values = block.values_ms(phase)
        if len(values) > 1:
            caption = _TP_CAPTION.format(phase=phase) + doubts.get(phase, "")
            figures.append(Figure(plots.over_tp(values, first + len(figures)), caption))
    return tuple(figures)
