"""`svdtune cache`: every clip that training and its held-out loss will ask for, through the frozen networks once, to disk.

Several processes share the files by number and never talk: each writes what is its own, and whoever finds all of it there
writes the index. So a killed one is started again, on as many processes as one likes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdtune import launch
from svdtune.checkpoint.files import fsync_file, is_disk_full, move_file, write_text
from svdtune.checkpoint.tensors import save_tensors
from svdtune.config.schema import Config, Data
from svdtune.data.catalog import Catalog, clip_name, scan
from svdtune.data.clips import window_frames
from svdtune.data.dataset import read_clip, window_starts
from svdtune.data.held_out import windows
from svdtune.data.index import VideoIndex
from svdtune.data.latents import (
    INDEX,
    NETWORKS,
    CachedFile,
    Entry,
    Index,
    as_json,
    checksum,
    content_hash,
    entry_key,
    entry_path,
    file_of,
    present,
    settings_of,
    view,
)
from svdtune.data.loader import answers, require_shared_memory
from svdtune.diffusion.conditioning import image_embeds, packed, posterior
from svdtune.errors import ConfigError, DataError, ModelError
from svdtune.model.load import ModelParts, load_model
from svdtune.model.source import model_source, weights_hash
from svdtune.trainer.build import DTYPES, clip_pixels
from svdtune.trainer.filling import Filling

Window = tuple[int, bool]
"""First frame of a clip, and whether it is mirrored."""


@dataclass(frozen=True)
class Wanted:
    """All windows that a configuration asks for, by file."""

    catalog: Catalog
    files: tuple[tuple[VideoIndex, tuple[Window, ...]], ...]
    """Training files, then held-out ones, in the catalog's order."""
    loss: tuple[tuple[str, int], ...]
    subjects: tuple[tuple[str, int], ...]


def make_cache(config: Config, *, rank: int = 0, world: int = 1, device: str = "cpu") -> str:
    """Encode this process's share of what is missing in `data.latents`; says what was done.

    Raises ConfigError without a data.latents that can be a folder, DataError as training's loader does, and when the disk is full.
    """
    if config.data.latents is None:
        raise ConfigError("data.latents: got null, expected a folder for the encoded clips: data.latents=latents/")
    folder = Path(config.data.latents)
    _require_folder(folder)
    wanted = wanted_windows(config, scan(config.data))
    networks = network_hashes(config)
    settings = {**settings_of(config), **networks}
    share = wanted.files[rank::world]
    known = [_identified(config, video, _read_record(config, clip_name(video, config.data))) for video, _ in share]
    files = [_planned(config, settings, file, video, asked) for file, (video, asked) in zip(known, share, strict=True)]
    with Filling("clips to encode", shown=rank == 0) as filling:
        made = _encode(config, networks, [video for video, _ in share], files, filling, Encoder(config, device))
    index = assemble(config, wanted, settings)
    if index is None:
        return f"{made}; other processes still encode their share: the last one to end writes the index"
    _publish(view(folder, config) / INDEX, as_json(index))
    return f"{made}; {_told(folder, index)}"


def _require_folder(folder: Path) -> None:
    """Before anything is read or loaded for it."""
    try:
        (folder / "clips").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.latents: {folder} cannot be a folder for the encoded clips ({error.strerror}). Name another folder."
        ) from error


def run_cache(config: Config) -> str:
    """`make_cache` in this process's place among those of the launcher, on its device; says what was done."""
    device = f"cuda:{launch.local_rank()}" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(config.run.threads or max(1, launch.cores() // launch.local_processes()))
    return make_cache(config, rank=launch.rank(), world=launch.world_size(), device=device)


def network_hashes(config: Config) -> dict[str, str]:
    """sha256 of the weights of the frozen networks; a hub id is downloaded first. Raises ModelError."""
    source = model_source(config.model)
    return {part: weights_hash(source, part, config.model.variant) for part in NETWORKS}


def wanted_windows(config: Config, catalog: Catalog) -> Wanted:
    """What training on `catalog` will ask for."""
    data, validation = config.data, config.validation
    asked: dict[Path, dict[Window, None]] = {index.path: {} for index in (*catalog.train, *catalog.held_out)}
    flips = (False, True) if data.flip else (False,)
    for index in catalog.train:
        asked[index.path] |= {(start, flip): None for start in window_starts(data, index) for flip in flips}
    loss = windows(data, catalog.held_out, clips=validation.clips, seed=config.run.seed)
    samples = 0 if validation.images else validation.samples
    subjects = windows(data, catalog.held_out or catalog.train, clips=samples, seed=config.run.seed)
    for index, start in (*loss, *subjects):
        asked[index.path][start, False] = None
    files = tuple((index, tuple(asked[index.path])) for index in (*catalog.train, *catalog.held_out))
    named = (tuple((clip_name(index, data), start) for index, start in chosen) for chosen in (loss, subjects))
    return Wanted(catalog, files, *named)


class Encoder:
    """The frozen networks, loaded when the first clip comes."""

    def __init__(self, config: Config, device: str) -> None:
        self._config, self._device = config, device

    @cached_property
    def _model(self) -> ModelParts:
        config = self._config
        model = load_model(config.model, bridge=config.conditioning.bridge is not None, only=NETWORKS)
        networks: list[Any] = [model.vae, model.image_encoder]
        for network in networks:
            network.to(self._device)
        networks[1].to(DTYPES[config.train.precision])
        return model

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """An entry's tensors of a clip (t, 3, h, w) in [-1, 1], on the CPU. Raises ModelError for what float16 cannot hold."""
        model, frames = self._model, pixels.to(self._device)
        with torch.no_grad():
            mean, std = posterior(model.vae, frames, self._config.memory.vae_chunk)
            embeds = image_embeds(model.image_encoder, frames[:1], clip_pixels(model))[0]
        made = {
            "first_frame": packed(frames[0]),
            "image_embeds": embeds,
            "latents_mean": mean.half(),
            "latents_std": std.half(),
        }
        if broken := [name for name, tensor in made.items() if not bool(tensor.isfinite().all())]:
            raise ModelError(
                f"model.pretrained: {', '.join(broken)} of a clip are not finite in float16; SVD's own are below 100"
            )
        return {name: tensor.cpu().contiguous() for name, tensor in made.items()}


@dataclass(frozen=True)
class _Windows:
    """What the loader's workers decode, by (number of the file, first frame)."""

    data: Data
    files: Sequence[VideoIndex]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        try:
            return {"pixels": read_clip(self.data, self.files[key[0]], start_frame=key[1])}
        except DataError as error:
            return {"error": str(error)}

    def told(self, key: tuple[int, int]) -> str:
        return f"{self.files[key[0]].path} from frame {key[1]}"


def _encode(
    config: Config, networks: Mapping[str, str], videos: Sequence[VideoIndex], files: Sequence[CachedFile],
    filling: Filling, encoder: Encoder,
) -> str:  # fmt: skip
    """Decode and encode what is missing, write the record of each file when its last window is there; says how much."""
    data, started, folder = config.data, time.perf_counter(), Path(config.data.latents or "")
    todo = _missing(files, present(folder))
    if data.workers and todo:
        require_shared_memory(data, 1)
    filling.begin(sum(map(len, todo.values())), sum(len(file.entries) for file in files))
    left = Counter(number for number, _ in todo)
    for number, file in enumerate(files):
        if not left[number]:
            _record(config, networks, file)
    rejected: dict[tuple[int, int], str] = {}
    written = []
    for key, answer in zip(todo, answers(_Windows(data, videos), tuple(todo), data.workers), strict=True):
        if "error" in answer:
            rejected[key] = _passed_over(data, answer["error"])
        else:
            written += [_store(folder, entry, answer["pixels"], encoder) for entry in todo[key]]
        left[key[0]] -= 1
        if not left[key[0]]:
            _record(config, networks, _with_rejected(files[key[0]], key[0], rejected))
        filling.advance(len(todo[key]))
    left_out = f" ({len(rejected)} windows cannot be decoded)" if rejected else ""
    return (
        f"encoded {len(written)} clips{left_out}, {sum(written) / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s"
    )


def _missing(files: Sequence[CachedFile], there: Set[str]) -> dict[tuple[int, int], list[Entry]]:
    """By file and first frame, the entries to write: both ways round of one window are decoded once."""
    todo: dict[tuple[int, int], list[Entry]] = {}
    for number, file in enumerate(files):
        for entry in file.entries:
            if entry.key not in there:
                todo.setdefault((number, entry.start), []).append(entry)
    return todo


def _passed_over(data: Data, reason: str) -> str:
    if data.on_bad_clip == "error":
        raise DataError(reason)
    return reason


def _store(folder: Path, entry: Entry, pixels: Tensor, encoder: Encoder) -> int:
    """Encode one clip and write its entry; returns the bytes."""
    return _write(entry_path(folder, entry.key), encoder(pixels.flip(-1) if entry.flip else pixels))


def _with_rejected(file: CachedFile, number: int, rejected: Mapping[tuple[int, int], str]) -> CachedFile:
    entries = (replace(entry, rejected=rejected.get((number, entry.start), "")) for entry in file.entries)
    return replace(file, entries=tuple(entries))


def _write(path: Path, tensors: dict[str, Tensor]) -> int:
    """Whole or not at all. Returns its bytes."""
    partial = path.with_name(f".{path.stem}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(partial, tensors, {"crc32": checksum(tensors)})
        size = partial.stat().st_size
        fsync_file(partial)
        move_file(partial, path)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and path.is_file():
            return 0  # a copy of the same video, written by another process at this moment
        if not is_disk_full(error):
            raise
        raise DataError(
            f"data.latents: the disk of {path.parent} is full; what is written stays, the same command goes on"
        ) from error
    return size


def _identified(config: Config, video: VideoIndex, before: CachedFile | None) -> CachedFile:
    """The file as it is now; read and hashed unless size and time are those of the record."""
    stat = video.path.stat()
    same = before is not None and (before.size, before.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    digest = before.sha256 if before is not None and same else content_hash(video.path)
    return CachedFile(clip_name(video, config.data), stat.st_size, stat.st_mtime_ns, digest, ())


def _planned(
    config: Config, settings: Mapping[str, Any], file: CachedFile, video: VideoIndex, asked: Sequence[Window]
) -> CachedFile:
    data, entries = config.data, []
    for start, flip in asked:
        begin = float(video.times[start])
        frames = window_frames(video, num_frames=data.num_frames, fps=data.fps, start_seconds=begin)
        entries.append(Entry(start, flip, entry_key(settings, file.sha256, frames, flip)))
    return replace(file, entries=tuple(entries))


def assemble(config: Config, wanted: Wanted, settings: Mapping[str, Any]) -> Index | None:
    """The index, when the record of every file is there and fits the file as it is now; None before."""
    files = {}
    for video, asked in wanted.files:
        name, stat = clip_name(video, config.data), video.path.stat()
        record = _read_record(config, name, {part: settings[part] for part in NETWORKS})
        if record is None or (record.size, record.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            return None
        if {(entry.start, entry.flip) for entry in record.entries} != set(asked):
            return None
        files[video.path] = record
    train, held_out = (
        tuple(files[video.path] for video in videos) for videos in (wanted.catalog.train, wanted.catalog.held_out)
    )
    starts = tuple(tuple(window_starts(config.data, video)) for video in wanted.catalog.train)
    return Index(dict(settings), train, starts, held_out, wanted.loss, wanted.subjects)


def _record_path(config: Config, name: str) -> Path:
    folder = view(Path(config.data.latents or ""), config) / "files"
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"


def _record(config: Config, networks: Mapping[str, str], file: CachedFile) -> None:
    _publish(_record_path(config, file.name), json.dumps({"networks": dict(networks), "file": asdict(file)}, indent=1))


def _read_record(config: Config, name: str, networks: Mapping[str, str] | None = None) -> CachedFile | None:
    """The record of a file, of these networks when they are given; None where there is none that can be read."""
    try:
        value = json.loads(_record_path(config, name).read_text(encoding="utf-8"))
        return file_of(value["file"]) if networks in (None, value["networks"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _told(folder: Path, index: Index) -> str:
    """What lies there, for a person."""
    keys = {entry.key for file in index.files().values() for entry in file.entries if not entry.rejected}
    there = present(folder)
    size = sum(entry_path(folder, key).stat().st_size for key in keys)
    others = f"; {len(there - keys)} clips there belong to other settings or files" if there - keys else ""
    return f"{folder} holds all {len(keys)} clips of this configuration, {size / 1e6:,.1f} MB{others}"
