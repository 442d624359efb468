"""Which frames of a file make a clip: cutting by time, so that every clip runs at the wanted frames per second."""

from __future__ import annotations

import numpy as np

from svdtune.data.index import VideoIndex
from svdtune.errors import DataError

_SLOWER = 0.99
"""A file may run this much below the wanted rate (29.97 for 30): in 25 frames none repeats yet."""


def latest_start(index: VideoIndex, *, num_frames: int, fps: float) -> float:
    """The last moment, in seconds from the first frame, where a clip still fits.

    Raises DataError when the file is too short, or runs so slowly that frames of the clip would repeat.
    """
    needed = (num_frames - 1) / fps
    if index.fps < fps * _SLOWER:
        raise DataError(
            f"{index.path}: runs at {index.fps:.2f} frames per second, below data.fps={fps:g}: frames would repeat. "
            f"Lower data.fps to {_round_down(index.fps)} or remove the file"
        )
    if index.duration + index.frame_seconds / 2 < needed:
        raise DataError(
            f"{index.path}: lasts {index.duration:.2f} s from first to last frame, shorter than a clip of "
            f"data.num_frames={num_frames} at data.fps={fps:g}, which needs {needed:.2f} s. "
            "Lower data.num_frames, raise data.fps or remove the file"
        )
    return max(index.duration - needed, 0.0)


def start_frames(index: VideoIndex, *, num_frames: int, fps: float) -> int:
    """How many frames of the file a clip can start at: numbers 0 up to this, exclusive. Raises as `latest_start`."""
    last = latest_start(index, num_frames=num_frames, fps=fps)
    return int(np.searchsorted(index.times, last + index.frame_seconds / 2, side="right"))


def window_frames(index: VideoIndex, *, num_frames: int, fps: float, start_seconds: float) -> list[int]:
    """Frame numbers on screen at `start_seconds + i / fps` for i below `num_frames` (seconds from the first frame).

    Half a usual frame interval of grace: rounded timestamps (1/1000 s in Matroska) then neither repeat nor skip a frame.
    """
    wanted = start_seconds + np.arange(num_frames) / fps + index.frame_seconds / 2
    if start_seconds < 0 or wanted[-1] - index.frame_seconds > index.duration + 1e-9:
        raise ValueError(f"{index.path}: no clip of {num_frames} frames at {fps} fps starts at {start_seconds} s")
    numbers = np.searchsorted(index.times, wanted - 1e-9, side="right") - 1
    return np.maximum(numbers, 0).tolist()


def repeated(index: VideoIndex, fps: float) -> float:
    """Share of the frames of the whole file, taken at `fps`, that are the frame before them again."""
    moments = np.arange(int(index.duration * fps) + 1) / fps + index.frame_seconds / 2
    numbers = np.searchsorted(index.times, moments - 1e-9, side="right")
    return float(np.mean(np.diff(numbers) == 0)) if len(moments) > 1 else 0.0


def _round_down(fps: float) -> str:
    return f"{np.floor(fps * 10 + 1e-6) / 10:g}"
