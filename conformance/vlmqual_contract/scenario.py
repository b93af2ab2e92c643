"""Scenarios: what a performance run feeds to a model, and the suites that they are grouped in."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import FAMILIES, MARKERS, Model, Prompt

#: Where a prompt takes words of the file's text.
WORDS = "{words}"
_SHOWN = 6


@dataclass(frozen=True)
class Scenario:
    """One kind of request.

    Attributes:
        id: unique name.
        family: `model_type`.
        checkpoint: name of a fixture checkpoint; in a file of the user's also a folder relative to it.
        images: names of fixture images in the order of the markers; in a file of the user's paths relative to it.
        prompt: text after the chat template, one marker of the family for each image.
        batch: how many rows.
        words: how many words of `text` stand for `WORDS` in the prompt: one number for all rows or one for each, so
            that shorter rows are padded.
        new_tokens: decode steps.
        suites: names of the suites that it belongs to.
        title: a few words for tables and plots.
        time_limit_s: seconds that it may take at one tensor-parallel size; None leaves that to the suite.
        text: what `words` are taken from, again from its start where they are more.
        folder: of the user's file; None for the bundled one.
    """

    id: str
    family: str
    checkpoint: str
    prompt: str
    images: tuple[str, ...] = ()
    batch: int = 1
    words: tuple[int, ...] = ()
    new_tokens: int = 16
    suites: tuple[str, ...] = ("default",)
    title: str = ""
    time_limit_s: float | None = None
    text: str = ""
    folder: Path | None = None

    def prompts(self) -> list[Prompt]:
        """One for each row, with paths of the images.

        Raises:
            UsageError: an image is missing or damaged.
        """
        images = tuple(str(self.folder / name if self.folder else fixtures.image(name)) for name in self.images)
        if not self.words:
            return [Prompt(self.prompt, images)] * self.batch
        counts = self.words if len(self.words) == self.batch else self.words * self.batch
        return [Prompt(self.prompt.replace(WORDS, _words(self.text, count)), images) for count in counts]

    def model(self) -> Model:
        """Its checkpoint.

        Raises:
            UsageError: the checkpoint is missing or damaged.
        """
        if self.folder and not _bundled(self.checkpoint):
            return Model(str(self.folder / self.checkpoint), self.family)
        return Model(str(fixtures.checkpoint(self.checkpoint)), self.family)


@dataclass(frozen=True)
class Suite:
    """Scenarios that are run together.

    Attributes:
        id: its name.
        title: a few words.
        purpose: what it is for, a sentence.
        tp: tensor-parallel sizes where the user names none.
        time_limit_s: seconds that each of its scenarios may take at one size; None is without end.
        cell_s: seconds to spend on a cell beyond the least number of repetitions, where the user names none.
    """

    id: str
    title: str = ""
    purpose: str = ""
    tp: tuple[int, ...] = (1,)
    time_limit_s: float | None = None
    cell_s: float = 1.5


@dataclass(frozen=True)
class Catalogue:
    """A scenarios file as read: ids to scenarios and to suites, both in the file's order."""

    name: str
    scenarios: Mapping[str, Scenario]
    suites: Mapping[str, Suite]

    def suite(self, name: str) -> Suite:
        """The suite of this name; for the id of a scenario one that only says its name.

        Raises:
            UsageError: there is neither.
        """
        if name not in self.suites and name not in self.scenarios:
            near = difflib.get_close_matches(name, self.scenarios, _SHOWN) or list(self.scenarios)[:_SHOWN]
            more = f" and {len(self.scenarios) - len(near)} more" if len(near) < len(self.scenarios) else ""
            raise UsageError(
                f"suite {name!r} is unknown in {self.name}; suites are {', '.join(self.suites)}; "
                f"scenarios are {', '.join(near)}{more}"
            )
        return self.suites.get(name, Suite(name))

    def select(self, name: str, families: Iterable[str] = FAMILIES) -> list[Scenario]:
        """The scenarios of one suite, or the single one that has this id.

        Raises:
            UsageError: neither a suite nor a scenario has this name, or it has none for these families.
        """
        self.suite(name)
        wanted = set(families)
        named = [s for s in self.scenarios.values() if name in (*s.suites, s.id)]
        found = [s for s in named if s.family in wanted]
        if not found:
            has = ", ".join(dict.fromkeys(s.family for s in named)) or "no family"
            raise UsageError(f"suite {name!r} has no scenario for {', '.join(sorted(wanted))}; it has {has}")
        return found


def load_catalogue(path: Path, *, own: bool = False) -> Catalogue:
    """Read a scenarios file.

    Args:
        path: the file.
        own: it is the user's: images and checkpoints may lie beside it.

    Raises:
        UsageError: the file or a table in it is damaged; names the file, the table, the key and what is valid.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path.name}: cannot be read as a scenarios file: {error}") from error
    if unknown := sorted(set(content) - {"text", "suite", "scenario"}):
        raise UsageError(f"{path.name}: unknown keys {', '.join(unknown)}; valid are text, [[suite]] and [[scenario]]")
    text = content.get("text", "")
    if not isinstance(text, str):
        raise UsageError(f"{path.name}: text is {text!r}; it has to be a text")
    suites: dict[str, Suite] = {}
    for table in _tables(path, content, "suite"):
        name = _checked(path, table, Suite, {"id"})
        if name in suites:
            raise UsageError(f"{path.name}: suite {name} stands twice")
        suites[name] = Suite(**{**table, **_tuples(table, "tp")})
    scenarios: dict[str, Scenario] = {}
    whole: dict[str, dict[str, Any]] = {}
    for table in _tables(path, content, "scenario"):
        table = _with_base(path, table, whole)
        name = _checked(path, table, Scenario, {"id", "family", "checkpoint", "prompt"})
        if name in scenarios:
            raise UsageError(f"{path.name}: {name} stands twice")
        whole[name] = table
        scenario = Scenario(
            **{**table, **_tuples(table, "images", "suites", "words")},
            text=text,
            folder=path.resolve().parent if own else None,
        )
        _sound(path, scenario, suites)
        scenarios[name] = scenario
    if not scenarios:
        raise UsageError(f"{path.name}: has no [[scenario]]")
    named = dict.fromkeys(suite for scenario in scenarios.values() for suite in scenario.suites)
    if both := sorted(set(scenarios) & (set(named) | set(suites))):
        raise UsageError(f"{path.name}: {both[0]} is the name of a suite and of a scenario; one of them needs another")
    return Catalogue(path.name, scenarios, suites or {name: Suite(name) for name in named})


def load_scenarios(path: Path) -> dict[str, Scenario]:
    """The scenarios of a bundled file; ids to scenarios in file order.

    Raises:
        UsageError: the file or a table in it is damaged.
    """
    return dict(load_catalogue(path).scenarios)


# checks --------------------------------------------------------------------------------------------------------------


def _text(value: object) -> bool:
    return isinstance(value, str)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _counts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_count, value))


def _count_or_counts(value: object) -> bool:
    return _count(value) or _counts(value)


def _seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


#: Keys to what they may hold, in words and as a test.
_VALID: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "id": ("a text", _text),
    "family": ("a text", _text),
    "checkpoint": ("a text", _text),
    "prompt": ("a text", _text),
    "title": ("a text", _text),
    "purpose": ("a text", _text),
    "images": ("a list of texts", _texts),
    "suites": ("a list of texts", _texts),
    "batch": ("a whole number of at least 1", _count),
    "new_tokens": ("a whole number of at least 1", _count),
    "words": ("a whole number of at least 1, or a list of such", _count_or_counts),
    "tp": ("a list of whole numbers of at least 1", _counts),
    "time_limit_s": ("a number of seconds above 0", _seconds),
    "cell_s": ("a number of seconds above 0", _seconds),
}


def _tables(path: Path, content: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    tables = content.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path.name}: {kind} is no list of tables; each begins with [[{kind}]]")
    return tables


def _with_base(path: Path, table: dict[str, Any], earlier: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A table with what it leaves out taken from the one that it names as `base`, but for title and suites."""
    if "base" not in table:
        return table
    base = table["base"]
    if not isinstance(base, str) or base not in earlier:
        above = ", ".join(earlier) or "none"
        raise UsageError(f"{path.name}: {table.get('id')}: base is {base!r}; scenarios above it are {above}")
    taken = {key: value for key, value in earlier[base].items() if key not in ("title", "suites")}
    return {key: value for key, value in {**taken, **table}.items() if key != "base"}


def _checked(path: Path, table: Mapping[str, Any], kind: type[Suite | Scenario], needed: set[str]) -> str:
    """The name of a table whose keys are known and hold what they may."""
    what = kind.__name__.lower()
    name = table.get("id", f"a {what} without id")
    known = [item.name for item in fields(kind) if item.name in _VALID]
    if unknown := sorted(set(table) - set(known)):
        valid = ", ".join([*known, *(["base"] if kind is Scenario else [])])
        raise UsageError(f"{path.name}: {name} has the unknown keys {', '.join(unknown)}; valid are {valid}")
    if missing := sorted(needed - set(table)):
        raise UsageError(f"{path.name}: {name} lacks {', '.join(missing)}")
    for key, value in table.items():
        words, valid_value = _VALID[key]
        if not valid_value(value):
            raise UsageError(f"{path.name}: {name}: {key} is {value!r}; it has to be {words}")
    return str(name)


def _tuples(table: Mapping[str, Any], *keys: str) -> dict[str, tuple[Any, ...]]:
    found = {key: table[key] for key in keys if key in table}
    return {key: tuple(value) if isinstance(value, list) else (value,) for key, value in found.items()}


def _sound(path: Path, scenario: Scenario, suites: Mapping[str, Suite]) -> None:
    """What the keys of a scenario have to say together."""
    where = f"{path.name}: {scenario.id}"
    if scenario.family not in FAMILIES:
        raise UsageError(f"{where}: family is {scenario.family!r}; valid are {', '.join(FAMILIES)}")
    for name in scenario.suites:
        if suites and name not in suites:
            raise UsageError(f"{where}: suites has {name!r}; valid are {', '.join(suites)}")
    marker = MARKERS[scenario.family]
    if (count := scenario.prompt.count(marker)) != len(scenario.images):
        raise UsageError(f"{where}: prompt has {count} markers {marker} for {len(scenario.images)} images")
    if bool(scenario.words) != (WORDS in scenario.prompt):
        raise UsageError(f"{where}: words and {WORDS} in the prompt belong together; one of them is missing")
    if scenario.words and not scenario.text.split():
        raise UsageError(f"{where}: words are taken from the file's text, which is missing (text = ... on top)")
    if len(scenario.words) > 1 and len(scenario.words) != scenario.batch:
        raise UsageError(
            f"{where}: words has {len(scenario.words)} numbers for a batch of {scenario.batch}; "
            "valid are one number, or one for each row"
        )
    if scenario.folder:
        for image in scenario.images:
            if not (scenario.folder / image).is_file():
                raise UsageError(f"{where}: images has {image!r}; there is no such file beside {path.name}")
        if not _bundled(scenario.checkpoint) and not (scenario.folder / scenario.checkpoint / "config.json").is_file():
            raise UsageError(
                f"{where}: checkpoint is {scenario.checkpoint!r}; valid are a folder with a config.json relative to "
                f"{path.name}, and {', '.join(_bundled_names())}"
            )


def _bundled_names() -> list[str]:
    return sorted({name.split("/")[1] for name in fixtures.names("checkpoints/")})


def _bundled(checkpoint: str) -> bool:
    return bool(fixtures.names(f"checkpoints/{checkpoint}/"))


def _words(text: str, count: int) -> str:
    """The first words of a text, again from its start where it has fewer."""
    words = text.split()
    return " ".join(words[index % len(words)] for index in range(count))
