"""Which files there are, which can be used, and which are held out."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svdtune.config.schema import Data
from svdtune.data.cache import identity, load_indexes, save_indexes
from svdtune.data.children import map_files
from svdtune.data.clips import latest_start
from svdtune.data.index import VideoIndex, index_video
from svdtune.errors import DataError

# fmt: off
SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
)
# fmt: on
_CHILDREN_FROM = 64
"""Files from which on starting child processes pays; below, FFmpeg's own time limits guard against hanging."""
_SECONDS = 60.0
"""Time one file may take to index in a child."""
_LISTED = 10


@dataclass(frozen=True)
class Rejected:
    """A file that is not used, and why (the sentence names the file)."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Catalog:
    """All files under data.root, sorted by path within each group."""

    train: tuple[VideoIndex, ...]
    held_out: tuple[VideoIndex, ...]
    rejected: tuple[Rejected, ...]


def find_videos(root: Path | str) -> list[Path]:
    """Video files under `root`, recursive and sorted. Hidden files and linked folders are left out.

    Raises DataError when the folder does not exist or holds none.
    """
    root = Path(root)
    _require_folder(root)
    found, others = [], Counter()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                found.append(path)
            else:
                others["links that lead nowhere" if not path.exists() else path.suffix.lower() or "no suffix"] += 1
    if not found:
        held = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "no files"
        raise DataError(
            f"data.root: no videos in {root} (it and the folders inside hold {held}; links to folders are not followed). "
            f"Wanted: {' '.join(SUFFIXES)}"
        )
    return sorted(found)


def linked_folders(root: Path | str) -> list[Path]:
    """Folders below `root` that are links, and so left out by `find_videos` with all they hold."""
    return [
        Path(folder, name)
        for folder, folders, _ in os.walk(Path(root))
        for name in sorted(folders)
        if not name.startswith(".") and Path(folder, name).is_symlink()
    ]


def scan(data: Data) -> Catalog:
    """Index every file under `data.root`, leave out what cannot give a clip, and split.

    Raises DataError for the first unusable file when `data.on_bad_clip` is `error`, and when none can be used.
    """
    root = Path(data.root)
    usable, rejected = [], []
    for path, index in zip(paths := find_videos(root), index_files(root, paths), strict=True):
        try:
            usable.append(_checked(index, data))
        except DataError as error:
            if data.on_bad_clip == "error":
                raise DataError(f"{error}. (data.on_bad_clip=skip would leave it out)") from error
            rejected.append(Rejected(path, str(error)))
    if not usable:
        raise DataError(f"data.root: none of the {len(paths)} file(s) in {root} can be used:\n{_summary(rejected)}")
    train, held_out = split([clip_name(index, data) for index in usable], data.holdout)
    return Catalog(tuple(usable[i] for i in train), tuple(usable[i] for i in held_out), tuple(rejected))


def index_files(
    root: Path | str, paths: Sequence[Path], chosen: Sequence[Path] | None = None
) -> list[VideoIndex | DataError]:
    """The index of each of `chosen`, or why it has none; those read before and unchanged since come from the cache.

    `paths` are all files under `root`, `chosen` those wanted now (None: all). What failed is tried again each time.
    """
    root, chosen = Path(root), paths if chosen is None else chosen
    found: dict[Path, VideoIndex | DataError] = dict(load_indexes(root, chosen))
    missing = [path for path in chosen if path not in found]
    before = {path: identity(path) for path in missing}
    read = dict(zip(missing, _index_all(missing), strict=True))
    fresh = {
        path: (file, index) for path, index in read.items() if isinstance(index, VideoIndex) and (file := before[path])
    }
    if fresh:
        save_indexes(root, paths, fresh)
    found |= read
    return [found[path] for path in chosen]


def clip_name(index: VideoIndex, data: Data) -> str:
    """The file's path relative to data.root, with forward slashes: its name in logs and in the held-out split."""
    return index.path.relative_to(Path(data.root)).as_posix()


def split(names: Sequence[str], holdout: float) -> tuple[list[int], list[int]]:
    """Positions of training and held-out files in `names`.

    A file is held out when the hash of its name falls below `holdout`, so adding files never moves another one.
    Exceptions keep both sides from being empty: with >= 2 files the one with the smallest hash is held out when no
    other is, and the one with the largest trains when no other does.
    """
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    order = sorted(range(len(names)), key=lambda i: hashes[i])
    count = sum(value < holdout for value in hashes)
    if holdout > 0:
        count = max(count, 1)
    count = min(count, len(names) - 1)
    return sorted(order[count:]), sorted(order[:count])


def _summary(rejected: Sequence[Rejected]) -> str:
    """One line for each kind of reason (reasons that differ in their numbers only are of one kind)."""
    kinds: dict[str, list[Rejected]] = {}
    for item in rejected:
        kinds.setdefault(re.sub(r"\d+(\.\d+)?", "0", item.reason.removeprefix(f"{item.path}: ")), []).append(item)
    lines = []
    for first, *alike in list(kinds.values())[:_LISTED]:
        lines.append(f"  {first.reason}")
        if alike:
            names = ", ".join(item.path.name for item in alike[:3]) + (", ..." if len(alike) > 3 else "")
            lines.append(f"    and {len(alike)} more like it: {names}")
    if len(kinds) > _LISTED:
        lines.append(f"  ... and {sum(map(len, list(kinds.values())[_LISTED:]))} more")
    return "\n".join(lines)


def _index_all(paths: Sequence[Path]) -> list[VideoIndex | DataError]:
    if len(paths) >= _CHILDREN_FROM:
        return map_files(index_video, paths, processes=min(8, os.cpu_count() or 1), seconds=_SECONDS)
    return [_index_or_error(path) for path in paths]


def _index_or_error(path: Path) -> VideoIndex | DataError:
    try:
        return index_video(path)
    except DataError as error:
        return error


def _checked(index: VideoIndex | DataError, data: Data) -> VideoIndex:
    if isinstance(index, DataError):
        raise index
    latest_start(index, num_frames=data.num_frames, fps=data.fps)
    return index


def _require_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"data.root: {root} is a file; expected a folder of video files: data.root={root.parent}")
    parent = root.parent
    siblings = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    nearest = difflib.get_close_matches(root.name, siblings, n=1, cutoff=0.75)
    hint = f" Did you mean {parent / nearest[0]}?" if nearest else ""
    if "$" in str(root):
        hint = " Variables of the shell are not expanded in YAML: write ~, or ${oc.env:HOME}."
    raise DataError(f"data.root: no such folder: {root} (looked in {root.absolute()}).{hint}")
