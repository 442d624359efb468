"""The same held-out clips every time: fixed files, fixed windows, no flip."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from svdtune.config.schema import Data
from svdtune.contracts import VideoBatch
from svdtune.data.catalog import clip_name
from svdtune.data.clips import start_frames
from svdtune.data.dataset import Clip, read_clip
from svdtune.data.index import VideoIndex
from svdtune.data.loader import collate
from svdtune.errors import DataError


def held_out_batches(
    data: Data, held_out: Sequence[VideoIndex], *, clips: int, seed: int, batch_size: int
) -> Iterator[VideoBatch]:
    """At most `clips` clips, numbered from 0, decoded in this process; the last batch may be smaller.

    Files come in the order of a hash of (seed, name), each with its centre window; when there are more clips than
    files, each gives several windows, evenly spread and all different. With `data.on_bad_clip: skip` a file that
    cannot be decoded is passed over and named in `rejected` of the batch; with `error` it raises DataError.
    Raises DataError too when no clip at all can be decoded.
    """
    ready: list[Clip] = []
    for clip in _clips(data, windows(data, held_out, clips=clips, seed=seed), clips):
        ready.append(clip)
        if len(ready) == batch_size:
            yield collate(data, ready)
            ready = []
    if ready:
        yield collate(data, ready)


def windows(data: Data, held_out: Sequence[VideoIndex], *, clips: int, seed: int) -> list[tuple[VideoIndex, int]]:
    """File and start frame of every candidate window, best first: one round over all files, then the next."""
    if not held_out or clips < 1:
        return []
    files = sorted(held_out, key=lambda index: hashlib.sha256(f"{seed}:{clip_name(index, data)}".encode()).digest())
    rounds = -(-clips // len(files))
    chosen: dict[tuple[int, int], None] = {}
    for turn in range(rounds):
        for number, index in enumerate(files):
            starts = start_frames(index, num_frames=data.num_frames, fps=data.fps)
            chosen[number, int((turn + 0.5) / rounds * starts)] = None
    return [(files[number], start) for number, start in chosen]


def _clips(data: Data, candidates: Sequence[tuple[VideoIndex, int]], limit: int) -> Iterator[Clip]:
    made, rejected = 0, []
    for index, start in candidates:
        if made == limit:
            return
        try:
            pixels = read_clip(data, index, start_frame=start)
        except DataError as error:
            if data.on_bad_clip == "error":
                raise
            rejected.append(str(error))
            continue
        yield Clip(pixels, made, clip_name(index, data), tuple(rejected))
        made, rejected = made + 1, []
    if candidates and not made:
        raise DataError("no held-out clip can be decoded; check data.root:\n  " + "\n  ".join(dict.fromkeys(rejected)))
