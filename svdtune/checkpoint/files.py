"""Durable writing: fsync, atomic replacement of files and folders, and what a full disk looks like. No torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from svdtune.errors import CheckpointError

_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def fsync_file(path: Path) -> None:
    """Return once the content of `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Return once the names in `path` are on the disk; some network mounts cannot sync a folder, which is accepted."""
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old content or the new and nothing between."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def save_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. Floats come back equal to the bit. Raises TypeError for what JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def load_json(path: Path) -> Any:
    """Read what `save_json` wrote. Raises CheckpointError when the file is missing or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: expected a JSON file, got none: the checkpoint is incomplete. {USE_ANOTHER}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got text that does not parse ({error}). {USE_ANOTHER}") from None


def replaced_name(folder: Path) -> Path:
    """Where `swap_in` parks the old `folder` for the moment in which the new one takes its name."""
    return folder.with_name(f".{folder.name}.replaced")


def partial_name(folder: Path) -> Path:
    """Where `folder` is written before it takes its name, and where it goes to be deleted."""
    return folder.with_name(f".{folder.name}.partial")


def swap_in(partial: Path, folder: Path) -> None:
    """Give the finished folder `partial` the name `folder`, replacing what is there, and make that durable.

    Between the two renames only the parked old folder exists: `restore` puts it back after a crash there.
    """
    fsync_folder(partial)
    parked = replaced_name(folder)
    if folder.exists():
        os.replace(folder, parked)
    os.replace(partial, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(parked, ignore_errors=True)


def restore(folder: Path) -> None:
    """Undo or finish a `swap_in` of `folder` that a crash cut short."""
    parked = replaced_name(folder)
    if parked.exists() and folder.exists():
        shutil.rmtree(parked, ignore_errors=True)
    elif parked.exists():
        os.replace(parked, folder)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is full; safetensors says it in words, without an errno."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    words = str(error)
    return any(f"os error {code}" in words for code in _DISK_FULL) or "No space left on device" in words


USE_ANOTHER = (
    "Use another checkpoint of the run, or delete this folder: the run then resumes from the newest whole one."
)
