"""Global sample number to cached clip: the same clips in the same order as `ClipDataset` cuts, without opening a video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from svdtune.config.schema import Data
from svdtune.data.catalog import Catalog, clip_name
from svdtune.data.dataset import ATTEMPTS, file_number, window_number
from svdtune.data.latents import (
    CachedFile,
    Entry,
    Index,
    content_hash,
    entry_path,
    present,
    read_entry,
)
from svdtune.errors import DataError

_NAMED = 3


@dataclass(frozen=True)
class LatentClip:
    """One training clip from the cache."""

    tensors: dict[str, Tensor]
    """The fields of `LatentBatch` without the batch axis."""
    sample: int
    name: str
    """The file, relative to data.root."""
    rejected: tuple[str, ...] = ()
    """Why files tried before this one could not be decoded when the cache was made."""


@dataclass(frozen=True)
class LatentDataset:
    """Maps any global sample number to its cached clip; epoch = sample // number of files."""

    data: Data
    index: Index
    seed: int

    def __getitem__(self, sample: int) -> LatentClip:
        """The clip of one sample, replaced as `ClipDataset` replaces what cannot be decoded.

        Raises DataError as `ClipDataset` does, and for an entry that is missing or damaged.
        """
        rejected: list[str] = []
        for attempt in range(ATTEMPTS):
            file, entry = self.entry_of(sample, attempt)
            if entry.rejected and self.data.on_bad_clip == "error":
                raise DataError(entry.rejected)
            if entry.rejected:
                rejected.append(entry.rejected)
                continue
            return LatentClip(read_entry(_folder(self.data), file.name, entry), sample, file.name, tuple(rejected))
        reasons = "\n  ".join(dict.fromkeys(rejected))
        raise DataError(
            f"sample {sample}: none of {ATTEMPTS} files could be decoded for the cache; check data.root:\n  {reasons}"
        )

    def entry_of(self, sample: int, attempt: int = 0) -> tuple[CachedFile, Entry]:
        """The file a sample comes from, and the window."""
        number = file_number(self.seed, len(self.index.train), sample, attempt)
        file, starts = self.index.train[number], self.index.starts[number]
        window, mirrored = window_number(self.seed, len(starts), sample, attempt)
        return file, file.entry(starts[window], mirrored and self.data.flip)

    def name_of(self, sample: int) -> str:
        """The file a sample should come from, for messages."""
        return self.entry_of(sample)[0].name


def cached_clips(
    data: Data, index: Index, windows: Sequence[tuple[str, int]], limit: int
) -> Iterator[tuple[LatentClip, int]]:
    """Validation's clips, numbered from 0, each with the frame it begins at; passes over what could not be decoded."""
    files, made, rejected = index.files(), 0, []
    for name, start in windows:
        if made == limit:
            return
        entry = files[name].entry(start)
        if entry.rejected and data.on_bad_clip == "error":
            raise DataError(entry.rejected)
        if entry.rejected:
            rejected.append(entry.rejected)
            continue
        yield LatentClip(read_entry(_folder(data), name, entry), made, name, tuple(rejected)), start
        made, rejected = made + 1, []
    if windows and limit and not made:
        raise DataError("no held-out clip could be decoded for the cache; check data.root:\n  " + "\n  ".join(rejected))


def changed_files(data: Data, index: Index, catalog: Catalog) -> list[str]:
    """One line for each way in which the video files are not those that were encoded.

    A file of the same size and time is taken for the same; another time alone makes it be read and hashed.
    """
    told = []
    for kind, indexes, cached in (
        ("training", catalog.train, index.train),
        ("held-out", catalog.held_out, index.held_out),
    ):
        there = {clip_name(video, data): video.path for video in indexes}
        known = {file.name: file for file in cached}
        told += _listed(f"new {kind} files, not in the cache", sorted(there.keys() - known.keys()))
        told += _listed(f"{kind} files of the cache that are gone", sorted(known.keys() - there.keys()))
        both = sorted(there.keys() & known.keys())
        told += _listed(f"{kind} files changed since", [name for name in both if _changed(there[name], known[name])])
    return told


def missing_entries(data: Data, index: Index) -> list[str]:
    """A line that counts the entries whose file is not there."""
    there = present(_folder(data))
    lost = [
        f"{file.name} from frame {entry.start}"
        for file in index.files().values()
        for entry in file.entries
        if not entry.rejected and entry.key not in there
    ]
    return _listed("encoded clips are missing", lost)


def clip_bytes(data: Data, index: Index) -> int:
    """Size of one entry; 0 where none is there."""
    keys = (entry.key for file in index.train for entry in file.entries if not entry.rejected)
    path = next((entry_path(_folder(data), key) for key in keys), None)
    return path.stat().st_size if path is not None and path.is_file() else 0


def _changed(path: Path, file: CachedFile) -> bool:
    stat = path.stat()
    if stat.st_size != file.size:
        return True
    return stat.st_mtime_ns != file.mtime_ns and content_hash(path) != file.sha256


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {what}: {', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}"]


def _folder(data: Data) -> Path:
    return Path(data.latents or "")
