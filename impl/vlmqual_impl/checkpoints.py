"""Where a checkpoint is: a directory here, or the local copy of a hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model: one sentence that names file or tensor."""


def locate(
    place: str | Path,
    *,
    patterns: Sequence[str] = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"),
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The directory of a checkpoint: itself, or the local copy of a hub id.

    Raises:
        CheckpointError: it is no directory, and no hub repository of that name can be had.
    """
    path = Path(place)
    if path.is_dir():
        return path
    text = str(place)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or path.exists():
        raise CheckpointError(f"{text}: there is no such checkpoint directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                text,
                allow_patterns=list(patterns),
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
        )
    except Exception as error:  # the hub library has no common base class for what can go wrong
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{text}: neither a directory here nor a hub repository that can be had ({reason})"
        ) from error
