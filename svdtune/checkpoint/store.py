"""Checkpoint folders: published whole or not at all, verified before use, pruned after the next one is safe. No torch.

checkpoints/step-00001000/   .step-00001000.partial (being written or deleted)   .step-00001000.replaced (parked)

On a bucket mount a rename copies file by file and then deletes, so a kill within leaves halves under both names. Therefore
the manifest decides, not the name: at every instant one of the three folders of a step that was published is whole.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdtune.checkpoint.files import (
    USE_ANOTHER,
    Unreadable,
    copy_folder,
    fsync_file,
    is_disk_error,
    is_disk_full,
    is_unfinished,
    partial_name,
    reading,
    refuses_rename,
    swap_in,
    write_text,
)
from svdtune.checkpoint.manifest import Manifest, build_manifest, file_facts, read_manifest, write_manifest
from svdtune.errors import CheckpointError

_log = logging.getLogger(__name__)
_FOLDER = re.compile(r"(\.?)step-(\d{8,})(\.replaced|\.partial)?")
_RANK = {".replaced": 0, ".partial": 1, None: 2}
_PAUSES = (1.0, 2.0, 4.0)
"""Seconds that a mount's listing may lag behind a rename."""


@dataclass(frozen=True)
class Latest:
    """What `find_latest` found."""

    folder: Path | None
    """Newest checkpoint whose every byte is as written, or None."""
    skipped: tuple[str, ...]
    """One sentence for each newer folder that is not usable."""


def folder_name(step: int) -> str:
    """`step-00001000` for 1000 optimizer steps."""
    return f"step-{step:08d}"


def publish(
    checkpoints: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    conventions: Mapping[str, Any],
    config_hash: str,
    keep: int,
) -> Path:
    """Make a checkpoint: `write(folder)` puts flat files into a hidden folder, which takes its name when it is durable.

    A crash at any instant leaves the newest earlier checkpoint, or the new one, usable; older ones than the `keep`
    newest are deleted only after the new one was seen whole under its name, and a delete that fails is a warning. One
    process at a time may call this. Returns `checkpoints/step-<step>`. Raises CheckpointError when the disk is full or
    fails; whatever else `write` raises passes through.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    final = checkpoints / folder_name(step)
    partial = partial_name(final)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _clean_up(checkpoints)
        _write_partial(partial, write, step=step, conventions=conventions, config_hash=config_hash)
        swap_in(partial, final)  # if this fails, the only whole one may be `partial`: it stays for the next start
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise _disk_failed(final, error) from error
    _see_whole(final)
    _prune(checkpoints, final, step, keep)
    return final


def verify(folder: Path) -> Manifest:
    """Read every byte of the checkpoint and compare it with its manifest; return the manifest.

    Raises CheckpointError that names the folder or the first file that is missing, cut or changed.
    """
    manifest = _check_sizes(folder)
    for name, expected in manifest.files.items():
        with reading(folder / name):
            got = file_facts(folder / name)
        if got != expected:
            raise CheckpointError(
                f"{folder / name}: expected sha256 {expected.sha256[:16]}…, got {got.sha256[:16]}…: "
                f"its content changed after it was written (disk, copy or edit). {USE_ANOTHER}"
            )
    return manifest


def find_latest(checkpoints: Path) -> Latest:
    """The newest checkpoint that passes `verify`, and why newer ones were passed over. Changes nothing on disk."""
    skipped: list[str] = []
    for folder in newest_first(checkpoints):
        try:
            verify(folder)
        except CheckpointError as error:
            if isinstance(error, Unreadable) or not is_leftover(folder):
                skipped.append(f"{folder.name}: {error}")
        else:
            return Latest(folder, tuple(skipped))
    return Latest(None, tuple(skipped))


def tidy(checkpoints: Path) -> None:
    """Undo what a kill left half done, so that the newest whole folder has its name; for the one process that holds the run.

    Raises CheckpointError when the disk is full or fails.
    """
    try:
        _clean_up(checkpoints)
    except OSError as error:
        raise _disk_failed(checkpoints, error) from error


def newest_first(checkpoints: Path) -> list[Path]:
    """Every folder that is or was a checkpoint, hidden ones below the named one of their step."""
    with reading(checkpoints):
        return [folder for _, folder in sorted(_folders(checkpoints), reverse=True)]


def is_leftover(folder: Path) -> bool:
    """Whether a kill explains why `folder` is not whole: it was being written, renamed or deleted. The next save removes it."""
    return folder.name.startswith(".") or is_unfinished(folder)


def _folders(checkpoints: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    if not checkpoints.is_dir():
        return
    for path in checkpoints.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if match and bool(match[1]) == bool(match[3]):
            yield (int(match[2]), _RANK[match[3]]), path


def _check_sizes(folder: Path) -> Manifest:
    """The quick half of `verify`: manifest, names and sizes."""
    with reading(folder):
        return _sizes_checked(folder)


def _sizes_checked(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    match = _FOLDER.fullmatch(folder.name)
    if match and int(match[2]) != manifest.step:
        raise CheckpointError(
            f"{folder}: the name says step {int(match[2])}, its manifest says step {manifest.step}: "
            f"the folder was renamed or copied over. Rename it to {folder_name(manifest.step)}."
        )
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: expected {expected.size} bytes, got no file. {USE_ANOTHER}")
        if (size := path.stat().st_size) != expected.size:
            raise CheckpointError(
                f"{path}: expected {expected.size} bytes, got {size}: "
                f"the file was cut or changed after it was written (disk, copy or download). {USE_ANOTHER}"
            )
    return manifest


def _write_partial(
    partial: Path, write: Callable[[Path], None], *, step: int, conventions: Mapping[str, Any], config_hash: str
) -> None:
    try:
        partial.mkdir()
        write(partial)
        _finish(partial, step=step, conventions=conventions, config_hash=config_hash)
    except BaseException as error:
        full = _disk_full(partial) if is_disk_full(error) else None
        shutil.rmtree(partial, ignore_errors=True)
        if full:
            raise full from error
        raise


def _finish(partial: Path, *, step: int, conventions: Mapping[str, Any], config_hash: str) -> None:
    """Make the files durable, then describe them in the manifest: data first, so that a manifest is never ahead."""
    for path in partial.iterdir():
        if not path.is_file():
            raise ValueError(f"a checkpoint holds plain files only, got {path.name}")
        fsync_file(path)
    manifest = build_manifest(partial, step=step, config_hash=config_hash, conventions=conventions)
    write_manifest(partial, manifest)


def _clean_up(checkpoints: Path) -> None:
    """Remove what a killed run left half written, renamed or deleted; its newest whole folder gets its name back first."""
    folders = newest_first(checkpoints)
    newest = next((folder for folder in folders if _is_whole(folder)), None)
    for hidden in folders:
        named = hidden.with_name(hidden.name.removeprefix(".").removesuffix(".partial").removesuffix(".replaced"))
        if hidden == named:
            continue
        try:
            _check_sizes(named)
        except Unreadable:
            continue  # it may be whole: no reason to delete anything
        except CheckpointError:
            _delete(named)
            if hidden == newest:
                copy_folder(hidden, named)  # a rename that is cut short would tear the only whole one
                _check_sizes(named)
        _delete(hidden)


def _see_whole(final: Path) -> None:
    """Raise unless the checkpoint is whole under its name, as far as sizes show; only then may older ones be deleted."""
    for pause in _PAUSES:
        if _is_whole(final):
            return
        time.sleep(pause)
    try:
        _check_sizes(final)
    except CheckpointError as error:
        raise CheckpointError(
            f"{final}: it was written and renamed without an error, yet it is not whole: {error} Older checkpoints were "
            "kept. The disk or mount of run.dir loses files: use another, then the same command resumes."
        ) from error


def _prune(checkpoints: Path, published: Path, step: int, keep: int) -> None:
    """Delete older checkpoints of ours beyond the `keep` newest whole ones. Newer or foreign folders are left alone."""
    kept = 1
    for folder in newest_first(checkpoints):
        if folder.name.startswith(".") or folder == published or int(folder.name.removeprefix("step-")) >= step:
            continue
        try:
            read_manifest(folder)
        except CheckpointError:
            continue
        if kept >= keep:
            _discard(folder)
        elif _is_whole(folder):
            kept += 1


def _is_whole(folder: Path) -> bool:
    try:
        _check_sizes(folder)
    except CheckpointError:
        return False
    return True


def _discard(folder: Path) -> None:
    """Delete a checkpoint so that a crash within leaves a half only beside a hidden folder, which tells what it is."""
    doomed = partial_name(folder)
    try:
        os.replace(folder, doomed)
    except OSError as error:
        if not refuses_rename(error):
            _warn(folder, error)
            return
        doomed.mkdir(exist_ok=True)
        write_text(doomed / "deleted", "")  # a bucket has no empty folders
        _delete(folder)
    _delete(doomed)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        _warn(folder, error)


def _warn(folder: Path, error: OSError) -> None:
    _log.warning("could not delete the old checkpoint %s: %s. Training goes on; delete it by hand.", folder, error)


def _disk_full(partial: Path) -> CheckpointError:
    """The sentence for a full disk or quota; the size of the newest whole checkpoint tells what is needed."""
    final, checkpoints = partial.name.removeprefix(".").removesuffix(".partial"), partial.parent
    whole = next((folder for folder in newest_first(checkpoints) if folder != partial and _is_whole(folder)), None)
    before = f" (the one before needed {_size(read_manifest(whole).num_bytes)})" if whole else ""
    written = _num_bytes(partial)
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(checkpoints).free
    return CheckpointError(
        f"{checkpoints / final}: the disk or quota was full after {_size(written)} of this checkpoint{before}. The partial "
        f"folder was removed, available are now {_size(free)}; earlier checkpoints are untouched. "
        "Free space, lower checkpoint.keep, or set run.dir to a larger disk; the same command then resumes."
    )


def _disk_failed(final: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{final}: the checkpoint could not be written: {error}. Earlier checkpoints are untouched. "
        "See to the disk or mount of run.dir; the same command then resumes from the newest whole one."
    )


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"
