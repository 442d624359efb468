"""Checkpoint folders: published whole or not at all, verified before use, pruned after the next one is safe. No torch.

checkpoints/step-00001000/   .step-00001000.partial (being written or deleted)   .step-00001000.replaced (parked)
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdtune.checkpoint.files import USE_ANOTHER, fsync_file, is_disk_full, partial_name, restore, swap_in
from svdtune.checkpoint.manifest import Manifest, build_manifest, file_facts, read_manifest, write_manifest
from svdtune.errors import CheckpointError

_log = logging.getLogger(__name__)
_FOLDER = re.compile(r"(\.?)step-(\d{8,})(\.replaced)?")


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
    newest are deleted only after that, and a delete that fails is a warning. One process at a time may call this.
    Returns `checkpoints/step-<step>`. Raises CheckpointError when the disk is full; whatever `write` raises passes through.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    final = checkpoints / folder_name(step)
    checkpoints.mkdir(parents=True, exist_ok=True)
    _clean_up(checkpoints)
    partial = partial_name(final)
    try:
        partial.mkdir()
        write(partial)
        _finish(partial, step=step, conventions=conventions, config_hash=config_hash)
        swap_in(partial, final)
    except BaseException as error:
        written = _num_bytes(partial)
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise _disk_full(checkpoints, final, written) from error
        raise
    _prune(checkpoints, final, step, keep)
    return final


def verify(folder: Path) -> Manifest:
    """Read every byte of the checkpoint and compare it with its manifest; return the manifest.

    Raises CheckpointError that names the folder or the first file that is missing, cut or changed.
    """
    manifest = _check_sizes(folder)
    for name, expected in manifest.files.items():
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
    for _, folder in sorted(_folders(checkpoints), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(f"{folder.name}: {error}")
        else:
            return Latest(folder, tuple(skipped))
    return Latest(None, tuple(skipped))


def _folders(checkpoints: Path) -> Iterator[tuple[tuple[int, bool], Path]]:
    """Every checkpoint folder with its rank: by step, and a parked one below the one that replaces it."""
    if not checkpoints.is_dir():
        return
    for path in checkpoints.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if match and bool(match[1]) == bool(match[3]):
            yield (int(match[2]), not match[3]), path


def _check_sizes(folder: Path) -> Manifest:
    """The quick half of `verify`: manifest, names and sizes."""
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


def _finish(partial: Path, *, step: int, conventions: Mapping[str, Any], config_hash: str) -> None:
    """Make the files durable, then describe them in the manifest: data first, so that a manifest is never ahead."""
    for path in partial.iterdir():
        if not path.is_file():
            raise ValueError(f"a checkpoint holds plain files only, got {path.name}")
        fsync_file(path)
    manifest = build_manifest(partial, step=step, config_hash=config_hash, conventions=conventions)
    write_manifest(partial, manifest)


def _clean_up(checkpoints: Path) -> None:
    """Remove what a killed run left half written or half deleted, and put back what it had parked."""
    for path in checkpoints.glob(".step-*.replaced"):
        restore(path.with_name(path.name.removeprefix(".").removesuffix(".replaced")))
    for path in checkpoints.glob(".step-*.partial"):
        _delete(path)


def _prune(checkpoints: Path, published: Path, step: int, keep: int) -> None:
    """Delete older checkpoints of ours beyond the `keep` newest whole ones. Newer or foreign folders are left alone."""
    kept = 1
    for (other, _), folder in sorted(_folders(checkpoints), reverse=True):
        if other >= step or folder == published:
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
    """Delete a checkpoint so that a crash within never leaves half of one under its name."""
    doomed = partial_name(folder)
    try:
        os.replace(folder, doomed)
    except OSError as error:
        _warn(folder, error)
    else:
        _delete(doomed)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _warn(folder, error)


def _warn(folder: Path, error: OSError) -> None:
    _log.warning("could not delete the old checkpoint %s: %s. Training goes on; delete it by hand.", folder, error)


def _disk_full(checkpoints: Path, final: Path, written: int) -> CheckpointError:
    """The sentence for a full disk or quota; the size of the newest whole checkpoint tells what is needed."""
    whole = [folder for _, folder in sorted(_folders(checkpoints)) if _is_whole(folder)]
    before = f" (the one before needed {_size(read_manifest(whole[-1]).num_bytes)})" if whole else ""
    free = shutil.disk_usage(checkpoints).free
    return CheckpointError(
        f"{final}: the disk or quota was full after {_size(written)} of this checkpoint{before}. The partial folder was "
        f"removed, available are now {_size(free)}; earlier checkpoints are untouched. "
        "Free space, lower checkpoint.keep, or set run.dir to a larger disk; the same command then resumes."
    )


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"
