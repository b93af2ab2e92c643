"""What `vlmqual gate` found: cells that became slower or faster, stayed the same, or of which nothing can be said.

A gate is one file, `gate.json`. Its words are taken as they are: they depend on when it stopped to look.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError

NAME = "gate.json"
FORMAT = 1
#: Words, worst first, to the status that they are drawn with.
VERDICTS = {"regressed": "fail", "cannot tell": "noisy", "improved": "pass", "unchanged": "pass"}


@dataclass(frozen=True)
class GateCell:
    """One cell.

    Attributes:
        case: its name.
        verdict: one of `VERDICTS`.
        reason: why nothing can be said.
        change: of the candidate's time in words, "" where nothing was looked at; + is slower.
        interval: that holds the truth at every look at once, in words.
        pairs: log-ratios, or launches, that it stands on.
        excluded: one sentence for every launch that did not count.
        notes: what else there is to know.
    """

    case: str
    verdict: str
    reason: str
    change: str
    interval: str
    pairs: int
    excluded: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """Reason and notes."""
        return tuple(filter(None, (self.reason, *self.notes)))

    @property
    def status(self) -> str:
        """How it is drawn."""
        return VERDICTS[self.verdict]


@dataclass(frozen=True)
class Gate:
    """A gate as the page shows it.

    Attributes:
        path: of its file.
        baseline: what was compared with.
        candidate: what was compared.
        facts: how, in words or numbers.
        notes: sentences on both arms, and what differs between them.
        cells: worst first.
        counts: of cells by verdict, worst first.
        predicted: what could have been seen, said before it started; "" where nothing was launched.
        exit: the code that the gate ended with.
    """

    path: Path
    baseline: str
    candidate: str
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    cells: tuple[GateCell, ...]
    counts: Mapping[str, int]
    predicted: str
    exit: int

    @property
    def fine(self) -> bool:
        """Nothing regressed, and nothing failed that was asked for."""
        return self.exit == 0

    @property
    def line(self) -> str:
        """The counts in words."""
        return ", ".join(f"{number} {word}" for word, number in self.counts.items()) or "no cells"


def read(path: Path) -> Gate:
    """Read a `gate.json`.

    Raises:
        UsageError: it cannot be read, is of another format, or is damaged.
    """
    try:
        whole = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no gate, it is not JSON") from error
    if not isinstance(whole, dict) or whole.get("kind") != "vlmqual gate":
        raise UsageError(f"{path}: no gate of `vlmqual gate`")
    if whole.get("format") != FORMAT:
        raise UsageError(f"{path}: its format is {whole.get('format')!r}; this report reads format {FORMAT}")
    try:
        return _gate(path, whole)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path}: damaged, {type(error).__name__} {error}") from error


def _gate(path: Path, whole: Mapping[str, Any]) -> Gate:
    cells = sorted((_cell(values) for values in whole["cells"]), key=lambda cell: list(VERDICTS).index(cell.verdict))
    counted = Counter(cell.verdict for cell in cells)
    rule = whole["rule"]
    facts = {
        "suite": whole["suite"],
        "made": whole["made"],
        "arms": "launched side by side" if whole["paired"] else "not launched side by side",
        "margin": f"{100 * float(rule['margin']):g} %",
        "false alarms": f"at most {100 * float(rule['alpha']):g} % for a cell",
        "launches": f"at most {int(rule['pairs'])} of each arm, {int(whole['blocks'])} blocks were made",
        "machine": ", ".join(str(whole["machine"].get(name, "")) for name in ("host", "processor")),
    }
    return Gate(
        path=path,
        baseline=str(whole["arms"]["A"]["subject"]),
        candidate=str(whole["arms"]["B"]["subject"]),
        facts=facts,
        notes=(*_texts(whole["notes"]), *_texts(whole["differs"])),
        cells=tuple(cells),
        counts={word: counted[word] for word in VERDICTS if counted[word]},
        predicted=_predicted(whole.get("forecast") or {}),
        exit=int(whole["exit"]),
    )


def _cell(values: Mapping[str, Any]) -> GateCell:
    verdict = str(values["verdict"])
    if verdict not in VERDICTS:
        raise ValueError(f"of a verdict: it is {verdict!r}")
    change, interval = "", ""
    if values.get("change") is not None:
        numbers = [100 * float(values[name]) for name in ("change", "low", "high") if values.get(name) is not None]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"of {values['case']}: a change is not finite")
        change = f"{numbers[0]:+.1f} %"
        interval = f"{numbers[1]:+.1f} to {numbers[2]:+.1f} %" if len(numbers) == 3 else ""
    return GateCell(
        case=str(values["case"]),
        verdict=verdict,
        reason=str(values["reason"]),
        change=change,
        interval=interval,
        pairs=int(values.get("pairs") or 0),
        excluded=_texts(values["excluded"]),
        notes=_texts(values["notes"]),
    )


def _predicted(forecast: Mapping[str, Any]) -> str:
    if "alone" not in forecast:
        return ""
    smallest = forecast["alone"]["smallest"]
    seen = "no change up to +50 %" if smallest is None else f"{100 * float(smallest):+.1f} %"
    return (
        f"predicted before it started, for a noise of {100 * float(forecast['launch_spread']):.2g} % of a launch "
        f"({forecast['source']}): {seen} in one cell is called regressed in 99 of 100 gates"
    )


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise TypeError(f"of a list of texts: it is {values!r}"[:120])
    return tuple(values)
