"""The manifest of the fixtures: the digest of every file, and for each maker its versions, seeds and command.

`python -m vlmqual_adapters.inventory --output fixtures` writes `manifest.toml` anew and keeps what the makers recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK

MANIFEST = "manifest.toml"
_HEAD = """\
# Digests (SHA-256) of all fixture files, and how the made ones were made.
# Written by: python -m vlmqual_adapters.inventory --output fixtures
"""


def stored(fixtures: Path) -> dict[str, Any]:
    """The manifest as it is on disk, empty where there is none."""
    path = fixtures / MANIFEST
    return tomllib.loads(path.read_text("utf-8")) if path.is_file() else {}


def digests(fixtures: Path) -> dict[str, str]:
    """Names of all fixture files, with `/`, to their SHA-256; the manifest itself and hidden files are left out."""
    found = {}
    for path in sorted(fixtures.rglob("*")):
        name = path.relative_to(fixtures).as_posix()
        if path.is_file() and name != MANIFEST and not any(part.startswith(".") for part in name.split("/")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def write(fixtures: Path, maker: str = "", record: Mapping[str, Any] | None = None) -> None:
    """Write the manifest with today's digests, replacing the record of `maker` where one is given.

    Args:
        fixtures: the fixtures directory.
        maker: name of the table, for example "goldens-idefics3".
        record: strings, numbers and lists of them.
    """
    makers: dict[str, Any] = dict(stored(fixtures).get("made", {}))
    if maker:
        makers[maker] = dict(record or {})
    lines = [_HEAD, "format = 1", ""]
    for name in sorted(makers):
        lines.append(f"[made.{name}]")
        lines += [f"{json.dumps(key)} = {_value(value)}" for key, value in makers[name].items()]
        lines.append("")
    lines.append("[files]")
    lines += [f"{json.dumps(name)} = {json.dumps(digest)}" for name, digest in digests(fixtures).items()]
    (fixtures / MANIFEST).write_text("\n".join(lines) + "\n", "utf-8")


def _value(value: object) -> str:
    if isinstance(value, (bool, int, float, str)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"{value!r} cannot stand in the manifest; only strings, numbers and lists of them can")


def main(arguments: list[str] | None = None) -> int:
    """Write the manifest, or compare it with the files; 0 when written or equal, 1 when something differs."""
    parser = argparse.ArgumentParser(prog="python -m vlmqual_adapters.inventory", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fixtures"), help="the fixtures directory")
    parser.add_argument("--check", action="store_true", help="write nothing; compare the files with the manifest")
    chosen = parser.parse_args(arguments)
    if not chosen.check:
        write(chosen.output)
        return EXIT_OK
    known, found = stored(chosen.output).get("files", {}), digests(chosen.output)
    wrong = sorted(name for name in {*known, *found} if known.get(name) != found.get(name))
    print("\n".join(f"DIFFERENT  {name}" for name in wrong) or f"{len(found)} files are as the manifest says")
    return EXIT_FAILED if wrong else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
