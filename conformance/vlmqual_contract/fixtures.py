"""Access to the fixtures, which ship inside the wheel, and proof that they are what their manifest says."""

from __future__ import annotations

import hashlib
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from vlmqual_contract.errors import UsageError

MANIFEST = "manifest.toml"


@cache
def root() -> Path:
    """The folder of the fixtures: inside the installed package, or at the top of a checkout.

    Raises:
        UsageError: neither is there.
    """
    here = Path(__file__).resolve().parent
    for path in (here / "_fixtures", here.parents[1] / "fixtures"):
        if (path / MANIFEST).is_file():
            return path
    raise UsageError(
        "the fixtures are missing: neither the installed package nor the checkout has fixtures/manifest.toml"
    )


@cache
def manifest() -> dict[str, Any]:
    """The manifest: `files` (name to SHA-256) and a table for each maker, with versions, seeds and commands."""
    return tomllib.loads((root() / MANIFEST).read_text("utf-8"))


def digest() -> str:
    """SHA-256 of the manifest, and so of all fixtures."""
    return hashlib.sha256((root() / MANIFEST).read_bytes()).hexdigest()


def names(prefix: str = "") -> list[str]:
    """Names of all fixture files that begin with `prefix`, sorted."""
    return sorted(name for name in manifest()["files"] if name.startswith(prefix))


@cache
def file(name: str) -> Path:
    """Path of a fixture file whose content is what the manifest says.

    Raises:
        UsageError: no such fixture, or its digest differs.
    """
    files: dict[str, str] = manifest()["files"]
    if name not in files:
        folder = name.rpartition("/")[0]
        near = [other for other in files if other.rpartition("/")[0] == folder]
        raise UsageError(f"fixture {name!r} does not exist; there are {', '.join(near) or ', '.join(sorted(files))}")
    path = root() / name
    if not path.is_file():
        raise UsageError(f"fixture {name} is in the manifest, but the file is missing")
    if hashlib.sha256(path.read_bytes()).hexdigest() != files[name]:
        raise UsageError(f"fixture {name} is damaged or was changed: its digest is not the manifest's")
    return path


def image(name: str) -> Path:
    """Path of a fixture image, for example `astronaut.png`."""
    return file(f"images/{name}")


def checkpoint(name: str) -> Path:
    """Folder of a fixture checkpoint, every file of it verified.

    Raises:
        UsageError: no such checkpoint, or a file of it is damaged.
    """
    files = names(f"checkpoints/{name}/")
    if not files:
        known = sorted({other.split("/")[1] for other in names("checkpoints/")})
        raise UsageError(f"fixture checkpoint {name!r} does not exist; there are {', '.join(known)}")
    for other in files:
        file(other)
    return root() / "checkpoints" / name
