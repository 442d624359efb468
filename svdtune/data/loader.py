"""Samples to `VideoBatch`, in worker processes, without any state that a checkpoint would have to hold."""

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
from typing import Any

import torch
from torch.utils.data import DataLoader

from svdtune.config.schema import Data
from svdtune.contracts import VideoBatch
from svdtune.data.dataset import Clip, ClipDataset
from svdtune.data.index import VideoIndex
from svdtune.errors import DataError

_SECONDS = 300
"""Time the workers may take for one batch before the run stops with the names of its files."""
_CHECK_SECONDS = 5
"""Time between looks at whether the workers live: those of a forkserver send this process no signal when they die."""
_PREFETCH = 2
_SHARED_MEMORY = Path("/dev/shm")


def make_loader(
    data: Data,
    train: Sequence[VideoIndex],
    *,
    seed: int,
    rank: int,
    world: int,
    batch_size: int,
    first_sample: int,
    last_sample: int,
) -> Iterator[VideoBatch]:
    """Batches of this rank from global sample `first_sample` up to `last_sample` (exclusive).

    Micro-step k of rank r holds samples `first_sample + (k * world + r) * batch_size` and following: ranks never share
    one, and N ranks with batch b see what one rank with batch N * b sees. All ranks get the same number of batches, so
    the last ones may run past `last_sample`. To resume, pass the number of samples seen so far.

    Raises DataError as `ClipDataset` does, and when workers hang, crash or lack shared memory.
    """
    stride = world * batch_size
    count = -(-(last_sample - first_sample) // stride)
    starts = [first_sample + k * stride + rank * batch_size for k in range(max(count, 0))]
    batches = _Batches(ClipDataset(data, tuple(train), seed), batch_size)
    if data.workers and starts:
        _require_shared_memory(data, batch_size)
    answers = iter(_dataloader(batches, starts, data.workers))
    for start in starts:
        try:
            answer = _next(answers)
        except RuntimeError as error:  # raised by DataLoader for workers that hang or die
            if not data.workers:
                raise
            raise DataError(_worker_trouble(batches, start, error)) from error
        if "error" in answer:
            raise DataError(answer["error"])
        yield _video_batch(answer)


def collate(data: Data, clips: Sequence[Clip]) -> VideoBatch:
    """Clips to one batch; fps and motion_bucket come from the configuration."""
    return _video_batch(_tensors(data, clips))


@dataclass(frozen=True)
class _Batches:
    """Map-style data set of whole micro-steps, keyed by their first sample.

    Errors travel as values: DataLoader would wrap an exception's message in a worker's traceback.
    """

    clips: ClipDataset
    batch_size: int

    def __getitem__(self, start: int) -> dict[str, Any]:
        try:
            return _tensors(self.clips.data, [self.clips[start + i] for i in range(self.batch_size)])
        except DataError as error:
            return {"error": str(error)}

    def names(self, start: int) -> list[str]:
        return [str(self.clips.file_of(start + i).path) for i in range(self.batch_size)]


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


def _dataloader(batches: _Batches, starts: list[int], workers: int) -> DataLoader:
    options: dict[str, Any] = {}
    if workers:
        options = {
            "multiprocessing_context": _context(),
            "prefetch_factor": _PREFETCH,
            "timeout": _CHECK_SECONDS,
            "worker_init_fn": _start_worker,
        }
    return DataLoader(
        batches,  # type: ignore[arg-type]  map-style by duck typing
        batch_size=None,
        sampler=starts,
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


def _tensors(data: Data, clips: Sequence[Clip]) -> dict[str, Any]:
    count = len(clips)
    return {
        "pixels": torch.stack([clip.pixels for clip in clips]),
        "fps": torch.full((count,), float(data.fps)),
        "motion_bucket": torch.full((count,), float(data.motion_bucket)),
        "sample": torch.tensor([clip.sample for clip in clips], dtype=torch.int64),
        "names": [clip.name for clip in clips],
        "rejected": [reason for clip in clips for reason in clip.rejected],
    }


def _video_batch(answer: dict[str, Any]) -> VideoBatch:
    return VideoBatch(**{**answer, "names": tuple(answer["names"]), "rejected": tuple(answer["rejected"])})


def shared_memory(data: Data, batch_size: int) -> tuple[int, int] | None:
    """Bytes of clips that one worker keeps waiting in shared memory, and bytes that are free there; None where there is none."""
    if not _SHARED_MEMORY.is_dir():
        return None
    waiting = batch_size * data.num_frames * 3 * data.height * data.width * 4 * _PREFETCH
    return waiting, shutil.disk_usage(_SHARED_MEMORY).free


def _require_shared_memory(data: Data, batch_size: int) -> None:
    """Workers hand tensors over in /dev/shm; when it is full the kernel kills them (64 MB is Docker's default)."""
    room = shared_memory(data, batch_size)
    if room is not None and room[1] < room[0] * data.workers:
        needed, free = room[0] * data.workers, room[1]
        raise DataError(
            f"data.workers={data.workers}: up to {needed / 2**20:,.0f} MB of clips wait in {_SHARED_MEMORY}, which has "
            f"{free / 2**20:,.0f} MB free. Lower data.workers (0 needs none), or give the container more: --shm-size"
        )


def _worker_trouble(batches: _Batches, start: int, error: RuntimeError) -> str:
    files = ", ".join(batches.names(start))
    return (
        f"loader workers failed at samples {start} to {start + batches.batch_size - 1} ({files}): {error}. "
        "If one file does it each time, remove it; data.workers=0 decodes in the training process"
    )
