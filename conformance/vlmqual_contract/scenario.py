"""Scenarios: what a performance run feeds to a model."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import FAMILIES, MARKERS


@dataclass(frozen=True)
class Scenario:
    """One kind of request.

    Attributes:
        id: unique name.
        family: `model_type`.
        checkpoint: name of a fixture checkpoint.
        images: names of fixture images, in the order of the markers.
        prompt: text after the chat template, one marker of the family for each image.
        batch: how many rows of the same prompt.
        new_tokens: decode steps.
        suites: names of the suites that it belongs to.
        title: a few words for tables and plots.
    """

    id: str
    family: str
    checkpoint: str
    prompt: str
    images: tuple[str, ...] = ()
    batch: int = 1
    new_tokens: int = 16
    suites: tuple[str, ...] = ("default",)
    title: str = ""


def load_scenarios(path: Path) -> dict[str, Scenario]:
    """Read `scenarios.toml`; ids to scenarios in file order.

    Raises:
        UsageError: the file or a table in it is damaged.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8")).get("scenario", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path.name}: cannot be read as a scenarios file: {error}") from error
    known = {item.name for item in fields(Scenario)}
    found: dict[str, Scenario] = {}
    for table in tables:
        name = table.get("id", "a scenario without id")
        if unknown := sorted(set(table) - known):
            raise UsageError(f"{path.name}: {name} has the unknown keys {', '.join(unknown)}")
        if missing := sorted({"id", "family", "checkpoint", "prompt"} - set(table)):
            raise UsageError(f"{path.name}: {name} lacks {', '.join(missing)}")
        lists = {key: tuple(table[key]) for key in ("images", "suites") if key in table}
        scenario = Scenario(**{**table, **lists})
        if scenario.family not in FAMILIES:
            raise UsageError(f"{path.name}: {name} has family {scenario.family!r}; valid are {', '.join(FAMILIES)}")
        if scenario.batch < 1 or scenario.new_tokens < 1:
            raise UsageError(f"{path.name}: {name} needs batch and new_tokens of at least 1")
        marker = MARKERS[scenario.family]
        if scenario.prompt.count(marker) != len(scenario.images):
            raise UsageError(
                f"{path.name}: {name} has {scenario.prompt.count(marker)} markers {marker} "
                f"for {len(scenario.images)} images"
            )
        if scenario.id in found:
            raise UsageError(f"{path.name}: {name} stands twice")
        found[scenario.id] = scenario
    return found


def select(scenarios: dict[str, Scenario], suite: str, families: Iterable[str] = FAMILIES) -> list[Scenario]:
    """The scenarios of one suite, or the single one that has this id.

    Raises:
        UsageError: neither a suite nor a scenario has this name.
    """
    wanted = set(families)
    found = [s for s in scenarios.values() if (suite in s.suites or s.id == suite) and s.family in wanted]
    if not found:
        suites = sorted({name for s in scenarios.values() for name in s.suites})
        raise UsageError(
            f"suite {suite!r} has no scenario for {', '.join(sorted(wanted))}; "
            f"suites are {', '.join(suites)}; scenarios are {', '.join(scenarios)}"
        )
    return found
