"""Baselines: launches of one target in a file that says what it is, which one it follows, and who vouches for it.

The digest is SHA-256 over the canonical content (JSON with sorted keys and no blanks, without digest and signature). It
tells an altered file, not a forged one: that is what the signature is for, Ed25519 over the digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmqual_contract.errors import UsageError
from vlmqual_perf.gate_launches import Launch

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KIND = "vlmqual baseline"
FORMAT = 1


@dataclass(frozen=True)
class Baseline:
    """What a baseline file holds.

    Attributes:
        subject: target string.
        info: what the target said of itself.
        machine: description of the machine.
        suite: version of vlmqual.
        fixtures: digest of the fixtures, and so of the scenarios.
        plan: how the launches were made: threads, repeats, seconds of a cell, checkpoint, cells.
        launches: in the order in which they were made.
        version: 1, or one more than that of the baseline that it replaces.
        previous: digest of the baseline that it replaces, "" for the first.
        made: ISO time, UTC.
        digest: SHA-256 of the canonical content.
        signer: public key of the signature in hexadecimal digits, "" for an unsigned file.
    """

    subject: str
    info: Mapping[str, Any]
    machine: Mapping[str, Any]
    suite: str
    fixtures: str
    plan: Mapping[str, Any]
    launches: tuple[Launch, ...]
    version: int = 1
    previous: str = ""
    made: str = ""
    digest: str = ""
    signer: str = ""


def save(path: Path, baseline: Baseline, key: Path | None = None) -> Baseline:
    """Write a baseline; one that stands there becomes the previous one and is kept beside it, as `NAME.vN.json`.

    Args:
        path: of the new file.
        baseline: without version, previous, made, digest and signer: they are decided here.
        key: private key (PEM) to sign with, or None.

    Raises:
        UsageError: the file that stands there is no sound baseline, or a file cannot be read or written.
    """
    before = read(path) if path.exists() else None
    content = {name: value for name, value in asdict(baseline).items() if name not in ("digest", "signer")}
    content |= {
        "kind": KIND,
        "format": FORMAT,
        "version": before.version + 1 if before else 1,
        "previous": before.digest if before else "",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    document = {**content, "digest": _digest(content)}
    if key is not None:
        document["signature"] = _sign(document["digest"], key)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(document, allow_nan=False) + "\n", "utf-8")
        if before is not None:
            path.rename(path.with_name(f"{path.stem}.v{before.version}{path.suffix}"))
        new.rename(path)
    except OSError as error:
        raise UsageError(f"baseline {path}: {error.strerror or error}") from error
    return read(path)


def read(path: Path, trust: Path | None = None) -> Baseline:
    """Read a baseline and prove that nothing in it was altered.

    Args:
        path: of the file.
        trust: public key (PEM); a file that it did not sign is refused.

    Raises:
        UsageError: it is no baseline, was altered, is of another format, or is not signed by the trusted key.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"baseline {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"baseline {path}: it is not JSON") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise UsageError(f"{path} is no baseline; `vlmqual gate --save-baseline FILE` makes one")
    if document.get("format") != FORMAT:
        raise UsageError(f"baseline {path}: format {document.get('format')!r} is unknown; this version reads {FORMAT}")
    content = {name: value for name, value in document.items() if name not in ("digest", "signature")}
    if document.get("digest") != _digest(content):
        raise UsageError(f"baseline {path} was altered: its digest is not that of its content")
    signature = document.get("signature")
    if trust is not None and signature is None:
        raise UsageError(f"baseline {path} is not signed, and --trust {trust} asks for a signature")
    signer = _verify(path, document["digest"], signature, trust) if signature is not None else ""
    try:
        known = {name: content[name] for name in Baseline.__dataclass_fields__ if name in content}
        launches = tuple(Launch.from_plain(one) for one in content["launches"])
        return Baseline(**{**known, "launches": launches}, digest=document["digest"], signer=signer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"baseline {path} is damaged: {type(error).__name__} {error}") from error


def generate(path: Path) -> Path:
    """Make a pair of keys: the private one at `path`, readable by its owner only, the public one at `path`.pub.

    Raises:
        UsageError: one of the files is there already or cannot be written, or `cryptography` is not installed.
    """
    _, asymmetric, serialization = _cryptography()
    public = path.with_name(path.name + ".pub")
    key = asymmetric.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file, data, mode in ((path, private, 0o600), (public, shown, 0o644)):
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            raise UsageError(f"key {file} is there already; keys are never overwritten") from None
        except OSError as error:
            raise UsageError(f"key {file}: {error.strerror or error}") from error
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
    return public


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _message(digest: str) -> bytes:
    return f"{KIND}\n{digest}\n".encode()


def _sign(digest: str, path: Path) -> dict[str, str]:
    _, asymmetric, serialization = _cryptography()
    try:
        key: Ed25519PrivateKey = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UsageError(f"key {path}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"key {path} is no private key in PEM form without a password") from error
    if not isinstance(key, asymmetric.Ed25519PrivateKey):
        raise UsageError(f"key {path} is no Ed25519 key; `vlmqual baseline keygen FILE` makes one")
    return {
        "algorithm": "ed25519",
        "public_key": key.public_key().public_bytes_raw().hex(),
        "value": base64.b64encode(key.sign(_message(digest))).decode(),
    }


def _verify(path: Path, digest: str, signature: Any, trust: Path | None) -> str:
    """The signer's public key; with `trust` None it is only read, since nobody says whose it should be."""
    try:
        signer = str(signature["public_key"])
        value = base64.b64decode(signature["value"], validate=True)
        algorithm = signature["algorithm"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"baseline {path}: its signature is damaged") from error
    if algorithm != "ed25519":
        raise UsageError(f"baseline {path}: its signature is {algorithm!r}; known is ed25519")
    if trust is None:
        return signer
    exceptions, asymmetric, serialization = _cryptography()
    try:
        key: Ed25519PublicKey = serialization.load_pem_public_key(trust.read_bytes())
    except OSError as error:
        raise UsageError(f"--trust {trust}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"--trust {trust} is no public key in PEM form") from error
    if not isinstance(key, asymmetric.Ed25519PublicKey):
        raise UsageError(f"--trust {trust} is no Ed25519 key")
    try:
        key.verify(value, _message(digest))
    except exceptions.InvalidSignature:
        raise UsageError(f"baseline {path} is not signed by --trust {trust}") from None
    return str(key.public_bytes_raw().hex())


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UsageError("signatures need the package cryptography; install vlmqual[signing]") from error
    return exceptions, ed25519, serialization
