"""What is said of mutants that survived: a table of arguments, `survivors.toml`, beside this file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vlmqual_contract.errors import UsageError
from vlmqual_faults.mutation import Mutant

TABLE = Path(__file__).with_name("survivors.toml")
VERDICTS = ("equivalent", "answered", "unit-tested")


@dataclass(frozen=True)
class Argument:
    """What is said of one mutant. It holds for as long as both pieces of source are what they were.

    Attributes:
        where: "module:Class.method" or "module:function".
        old: what stands there, normalised.
        new: what the mutant puts there, normalised.
        families: for which it was argued.
        verdict: "equivalent", nobody can observe it; "answered", a case of the suite was added that fails under it;
            "unit-tested", no case sees it, and a unit test fails under it.
        reason: one or two sentences; of an answered one, which case; of a unit-tested one, why no case sees it.
        test: of a unit-tested one, "file::function".
    """

    where: str
    old: str
    new: str
    families: tuple[str, ...]
    verdict: str
    reason: str
    test: str = ""


def argument(mutant: Mutant, family: str) -> Argument | None:
    """What is said of a mutant in a family."""
    for each in arguments():
        if (each.where, each.old, each.new) == (mutant.where, mutant.old, mutant.new) and family in each.families:
            return each
    return None


@cache
def arguments(path: Path = TABLE) -> tuple[Argument, ...]:
    """The whole table.

    Raises:
        UsageError: an entry is not complete, or its verdict is none.
    """
    found = []
    for number, entry in enumerate(tomllib.loads(path.read_text("utf-8")).get("survivor", []), 1):
        try:
            each = Argument(**{**entry, "families": tuple(entry["families"])})
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path.name}: survivor {number}: {error} is missing or not known") from error
        if each.verdict not in VERDICTS or not each.reason or bool(each.test) != (each.verdict == "unit-tested"):
            raise UsageError(f"{path.name}: survivor {number}: verdict {each.verdict!r} with reason {each.reason!r}")
        found.append(each)
    return tuple(found)
