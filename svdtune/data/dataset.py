"""Global sample number to clip: a pure function of (seed, sample), whatever the worker, rank or order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from svdtune.config.schema import Data
from svdtune.data.catalog import clip_name
from svdtune.data.clips import start_frames, window_frames
from svdtune.data.index import VideoIndex
from svdtune.data.readers import open_reader
from svdtune.data.transform import to_pixels
from svdtune.errors import DataError

_ORDER, _WINDOW, _REPLACEMENT = 1, 2, 3
"""Keys that keep the three kinds of draws apart."""
ATTEMPTS = 8
"""Files tried for one sample before giving up."""


@dataclass(frozen=True)
class Clip:
    """One training clip."""

    pixels: Tensor
    """(t, 3, h, w) float32 in [-1, 1], contiguous."""
    sample: int
    name: str
    """The file, relative to data.root."""
    rejected: tuple[str, ...] = ()
    """Why files tried before this one could not be decoded."""


@dataclass(frozen=True)
class ClipDataset:
    """Maps any global sample number to its clip; epoch = sample // number of files."""

    data: Data
    files: Sequence[VideoIndex]
    seed: int

    def __getitem__(self, sample: int) -> Clip:
        """The clip of one sample.

        A file that cannot be decoded is replaced by another one, keyed by (seed, sample, attempt), when
        `data.on_bad_clip` is `skip`. Raises DataError when it is `error`, or when 8 files in a row fail.
        """
        rejected: list[str] = []
        for attempt in range(ATTEMPTS):
            index = self.file_of(sample, attempt)
            try:
                pixels = self._cut(index, sample, attempt)
            except DataError as error:
                if self.data.on_bad_clip == "error":
                    raise
                rejected.append(str(error))
                continue
            return Clip(pixels, sample, clip_name(index, self.data), tuple(rejected))
        reasons = "\n  ".join(dict.fromkeys(rejected))
        raise DataError(f"sample {sample}: none of {ATTEMPTS} files could be decoded; check data.root:\n  {reasons}")

    def file_of(self, sample: int, attempt: int = 0) -> VideoIndex:
        """The file a sample is cut from: its place in the epoch's permutation, or a replacement draw."""
        return self.files[file_number(self.seed, len(self.files), sample, attempt)]

    def name_of(self, sample: int) -> str:
        """The file a sample should come from, for messages."""
        return str(self.file_of(sample).path)

    def window_of(self, index: VideoIndex, sample: int, attempt: int = 0) -> tuple[int, bool]:
        """The frame number a sample starts at, and whether it is mirrored."""
        starts = window_starts(self.data, index)
        number, mirrored = window_number(self.seed, len(starts), sample, attempt)
        return starts[number], mirrored and self.data.flip

    def _cut(self, index: VideoIndex, sample: int, attempt: int) -> Tensor:
        start, flip = self.window_of(index, sample, attempt)
        return read_clip(self.data, index, start_frame=start, flip=flip)


def window_starts(data: Data, index: VideoIndex) -> Sequence[int]:
    """The frame numbers that training clips of a file begin at: all, or the `data.windows` that lie evenly spread."""
    starts = start_frames(index, num_frames=data.num_frames, fps=data.fps)
    if data.windows is None or data.windows >= starts:
        return range(starts)
    return [int((number + 0.5) / data.windows * starts) for number in range(data.windows)]


def file_number(seed: int, files: int, sample: int, attempt: int = 0) -> int:
    """Which of so many files a sample is cut from."""
    if attempt:
        return int(_rng(seed, _REPLACEMENT, sample, attempt).integers(files))
    epoch, position = divmod(sample, files)
    return int(_order(seed, epoch, files)[position])


def window_number(seed: int, starts: int, sample: int, attempt: int = 0) -> tuple[int, bool]:
    """Which of so many starts of its file, and whether it is mirrored where data.flip allows it."""
    rng = _rng(seed, _WINDOW, sample, attempt)
    number = int(rng.integers(starts))
    return number, bool(rng.random() < 0.5)


def read_clip(data: Data, index: VideoIndex, *, start_frame: int, flip: bool = False) -> Tensor:
    """Decode and resize one clip: float32 (t, 3, h, w). Raises DataError when a frame cannot be decoded."""
    numbers = window_frames(
        index, num_frames=data.num_frames, fps=data.fps, start_seconds=float(index.times[start_frame])
    )
    with closing(open_reader(index, data.decoder)) as reader:
        frames = reader.read(numbers)
    return to_pixels(
        frames,
        height=data.height,
        width=data.width,
        resize=data.resize,
        flip=flip,
        pixel_aspect=index.pixel_aspect,
    )


def _rng(seed: int, purpose: int, first: int, second: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, purpose, first, second))))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return _rng(seed, _ORDER, epoch).permutation(count)
