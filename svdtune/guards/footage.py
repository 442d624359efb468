"""Whether a clip as the loader gives it is what the file shows: its colours, and its frames in the order of time.

The file is decoded a second time here, by PyAV and nothing of ours, and compared as small pictures: where the footage is grey
or stands still it cannot tell, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from svdtune.config.schema import Data
from svdtune.contracts import VideoBatch
from svdtune.data.catalog import clip_name
from svdtune.data.dataset import ClipDataset, window_starts
from svdtune.data.index import VideoIndex
from svdtune.guards.findings import Finding

_SIDE = 32
"""Pixels a side of the small pictures."""
_AROUND = 1.0
"""Seconds decoded before and behind the clip."""
_COLOUR, _ORDER = 0.004, 0.0002
"""Mean differences, of a range of 2, that resizing and rounding leave: in one picture, and more in its place than in the nearest."""
_SHOWN = 8
_EPOCH = 200
"""Samples of an epoch that are looked at."""
_EPOCHS, _ORDERED = 4, 5
"""Four orders of five files are the same by chance once in 1.7 million."""
_SAME_BY_CHANCE = 8
"""Of so many moments 200 samples never all take one."""
_ROUNDING = 1e-6
"""Seconds."""
_OTHER = 0.04
"""A mean difference from which on these are other pictures."""


@dataclass(frozen=True)
class _Film:
    """What the file shows around the clip."""

    small: Tensor
    """(n, 3, 32, 32) in [-1, 1]."""
    times: np.ndarray
    """(n,) seconds."""


def check_footage(data: Data, files: Sequence[VideoIndex], seed: int, batch: VideoBatch) -> list[Finding]:
    """SEM520: other colours than the file's. SEM521: frames out of order, repeated, or at another rate than data.fps."""
    dataset = ClipDataset(data, tuple(files), seed)
    for name, sample, pixels in zip(batch.names, batch.sample.tolist(), batch.pixels, strict=True):
        if found := _check_clip(dataset, name, sample, pixels):
            return found  # the other clips would say the same
    return _check_epochs(dataset)


def _check_epochs(dataset: ClipDataset) -> list[Finding]:
    """SEM522: each file once in an epoch, in another order in the next, and from changing moments on."""
    count = min(len(dataset.files), _EPOCH)
    orders = [[dataset.file_of(epoch * len(dataset.files) + i).path for i in range(count)] for epoch in range(_EPOCHS)]
    told = "" if all(len(set(order)) == count for order in orders) else "a file comes twice in an epoch"
    if not told and count >= _ORDERED and all(order == orders[0] for order in orders):
        told = f"{_EPOCHS} epochs have the same order"
    starts = {dataset.window_of(dataset.files[0], sample)[0] for sample in range(_EPOCH)}
    possible = len(window_starts(dataset.data, dataset.files[0]))
    if not told and possible > _SAME_BY_CHANCE and len(starts) == 1:
        told = f"every clip of a file starts at frame {starts.pop()}, one of {possible} that it could start at"
    if not told:
        return []
    why = "Part of the footage would be learned by heart, and part never be seen."
    return [Finding("SEM522", "error", "data.root", told, "every file once in an epoch, in a new order, from any moment on", why,
                    "Mend svdtune/data/dataset.py.")]  # fmt: skip


def _check_clip(dataset: ClipDataset, name: str, sample: int, pixels: Tensor) -> list[Finding]:
    """One clip (t, 3, h, w). A replacement for a damaged file and a rotated file are held against nothing."""
    data = dataset.data
    index = dataset.file_of(sample)
    if clip_name(index, data) != name or not index.orientation.upright:
        return []
    start, flip = dataset.window_of(index, sample)
    begin = float(index.times[start])
    clip = _small(pixels.float())
    film = _film(index, data, begin - _AROUND, begin + (data.num_frames - 1) / data.fps + _AROUND)
    return _compare(name, data.fps, index.frame_seconds / 2, clip.flip(-1) if flip else clip, film) if film else []


def _film(index: VideoIndex, data: Data, begin: float, end: float) -> _Film | None:
    import av

    small, times = [], []
    first = float(index.pts[0] * index.time_base)
    with av.open(str(index.path)) as container:
        stream = container.streams.video[0]
        container.seek(max(int((first + begin) / index.time_base), 0), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is None or (seconds := float(frame.pts * index.time_base) - first) < begin:
                continue
            if seconds > end:
                break
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 127.5 - 1
            small.append(_small(_fitted(picture[None], data, index.pixel_aspect))[0])
            times.append(seconds)
    return _Film(torch.stack(small), np.array(times)) if len(small) > 1 else None


def _fitted(pictures: Tensor, data: Data, pixel_aspect: float) -> Tensor:
    """The part of pictures (n, 3, h, w) that the frame shows, borders where it has some."""
    h, w = pictures.shape[2:]
    if data.resize != "squash":
        wanted = data.width / data.height / pixel_aspect  # in stored pixels
        smaller = data.resize == "cover"
        across, down = (round(h * wanted), h) if (w / h > wanted) == smaller else (w, round(w / wanted))
        left, top = (across - w) // 2, (down - h) // 2
        pictures = F.pad(pictures, (left, across - w - left, top, down - h - top), value=-1.0)
    return pictures


def _small(pictures: Tensor) -> Tensor:
    """(n, 3, 32, 32) of pictures (n, 3, h, w)."""
    return F.interpolate(pictures, size=(_SIDE, _SIDE), mode="area")


def _compare(name: str, fps: float, grace: float, clip: Tensor, film: _Film) -> list[Finding]:
    """`grace`: half a frame of the file, in seconds."""
    plain, swapped = _apart(clip, film.small), _apart(clip.flip(1), film.small)
    right, free = _in_order(plain, film.times, fps, grace), float(plain.min(1).values.mean())
    if right > _COLOUR and _in_order(swapped, film.times, fps, grace) < right / 2:
        return [_colours(name, "blue and red are swapped: the clip equals the file with its channels in the order BGR")]
    # Coarser: where all is fine detail, as in noise, two ways of resizing differ in single small pixels.
    coarse = float(_apart(F.avg_pool2d(clip, 4), F.avg_pool2d(film.small, 4)).min(1).values.mean())
    if coarse > _OTHER:
        return [_colours(name, f"pixels differ from the file's by {coarse / 2:.0%} of the range on average")]
    fits = 1.2 * free + _ORDER
    if right <= fits:
        return []
    turned = _in_order(plain.flip(0), film.times, fps, grace) <= fits
    seen = [film.times[number] for number in plain.argmin(1).tolist()]
    seconds = ", ".join(f"{moment - min(seen):.2f}" for moment in seen[:_SHOWN]) + (
        ", ..." if len(seen) > _SHOWN else ""
    )
    got = f"frames {'in reverse order' if turned else 'not in order, or not evenly spaced'}: they show the file at {seconds} s"
    why = "The model learns motion from the order of frames, and is told fps - 1 of it."
    fix = "Mend how frames are chosen and read (svdtune/data/clips.py, readers.py)."
    return [
        Finding("SEM521", "error", name, got, f"one frame each {1 / fps:.3g} s, as data.fps={fps:g} says", why, fix)
    ]


def _colours(name: str, got: str) -> Finding:
    why = "VAE and CLIP were trained on RGB: skin turns blue in every video, and nothing else tells."
    fix = "Mend how pictures are read and scaled (svdtune/data/readers.py, transform.py)."
    return Finding("SEM520", "error", name, got, "RGB in [-1, 1], as the file shows it", why, fix)


def _apart(clip: Tensor, film: Tensor) -> Tensor:
    """(t, n): mean difference of each frame of the clip from each of the file."""
    return (clip[:, None] - film[None]).abs().flatten(2).mean(2)


def _in_order(apart: Tensor, times: np.ndarray, fps: float, grace: float) -> float:
    """The mean difference where the clip fits best: frame i is what is on screen at start + i / fps, half a frame of grace."""
    t, n = apart.shape
    starts = times[times + (t - 1) / fps <= times[-1] + grace + _ROUNDING]
    costs = []
    for rounding in (-_ROUNDING, _ROUNDING):
        wanted = starts[:, None] + np.arange(t) / fps + grace + rounding
        at = np.clip(np.searchsorted(times, wanted, side="right") - 1, 0, n - 1)
        costs += apart[torch.arange(t), torch.from_numpy(at)].mean(1).tolist()
    return min(costs, default=float("inf"))
