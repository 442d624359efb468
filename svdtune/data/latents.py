"""The latent cache on disk: each clip as the frozen networks left it, in a file named by all that it was made from.

    FOLDER/clips/ab/<key>.safetensors           one window
    FOLDER/<settings>/files/<hash of name>.json   a file's windows, written when they are encoded
    FOLDER/<settings>/index.json                  all of them, written last: what training reads

The key is a hash of the file's content, the frame numbers, the frame's size and the networks: with other settings an entry has
another name, and what two configurations share is encoded once. Reading alone; `trainer/caching.py` writes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.config.schema import Config
from svdtune.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Raise it whenever the same clip would be encoded to something else."""
INDEX = "index.json"
NETWORKS = ("vae", "image_encoder")
TENSORS = ("first_frame", "image_embeds", "latents_mean", "latents_std")
"""What an entry holds: the fields of `LatentBatch` without the batch axis."""
RUN = "Run `svdtune cache` with this configuration: what is there is kept, what is missing is encoded."
_OF_PICTURES = ("num_frames", "height", "width", "fps", "resize", "decoder")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One encoded window of a file."""

    start: int
    """Frame number it begins at."""
    flip: bool
    key: str
    rejected: str = ""
    """Why it could not be decoded; there is no file of it then."""


@dataclass(frozen=True)
class CachedFile:
    """One video file, as it was when its windows were encoded."""

    name: str
    """Relative to data.root."""
    size: int
    """Bytes."""
    mtime_ns: int
    sha256: str
    """Of its whole content."""
    entries: tuple[Entry, ...]
    """Of training, of validation, or of both."""

    def entry(self, start: int, flip: bool = False) -> Entry:
        """The window that begins at frame `start`. Raises KeyError."""
        found = {(entry.start, entry.flip): entry for entry in self.entries}
        return found[start, flip]


@dataclass(frozen=True)
class Index:
    """What a finished cache holds, for one configuration."""

    settings: Mapping[str, Any]
    """By option name, and the hashes of the networks."""
    train: tuple[CachedFile, ...]
    starts: tuple[tuple[int, ...], ...]
    """Of each training file the frame numbers that clips begin at."""
    held_out: tuple[CachedFile, ...]
    loss: tuple[tuple[str, int], ...]
    """Name and first frame of the windows of the held-out loss, in its order."""
    subjects: tuple[tuple[str, int], ...]
    """The same of the clips that videos are sampled from."""

    def files(self) -> dict[str, CachedFile]:
        """All of them, by name."""
        return {file.name: file for file in (*self.train, *self.held_out)}


def settings_of(config: Config) -> dict[str, Any]:
    """Everything of a configuration that a cache depends on, by option name; the networks' hashes come on top."""
    data, validation = config.data, config.validation
    from_clips = 0 if validation.images else validation.samples
    return {
        "format": FORMAT,
        **{f"data.{name}": getattr(data, name) for name in _OF_PICTURES},
        "train.precision": config.train.precision,  # the CLIP tower computes in it
        "data.windows": data.windows,
        "data.flip": data.flip,
        "data.holdout": data.holdout,
        "validation.clips": validation.clips,
        "validation.samples": from_clips,
        "run.seed": config.run.seed,
    }


def view(folder: Path, config: Config) -> Path:
    """What belongs to one configuration; others may share the folder, and the entries."""
    settings = json.dumps(settings_of(config), sort_keys=True)
    return folder / f"view-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"


def entry_key(settings: Mapping[str, Any], file: str, frames: Sequence[int], flip: bool) -> str:
    """The name of an entry: a hash of what its numbers depend on. `file`: sha256 of the video's content."""
    made_from = [settings["format"], *(settings[f"data.{name}"] for name in _OF_PICTURES), settings["train.precision"],
                 settings["vae"], settings["image_encoder"], file, list(frames), flip]  # fmt: skip
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """sha256 of a file. Raises DataError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: it cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def entry_path(folder: Path, key: str) -> Path:
    """Where an entry lies."""
    return folder / "clips" / key[:2] / f"{key}.safetensors"


def present(folder: Path) -> set[str]:
    """Keys of all entries that are there, by the names of their files."""
    return {path.stem for path in (folder / "clips").glob("??/*.safetensors") if not path.name.startswith(".")}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """crc32 over the bytes of an entry: what a damaged disk changes is noticed before it is learned."""
    value = 0
    for name in TENSORS:
        value = zlib.crc32(tensors[name].numpy().data, value)
    return f"{value:08x}"


def read_entry(folder: Path, name: str, entry: Entry) -> dict[str, Tensor]:
    """The tensors of one entry. Raises DataError for one that is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = entry_path(folder, entry.key)
    what = f"{path}: the cached clip of {name} from frame {entry.start}"
    try:
        with safe_open(path, framework="pt") as stored:
            told = (stored.metadata() or {}).get("crc32")
            tensors = {name: stored.get_tensor(name) for name in TENSORS}
    except FileNotFoundError:
        raise DataError(f"{what} is missing. {RUN}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{what} is damaged ({error}). Delete it. {RUN}") from error
    if told != checksum(tensors):
        raise DataError(f"{what} is damaged (its numbers are not those that were written). Delete it. {RUN}")
    return tensors


def read_index(config: Config) -> Index:
    """The index of `data.latents` for this configuration. Raises DataError where there is none, saying how others differ."""
    folder = Path(config.data.latents or "")
    path = view(folder, config) / INDEX
    try:
        stat = path.stat()
        return _read_index(path, stat.st_mtime_ns, stat.st_size)
    except FileNotFoundError:
        raise DataError(f"data.latents: {_no_index(folder, config)}. {RUN}") from None
    except OSError as error:
        raise DataError(f"data.latents: {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.latents: {path} is damaged ({type(error).__name__}: {error}). {RUN}") from error


def _no_index(folder: Path, config: Config) -> str:
    if not folder.is_dir():
        return f"there is no cache {folder}"
    if view(folder, config).is_dir():
        return f"the cache {folder} was begun for this configuration and is not finished"
    wanted = settings_of(config)
    others = [differences(_read_index(path, 0, 0).settings, wanted) for path in sorted(folder.glob(f"view-*/{INDEX}"))]
    if not others:
        return f"{folder} holds no finished cache"
    return f"the cache {folder} was made for another configuration ({'; '.join(min(others, key=len))})"


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for each setting that is not as it was when the cache was made."""
    return [
        f"{name} was {_shown(made.get(name))}, now {_shown(value)}"
        for name, value in wanted.items()
        if made.get(name) != value
    ]


def _shown(value: Any) -> str:
    """As YAML has it; of a hash the beginning."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f"{value:.12}" if isinstance(value, str) else str(value)


@lru_cache(maxsize=4)
def _read_index(path: Path, _mtime_ns: int, _size: int) -> Index:
    value = json.loads(path.read_text(encoding="utf-8"))
    return Index(
        settings=value["settings"],
        train=tuple(file_of(file) for file in value["train"]),
        starts=tuple(tuple(starts) for starts in value["starts"]),
        held_out=tuple(file_of(file) for file in value["held_out"]),
        loss=tuple((name, start) for name, start in value["loss"]),
        subjects=tuple((name, start) for name, start in value["subjects"]),
    )


def file_of(value: Mapping[str, Any]) -> CachedFile:
    """A `CachedFile` from its JSON."""
    entries = tuple(Entry(**entry) for entry in value["entries"])
    return CachedFile(**{**value, "entries": entries})


def as_json(record: Index | CachedFile) -> str:
    """What `read_index` and `file_of` read."""
    return json.dumps(asdict(record), indent=1, ensure_ascii=False)
