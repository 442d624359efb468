"""Samples to `VideoBatch` or `LatentBatch`, in worker processes, without any state that a checkpoint would have to hold."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

import torch
from torch.utils.data import DataLoader

from svdtune.config.schema import Data
from svdtune.contracts import Batch, LatentBatch, VideoBatch
from svdtune.data.cached import LatentClip, LatentDataset, clip_bytes
from svdtune.data.dataset import Clip, ClipDataset
from svdtune.data.index import VideoIndex
from svdtune.data.latents import TENSORS, Index
from svdtune.errors import DataError

_SECONDS = 300
"""Time the workers may take for one batch before the run stops with the names of its files."""
_CHECK_SECONDS = 5
"""Time between looks at whether the workers live: those of a forkserver send this process no signal when they die."""
_PREFETCH = 2
_SHARED_MEMORY = Path("/dev/shm")


Key = TypeVar("Key", contravariant=True)
Record = TypeVar("Record", VideoBatch, LatentBatch)


class Items(Protocol[Key]):
    """What workers read: one answer for each key."""

    def __getitem__(self, key: Key, /) -> dict[str, Any]:
        """Tensors and plain values, or `{"error": sentence}`."""
        ...

    def told(self, key: Key, /) -> str:
        """The key and its files, for messages."""
        ...


def make_loader(
    data: Data,
    train: Sequence[VideoIndex] | Index,
    *,
    seed: int,
    rank: int,
    world: int,
    batch_size: int,
    first_sample: int,
    last_sample: int,
) -> Iterator[Batch]:
    """Batches of this rank from global sample `first_sample` up to `last_sample` (exclusive), cut from the files `train`, or
    read from the cache of which `train` is the index.

    Micro-step k of rank r holds samples `first_sample + (k * world + r) * batch_size` and following: ranks never share
    one, and N ranks with batch b see what one rank with batch N * b sees. All ranks get the same number of batches, so
    the last ones may run past `last_sample`. To resume, pass the number of samples seen so far.

    Raises DataError as `ClipDataset` does, and when workers hang, crash or lack shared memory.
    """
    stride = world * batch_size
    count = -(-(last_sample - first_sample) // stride)
    starts = [first_sample + k * stride + rank * batch_size for k in range(max(count, 0))]
    cached = isinstance(train, Index)
    clips = LatentDataset(data, train, seed) if cached else ClipDataset(data, tuple(train), seed)
    if data.workers and starts:
        require_shared_memory(data, batch_size, clip_bytes(data, train) if cached else None)
    for answer in answers(_Batches(clips, batch_size), starts, data.workers):
        if "error" in answer:
            raise DataError(answer["error"])
        yield _record(LatentBatch, answer) if cached else _record(VideoBatch, answer)


def answers(items: Items[Key], keys: Sequence[Key], workers: int) -> Iterator[dict[str, Any]]:
    """`items[key]` for each key in order, read ahead by worker processes; 0: in this one.

    Raises DataError naming the files when workers hang or crash.
    """
    made = iter(_dataloader(items, keys, workers if keys else 0))
    for key in keys:
        try:
            answer = _next(made)
        except RuntimeError as error:  # raised by DataLoader for workers that hang or die
            if not workers:
                raise
            raise DataError(_worker_trouble(items, key, error)) from error
        yield answer


def collate(data: Data, clips: Sequence[Clip]) -> VideoBatch:
    """Clips to one batch; fps and motion_bucket come from the configuration."""
    return _record(VideoBatch, _tensors(data, clips))


def collate_cached(data: Data, clips: Sequence[LatentClip]) -> LatentBatch:
    """The same of clips from the cache."""
    return _record(LatentBatch, _tensors(data, clips))


@dataclass(frozen=True)
class _Batches:
    """Map-style data set of whole micro-steps, keyed by their first sample.

    Errors travel as values: DataLoader would wrap an exception's message in a worker's traceback.
    """

    clips: ClipDataset | LatentDataset
    batch_size: int

    def __getitem__(self, start: int) -> dict[str, Any]:
        try:
            return _tensors(self.clips.data, [self.clips[start + i] for i in range(self.batch_size)])
        except DataError as error:
            return {"error": str(error)}

    def told(self, start: int) -> str:
        names = ", ".join(self.clips.name_of(start + i) for i in range(self.batch_size))
        return f"samples {start} to {start + self.batch_size - 1} ({names})"


def _next(answers: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next answer. Raises DataLoader's RuntimeError when a worker died, or after `_SECONDS` without an answer."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            return next(answers)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer in {_SECONDS} s") from error


def _dataloader(items: Items[Key], keys: Sequence[Key], workers: int) -> DataLoader:
    options: dict[str, Any] = {}
    if workers:
        options = {
            "multiprocessing_context": _context(),
            "prefetch_factor": _PREFETCH,
            "timeout": _CHECK_SECONDS,
            "worker_init_fn": _start_worker,
        }
    return DataLoader(
        items,  # type: ignore[arg-type]  map-style by duck typing
        batch_size=None,
        sampler=keys,
        collate_fn=_same,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def _context() -> multiprocessing.context.BaseContext:
    """forkserver: a fork of this process would copy locks held by torch's or CUDA's threads, a spawn imports torch anew
    in every worker; the server has neither threads nor CUDA and imports torch once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["svdtune.data.own_group", "torch", "av", "svdtune.data.loader"])
    return context


def _same(answer: Any) -> Any:
    return answer


def _start_worker(_worker: int) -> None:
    # torch's own watch looks at the parent, which here is the fork server, and that lives as long as its workers:
    # without this both outlive a killed trainer for ever, its output pipes and run folder lock with them.
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _tensors(data: Data, clips: Sequence[Clip | LatentClip]) -> dict[str, Any]:
    count = len(clips)
    return {
        **(_latents(clips) if _are_cached(clips) else {"pixels": torch.stack([clip.pixels for clip in clips])}),  # pyright: ignore[reportAttributeAccessIssue]
        "fps": torch.full((count,), float(data.fps)),
        "motion_bucket": torch.full((count,), float(data.motion_bucket)),
        "sample": torch.tensor([clip.sample for clip in clips], dtype=torch.int64),
        "names": [clip.name for clip in clips],
        "rejected": [reason for clip in clips for reason in clip.rejected],
    }


def _are_cached(clips: Sequence[Clip | LatentClip]) -> TypeGuard[Sequence[LatentClip]]:
    return isinstance(clips[0], LatentClip)


def _latents(clips: Sequence[LatentClip]) -> dict[str, torch.Tensor]:
    if len(clips) == 1:  # views: nothing is copied
        return {name: clips[0].tensors[name][None] for name in TENSORS}
    return {name: torch.stack([clip.tensors[name] for clip in clips]) for name in TENSORS}


def _record(record: type[Record], answer: dict[str, Any]) -> Record:
    return record(**{**answer, "names": tuple(answer["names"]), "rejected": tuple(answer["rejected"])})


def shared_memory(data: Data, batch_size: int, clip: int | None = None) -> tuple[int, int] | None:
    """Bytes of clips that one worker keeps waiting in shared memory, and bytes that are free there; None where there is none.

    `clip`: bytes of one; None: of decoded pixels.
    """
    if not _SHARED_MEMORY.is_dir():
        return None
    each = data.num_frames * 3 * data.height * data.width * 4 if clip is None else clip
    return batch_size * each * _PREFETCH, shutil.disk_usage(_SHARED_MEMORY).free


def require_shared_memory(data: Data, batch_size: int, clip: int | None = None) -> None:
    """Workers hand tensors over in /dev/shm; when it is full the kernel kills them (64 MB is Docker's default)."""
    room = shared_memory(data, batch_size, clip)
    if room is not None and room[1] < room[0] * data.workers:
        needed, free = room[0] * data.workers, room[1]
        raise DataError(
            f"data.workers={data.workers}: up to {needed / 2**20:,.0f} MB of clips wait in {_SHARED_MEMORY}, which has "
            f"{free / 2**20:,.0f} MB free. Lower data.workers (0 needs none), or give the container more: --shm-size"
        )


def _worker_trouble(items: Items[Key], key: Key, error: RuntimeError) -> str:
    return (
        f"loader workers failed at {items.told(key)}: {error}. "
        "If one file does it each time, remove it; data.workers=0 decodes in the training process"
    )
