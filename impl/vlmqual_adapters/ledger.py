"""JSON goldens that two versions of a library write together: entries by key, each with the version that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The documented version of each family, and the one that stands in where that one refuses or misreads an input.
DOCUMENTED: Mapping[str, str] = {"idefics": "4.46.3", "idefics3": "4.46.3", "mllama": "4.45.2"}
STAND_IN = "5.23.0"
Entry = dict[str, Any]


class Ledger:
    """The entries of one JSON file.

    Attributes:
        path: the file.
        documented: version whose entries count.
        version: version of the library that runs now.
        entries: key to entry; an entry's `made_by` names its version.
        wrong: what differs from the stored entries, one line each.
    """

    def __init__(self, path: Path, documented: str, version: str, *, check: bool) -> None:
        self.path = path
        self.documented = documented
        self.version = version
        self.check = check
        self.entries: dict[str, Entry] = _read(path)
        self.wrong: list[str] = []
        self._seen: set[str] = set()

    def put(self, key: str, entry: Mapping[str, Any], why: str = "") -> None:
        """Record or compare an entry.

        The documented version's entries are kept when another version agrees, and reported when it does not; the
        stand-in's are written only with a reason why the documented version does not make them.
        """
        new = {**entry, "made_by": f"transformers {self.version}"} | ({"why": why} if why else {})
        self._seen.add(key)
        old = self.entries.get(key)
        if self.version == self.documented or why:
            if self.check and old != new:
                self.wrong.append(f"{key}: differs from what is stored")
            if not self.check:
                self.entries[key] = new
        elif old is None:
            self.wrong.append(f"{key}: {self.version} makes it, the documented version did not, and no reason is known")
        elif differing := sorted(name for name in entry if entry[name] != old.get(name)):
            self.wrong.append(f"{key}: {self.version} differs from {old['made_by']} in {', '.join(differing)}")

    def finish(self) -> list[str]:
        """Write the file, without entries of this version that were not made again; returns what is wrong."""
        mine = f"transformers {self.version}"
        stale = sorted(k for k, e in self.entries.items() if e["made_by"] == mine and k not in self._seen)
        if self.check:
            self.wrong += [f"{key}: stored, but no longer made" for key in stale]
        else:
            for key in stale:
                del self.entries[key]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{json.dumps(key)}: {json.dumps(self.entries[key])}" for key in sorted(self.entries)]
            self.path.write_text('{"format": 1, "entries": {\n' + ",\n".join(lines) + "\n}}\n", "utf-8")
        return self.wrong


def _read(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        return {}
    entries: dict[str, Entry] = json.loads(path.read_text("utf-8"))["entries"]
    return entries
