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
from svdtune.data.dataset import ClipDataset
from svdtune.data.index import VideoIndex
from svdtune.guards.findings import Finding

_SIDE = 32
"""Pixels a side of the small pictures."""
_AROUND = 1.0
"""Seconds decoded before and behind the clip."""
_COLOUR, _ORDER = 0.004, 0.0002
"""Mean differences, of a range of 2, that resizing and rounding leave: in one picture, and more in its place than in the nearest."""
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
    name, sample = batch.names[0], int(batch.sample[0])
    dataset = ClipDataset(data, tuple(files), seed)
    index = next((file for file in files if clip_name(file, data) == name), None)
    if index is None or not index.orientation.upright or index is not dataset.file_of(sample):
        return []  # a replacement for a damaged clip, or a rotated file: nothing to hold it against
    start, flip = dataset.window_of(index, sample)
    begin = float(index.times[start])
    film = _film(index, data, begin - _AROUND, begin + (data.num_frames - 1) / data.fps + _AROUND)
    if film is None:
        return []
    clip = _small(batch.pixels[0].float(), data, same_shape=True)
    return _compare(name, data.fps, clip.flip(-1) if flip else clip, film)


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
            small.append(_small(picture[None], data, pixel_aspect=index.pixel_aspect)[0])
            times.append(seconds)
    return _Film(torch.stack(small), np.array(times)) if len(small) > 1 else None


def _small(pictures: Tensor, data: Data, *, same_shape: bool = False, pixel_aspect: float = 1.0) -> Tensor:
    """(n, 3, 32, 32) of pictures (n, 3, h, w): the part that the frame shows, borders where it has some."""
    h, w = pictures.shape[2:]
    if not same_shape and data.resize != "squash":
        wanted = data.width / data.height / pixel_aspect  # in stored pixels
        smaller = data.resize == "cover"
        across, down = (round(h * wanted), h) if (w / h > wanted) == smaller else (w, round(w / wanted))
        left, top = (across - w) // 2, (down - h) // 2
        pictures = F.pad(pictures, (left, across - w - left, top, down - h - top), value=-1.0)
    return F.interpolate(pictures, size=(_SIDE, _SIDE), mode="area")


def _compare(name: str, fps: float, clip: Tensor, film: _Film) -> list[Finding]:
    plain, swapped = _apart(clip, film.small), _apart(clip.flip(1), film.small)
    right, free = _in_order(plain, film.times, fps), float(plain.min(1).values.mean())
    bgr = _in_order(swapped, film.times, fps)
    if right > _COLOUR and bgr < right / 2:
        return [_colours(name, "blue and red are swapped: the clip equals the file with its channels in the order BGR")]
    if free > _OTHER:
        return [_colours(name, f"pixels differ from the file's by {free / 2:.0%} of the range on average")]
    if right <= 1.2 * free + _ORDER:
        return []
    numbers = plain.argmin(1).tolist()
    got = "the frames are " + (
        "in reverse order"
        if _in_order(plain.flip(0), film.times, fps) <= 1.2 * free + _ORDER
        else "not evenly spaced, or not in order"
    )
    seconds = ", ".join(f"{film.times[number] - film.times[min(numbers)]:.2f}" for number in numbers[:8])
    return [Finding("SEM521", "error", name, f"{got}: they show the file at {seconds}{', ...' if len(numbers) > 8 else ''} s",
                    f"one frame each {1 / fps:.3g} s, as data.fps={fps:g} says",
                    "The model learns motion from the order of frames, and is told "
                    "fps - 1 of it.", "Mend how frames are chosen and read (svdtune/data/clips.py, readers.py).")]  # fmt: skip


def _colours(name: str, got: str) -> Finding:
    return Finding("SEM520", "error", name, got, "RGB in [-1, 1], as the file shows it",
        "VAE and CLIP were trained on RGB: skin turns blue in "
                   "every video, and nothing else tells.", "Mend how pictures are read and scaled (svdtune/data/readers.py, "
                   "transform.py).")  # fmt: skip


def _apart(clip: Tensor, film: Tensor) -> Tensor:
    """(t, n): mean difference of each frame of the clip from each of the file."""
    return (clip[:, None] - film[None]).abs().flatten(2).mean(2)


def _in_order(apart: Tensor, times: np.ndarray, fps: float) -> float:
    """The mean difference where the clip fits best, frame i at start + i / fps, one frame of the file aside at most."""
    t, n = apart.shape
    near = torch.stack([apart.roll(shift, 1) for shift in (-1, 0, 1)]).amin(0)
    near[:, 0], near[:, -1] = apart[:, :2].amin(1), apart[:, -2:].amin(1)
    starts = times[times + (t - 1) / fps <= times[-1] + 1 / fps]
    at = np.clip(np.searchsorted(times, starts[:, None] + np.arange(t) / fps + 1e-6, side="right") - 1, 0, n - 1)
    costs = near[torch.arange(t), torch.from_numpy(at)].mean(1)
    return float(costs.min()) if len(costs) else float("inf")
