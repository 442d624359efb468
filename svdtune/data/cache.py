"""Indexes of files read before, by file identity, so that preflight, `data scan` and training read each file once.

One .npz per data.root in SVDTUNE_CACHE, or $XDG_CACHE_HOME/svdtune, or ~/.cache/svdtune. No pickle. Losing it costs time only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from svdtune.data.index import Orientation, VideoIndex

_log = logging.getLogger(__name__)
_VERSION = 2
"""Raise it whenever `index_video` would answer something else for the same file."""
_SETTLED_NS = 2_000_000_000
"""A file that changed this recently may change again within one tick of the file system's clock, unseen."""
_BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile)
"""What reading a file raises that is not one of ours, or is cut."""
_PLAIN = (
    "width", "height", "pixel_aspect", "has_edit_list", "has_leading_pictures", "interlaced", "container", "codec",
    "pixel_format", "colorspace",
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """What a file is known by; another identity means that it must be read again."""

    size: int
    """Bytes."""
    mtime_ns: int
    inode: int
    ctime_ns: int
    """A copy that keeps size and time changes this one."""

    def as_list(self) -> list[int]:
        """For JSON."""
        return [self.size, self.mtime_ns, self.inode, self.ctime_ns]


def cache_folder() -> Path:
    """Where svdtune keeps what it can make again."""
    if own := os.environ.get("SVDTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "svdtune"


def identity(path: Path) -> Identity | None:
    """The identity of a file now; None when it cannot be known, or is too fresh to be trusted."""
    try:
        stat = path.stat()
    except OSError:
        return None
    if time.time_ns() - stat.st_mtime_ns < _SETTLED_NS:
        return None
    return Identity(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


def load_indexes(root: Path, paths: Sequence[Path]) -> dict[Path, VideoIndex]:
    """Indexes of those of `paths` that were read before and have not changed since. A broken cache holds none."""
    known = _read(_file(root))
    found = {}
    for path in paths:
        entry = known.get(str(path.absolute()))
        now = identity(path) if entry is not None else None
        if entry is not None and now is not None and entry["identity"] == now.as_list():
            found[path] = _index(path, entry)
    return found


def save_indexes(root: Path, paths: Sequence[Path], indexes: Mapping[Path, tuple[Identity, VideoIndex]]) -> None:
    """Add `indexes`, each with the identity its file had before it was read; forget files that are not in `paths`.

    Where nothing can be written, nothing is: the next run reads the files again.
    """
    wanted = {str(path.absolute()) for path in paths}
    entries = {name: entry for name, entry in _read(_file(root)).items() if name in wanted}
    entries |= {str(path.absolute()): _entry(*of) for path, of in indexes.items()}
    try:
        _write(_file(root), entries)
    except OSError as error:
        _log.info("the clips' indexes are not kept for the next run: %s", error)


def _file(root: Path) -> Path:
    name = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:24]
    return cache_folder() / "index" / f"{name}.npz"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Entries by absolute path; {} for a file that is missing, broken, or of another version."""
    try:
        # Opened here: np.load leaves its own handle open when the zip is broken.
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            head = json.loads(bytes(arrays["head"]))
            pts, keyframes = arrays["pts"], arrays["keyframe_pts"]
        if head["version"] != _versions():
            return {}
        entries = head["entries"]
        parts = [np.split(pts, np.cumsum([e["frames"] for e in entries])[:-1]),
                 np.split(keyframes, np.cumsum([e["keyframes"] for e in entries])[:-1])]  # fmt: skip
        if pts.ndim != 1 or len(pts) != sum(e["frames"] for e in entries):
            return {}
        return {e["path"]: {**e, "pts": p, "keyframe_pts": k} for e, p, k in zip(entries, *parts, strict=True)}
    except _BROKEN:
        return {}


def _write(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Whole or not at all; several ranks may do it at once, each with its own temporary file."""
    arrays = ("pts", "keyframe_pts")
    plain = [{**{k: v for k, v in entry.items() if k not in arrays}, "path": path} for path, entry in entries.items()]
    head = json.dumps({"version": _versions(), "entries": plain}).encode()
    joined: dict[str, Any] = {
        name: np.concatenate([np.zeros(0, np.int64), *(entry[name] for entry in entries.values())]) for name in arrays
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            np.savez(handle, head=np.frombuffer(head, np.uint8), **joined)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _versions() -> list[Any]:
    import av

    return [_VERSION, av.__version__]


def _entry(file: Identity, index: VideoIndex) -> dict[str, Any]:
    orientation = index.orientation
    return {
        "identity": file.as_list(),
        "frames": len(index.pts),
        "keyframes": len(index.keyframe_pts),
        "time_base": [index.time_base.numerator, index.time_base.denominator],
        "orientation": [orientation.transpose, orientation.mirror_x, orientation.mirror_y],
        **{name: getattr(index, name) for name in _PLAIN},
        "pts": index.pts,
        "keyframe_pts": index.keyframe_pts,
    }


def _index(path: Path, entry: Mapping[str, Any]) -> VideoIndex:
    return VideoIndex(
        path=path,
        pts=entry["pts"],
        keyframe_pts=entry["keyframe_pts"],
        time_base=Fraction(*entry["time_base"]),
        orientation=Orientation(*entry["orientation"]),
        **{name: entry[name] for name in _PLAIN},
    )
