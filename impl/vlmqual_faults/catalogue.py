"""The named faults and honest variants: tables in `tables/*.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vlmqual_faults.surgery import Change

TABLES = Path(__file__).with_name("tables")
LEVELS = ("images", "prompts", "vision", "prefill", "decode", "masks", "generation", "parallel", "artifact")
_KEYS = {"name", "family", "kind", "level", "component", "requirements", "says", "change", "dtype"}


class CatalogueError(ValueError):
    """A table that does not say what it has to; names the file and the entry."""


@dataclass(frozen=True)
class Variant:
    """A way in which the bundled implementation is changed.

    Attributes:
        name: unique in its family.
        family: `model_type`.
        kind: "fault" has to be caught, "honest" has to pass.
        level: of the conformance suite, where a fault does its damage.
        component: the tap that leaves its budget first, as in a verdict; "" where no tap can show it.
        requirements: ids; the tests of each have to catch the fault when they are fed golden inputs.
        says: one sentence, what is wrong or different.
        changes: of the source.
        dtype: compute dtype that is declared.
    """

    name: str
    family: str
    kind: Literal["fault", "honest"]
    level: str
    component: str
    requirements: tuple[str, ...]
    says: str
    changes: tuple[Change, ...]
    dtype: str = "float32"


def variants(family: str, kind: str = "") -> list[Variant]:
    """Those of a family, in the order of the tables.

    Raises:
        CatalogueError: a table is not valid.
    """
    return [each for each in _all() if each.family == family and kind in ("", each.kind)]


def variant(family: str, name: str) -> Variant:
    """The variant of a name.

    Raises:
        KeyError: there is none; names those that are near.
    """
    for each in _all():
        if (each.family, each.name) == (family, name):
            return each
    raise KeyError(f"{family} has no fault or variant {name!r}")


def names() -> list[str]:
    """Names of all variants of all families, each once."""
    return sorted({each.name for each in _all()})


@cache
def _all() -> tuple[Variant, ...]:
    found: dict[tuple[str, str], Variant] = {}
    for path in sorted(TABLES.glob("*.toml")):
        for entry in tomllib.loads(path.read_text("utf-8")).get("variant", []):
            for each in _read(path.name, entry):
                if (each.family, each.name) in found:
                    raise CatalogueError(f"{path.name}: {each.family} has two variants {each.name!r}")
                found[each.family, each.name] = each
    return tuple(found.values())


def _read(file: str, entry: Mapping[str, Any]) -> list[Variant]:
    """One entry; with a table of families in `requirements` it stands for one variant of each."""
    name = str(entry.get("name", "without a name"))
    if unknown := set(entry) - _KEYS:
        raise CatalogueError(f"{file}: {name}: {', '.join(sorted(unknown))} is unknown")
    try:
        kind, level = entry.get("kind", "fault"), entry["level"]
        changes = tuple(Change(each["where"], each.get("old", ""), each["new"]) for each in entry["change"])
        families = entry["family"]
        families = [families] if isinstance(families, str) else families
        required = entry.get("requirements", [])
    except (KeyError, TypeError) as error:
        raise CatalogueError(f"{file}: {name}: {error} is missing or no valid table") from error
    if kind not in ("fault", "honest") or level not in LEVELS:
        raise CatalogueError(f"{file}: {name}: kind is {kind!r} and level {level!r}")
    made = []
    for family in families:
        ids = tuple(required[family] if isinstance(required, Mapping) else required)
        if kind == "fault" and not ids:
            raise CatalogueError(f"{file}: {name}: a fault of {family} names no requirement")
        component = entry.get("component", "")
        component = component.get(family, "") if isinstance(component, Mapping) else component
        dtype = entry.get("dtype", "float32")
        made.append(Variant(name, family, kind, level, component, ids, entry["says"], changes, dtype))
    return made
