"""Plots as inline SVG that takes its colours and its font from the page, so that it reads in light, dark and print.

No text from a results file is drawn: titles and captions belong to the page, where they are escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Stand-ins that the SVG is drawn with, and the custom properties of the page that replace them.
_INK, _MUTED, _GRID, _PAPER = "#010100", "#010101", "#010102", "#010103"
_SERIES = tuple(f"#0102{number:02x}" for number in range(6))
_PROPERTIES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line", _PAPER: "--card"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES)
}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)), (0, (4, 1)))
_FEW_POINTS = 300

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlmqual",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


def decode_steps(values_ms: Mapping[int, Sequence[float]], number: int) -> Markup:
    """Share of decode steps that were at most so long, one staircase for each TP size, every step a point.

    Args:
        values_ms: TP sizes to all step times.
        number: unique in the page, so that ids inside the SVG are.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        for index, (tp, values) in enumerate(values_ms.items()):
            ordered = np.sort(np.asarray(values, dtype=float))
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(ordered, share, where="post", **_line(index), label=f"TP {tp}")
            if len(ordered) <= _FEW_POINTS:
                axes.plot(ordered, share, linestyle="none", **_points(index))
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("time of a step, ms")
        axes.set_ylabel("share of steps")
        _legend(axes)
        return _svg(figure, number, "Cumulative distribution of decode step times")


def over_tp(values_ms: Mapping[int, Sequence[float]], number: int) -> Markup:
    """Latency over TP sizes from zero: every value a point, medians joined by a line."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        sizes = list(values_ms)
        for index, values in enumerate(values_ms.values()):
            axes.plot(_spread(index, len(values)), values, linestyle="none", **_points(0))
        medians = [float(np.median(values)) for values in values_ms.values()]
        axes.plot(range(len(sizes)), medians, **_line(0), marker="_", markersize=18, markeredgewidth=2)
        axes.set_xticks(range(len(sizes)), [str(tp) for tp in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_ylim(0, max(max(values) for values in values_ms.values()) * 1.08 or 1.0)
        axes.set_xlabel("TP size")
        axes.set_ylabel("ms")
        axes.grid(visible=False, axis="x")
        return _svg(figure, number, "Latency over tensor-parallel sizes")


def prefill(points: Mapping[int, Sequence[tuple[int, Sequence[float]]]], number: int) -> Markup:
    """Prefill latency over image tokens: every value a point, medians joined for each TP size."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        top = 0.0
        for index, (tp, series) in enumerate(points.items()):
            for tokens, values in series:
                axes.plot([tokens] * len(values), values, linestyle="none", **_points(index))
                top = max(top, *values)
            medians = [float(np.median(values)) for _, values in series]
            axes.plot([tokens for tokens, _ in series], medians, **_line(index), label=f"TP {tp}")
        axes.set_ylim(0, top * 1.08 or 1.0)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("image tokens")
        axes.set_ylabel("ms")
        _legend(axes)
        return _svg(figure, number, "Prefill latency over image tokens")


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _line(index: int) -> dict[str, Any]:
    kind = index % len(_SERIES)
    return {"color": _SERIES[kind], "linestyle": _DASHES[kind], "linewidth": 1.6}


def _points(index: int) -> dict[str, Any]:
    kind = index % len(_SERIES)
    return {"color": _SERIES[kind], "marker": _MARKERS[kind], "markersize": 3.2, "alpha": 0.55, "markeredgewidth": 0}


def _spread(centre: int, count: int) -> list[float]:
    """Abscissae that keep equal values apart; the same every time."""
    return [centre + float(offset) for offset in np.linspace(-0.14, 0.14, count)] if count > 1 else [float(centre)]


def _legend(axes: Axes) -> None:
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="best", handlelength=3.2)


def _svg(figure: Figure, number: int, description: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL
    )  # a style would be the page's
    box = re.search(r'viewBox="[^"]*"', text)
    text = re.sub(r"<svg[^>]*>", f"<svg {box.group() if box else ''}>", text, count=1)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>plot{number}-", text)
    text = re.sub(
        r"font-family: [^;\"]*;?|font: ([\d.]+px) [^;\"]*", lambda hit: f"font-size: {hit[1]}" if hit[1] else "", text
    )
    text = re.sub(r"(\d+\.\d\d)\d+", r"\1", " ".join(text.split()))  # hundredths of a point are enough
    for colour, name in _PROPERTIES.items():
        text = text.replace(colour, f"var({name})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
