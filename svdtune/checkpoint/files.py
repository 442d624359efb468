"""Durable writing: fsync, replacement of files and folders, and what a full disk looks like. No torch.

Replacement is atomic where the file system's rename is. A bucket that is mounted as a folder (gcsfuse, s3fs, goofys, rclone)
copies file by file and deletes then, or refuses: what is written here is whole or torn after a kill, so readers verify.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdtune.errors import CheckpointError

MANIFEST = "MANIFEST.json"
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
_NO_RENAME = (
    errno.ENOSYS,
    errno.EPERM,
    errno.EXDEV,
    errno.ENOTSUP,
    errno.EMFILE,
)  # EMFILE: gcsfuse's --rename-dir-limit
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Unreadable(CheckpointError):
    """The disk or mount failed while a checkpoint was read, which says nothing of what it holds."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a disk or mount that fails on `path`, or of a file that vanishes meanwhile, what it is."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or path}: it vanished while it was read: another process moved or deleted it. {USE_ANOTHER}"
        ) from error
    except OSError as error:
        raise Unreadable(
            f"{error.filename or path}: it could not be read ({error.strerror or error}). That is the disk or mount; the "
            "file itself may be whole. Try again when the mount is well."
        ) from error


def fsync_file(path: Path) -> None:
    """Return once the content of `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    """Some network mounts know no fsync, and upload when a file is closed: accepted. A disk that fails is not."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def fsync_folder(path: Path) -> None:
    """Return once the names in `path` are on the disk; some network mounts cannot open a folder, which is accepted."""
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def move_file(source: Path, target: Path) -> None:
    """Give the file `source` the name `target`, replacing what is there; where the mount refuses to rename, by a copy."""
    try:
        os.replace(source, target)
    except OSError as error:
        if not refuses_rename(error):
            raise
        shutil.copyfile(source, target)
        fsync_file(target)
        source.unlink()


def move_folder(source: Path, target: Path) -> None:
    """Give the folder `source` the name `target`; where the mount refuses to rename folders, by a copy."""
    try:
        os.replace(source, target)
    except OSError as error:
        if not refuses_rename(error):
            raise
        copy_folder(source, target)
        shutil.rmtree(source, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy contents alone (a bucket has no modes and times to set), a manifest last: what has none is unfinished."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
            fsync_file(target / path.name)
    fsync_folder(target)


def refuses_rename(error: OSError) -> bool:
    """Whether the mount has no rename for this, as opposed to one that failed."""
    return error.errno in _NO_RENAME


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old content or the new and nothing between."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        _fsync(file.fileno())
    move_file(temporary, path)
    fsync_folder(path.parent)


def save_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. Floats come back equal to the bit. Raises TypeError for what JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def load_json(path: Path) -> Any:
    """Read what `save_json` wrote. Raises CheckpointError when the file is missing, unreadable or no JSON."""
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
        move_folder(folder, parked)
    move_folder(partial, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(parked, ignore_errors=True)


def restore(folder: Path) -> None:
    """Undo or finish a `swap_in` of `folder` that a crash cut short."""
    parked = replaced_name(folder)
    if parked.exists() and folder.exists():
        shutil.rmtree(parked, ignore_errors=True)
    elif parked.exists():
        move_folder(parked, folder)


def is_unfinished(folder: Path) -> bool:
    """Whether a kill cut short the writing or the renaming of `folder`, which may then be old, or half of one."""
    return os.path.exists(partial_name(folder)) or os.path.exists(replaced_name(folder))  # no mount's error is raised


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is full; safetensors says it in words, without an errno."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    words = str(error)
    return any(f"os error {code}" in words for code in _DISK_FULL) or "No space left on device" in words


def is_disk_error(error: BaseException) -> bool:
    """Whether `error` comes from the system's calls for files; safetensors says it in words."""
    return isinstance(error, OSError) or "os error" in str(error)


USE_ANOTHER = (
    "Use another checkpoint of the run, or delete this folder: the run then resumes from the newest whole one."
)
