"""Cutting by time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from svdtune.data.clips import latest_start, repeated, start_frames, window_frames
from svdtune.data.index import Orientation, VideoIndex
from svdtune.errors import DataError


def index_of(seconds: list[float] | np.ndarray, *, ticks: int = 90000) -> VideoIndex:
    pts = np.rint(np.asarray(seconds) * ticks).astype(np.int64)
    return VideoIndex(
        path=Path("a.mp4"),
        pts=pts,
        keyframe_pts=pts[:1],
        time_base=Fraction(1, ticks),
        width=64,
        height=48,
        pixel_aspect=1.0,
        orientation=Orientation(),
        has_edit_list=False,
        has_leading_pictures=False,
        interlaced=False,
        container="mp4",
        codec="h264",
        pixel_format="yuv420p",
        colorspace=2,
    )


def cfr(frames: int, fps: float, **options: int) -> VideoIndex:
    return index_of(np.arange(frames) / fps + 1.48, **options)


def test_30_fps_cut_at_7() -> None:
    window = window_frames(cfr(100, 30), num_frames=8, fps=7, start_seconds=0)
    assert window == [0, 4, 9, 13, 17, 21, 26, 30]


@pytest.mark.parametrize("ticks", [1000, 12800, 90000])
@pytest.mark.parametrize("rate", [24, 25, 30, 60, 30000 / 1001])
def test_own_rate_gives_every_frame_once(ticks: int, rate: float) -> None:
    index = cfr(200, rate, ticks=ticks)
    for start in (0, 1, 77, 199 - 24):
        window = window_frames(index, num_frames=25, fps=rate, start_seconds=float(index.times[start]))
        assert window == list(range(start, start + 25))


def test_29_97_counts_as_30() -> None:
    assert window_frames(cfr(100, 30000 / 1001), num_frames=25, fps=30, start_seconds=0) == list(range(25))


def test_variable_rate_is_cut_by_time_not_by_number() -> None:
    index = index_of([0, 0.1, 0.2, 0.3, 0.4, 1.0, 1.1, 1.2, 1.3, 1.4])
    assert window_frames(index, num_frames=6, fps=5, start_seconds=0) == [0, 2, 4, 4, 4, 5]


def test_latest_start_and_number_of_starts() -> None:
    index = cfr(30, 10)
    assert latest_start(index, num_frames=11, fps=5) == pytest.approx(0.9)
    assert start_frames(index, num_frames=11, fps=5) == 10
    last = window_frames(index, num_frames=11, fps=5, start_seconds=float(index.times[9]))
    assert last == list(range(9, 30, 2))


def test_exact_fit_has_one_start() -> None:
    assert start_frames(cfr(25, 7, ticks=1000), num_frames=25, fps=7) == 1


def test_too_short_says_how_much_is_needed() -> None:
    with pytest.raises(DataError) as caught:
        latest_start(cfr(30, 10), num_frames=25, fps=7)
    assert str(caught.value) == (
        "a.mp4: lasts 2.90 s from first to last frame, shorter than a clip of data.num_frames=25 at data.fps=7, "
        "which needs 3.43 s. Lower data.num_frames, raise data.fps or remove the file"
    )


def test_too_slow_would_repeat_frames() -> None:
    with pytest.raises(DataError) as caught:
        latest_start(cfr(300, 5), num_frames=25, fps=7)
    assert str(caught.value) == (
        "a.mp4: runs at 5.00 frames per second, below data.fps=7: frames would repeat. "
        "Lower data.fps to 5 or remove the file"
    )


def test_window_outside_the_file_is_a_programming_error() -> None:
    for start in (-0.1, 2.5):
        with pytest.raises(ValueError, match="no clip of 11 frames"):
            window_frames(cfr(30, 10), num_frames=11, fps=5, start_seconds=start)


def test_a_gap_keeps_a_frame_on_screen() -> None:
    """As in recordings of a screen: 13 frames a second on average, none for half of each second."""
    stalling = index_of([tick / 24 for tick in range(96) if tick % 24 < 12])
    assert repeated(stalling, 8) == pytest.approx(3 * 3 / 27)
    assert repeated(cfr(96, 24), 8) == 0


@pytest.mark.parametrize("rate", [24, 25, 30, 30000 / 1001])
def test_no_frame_of_a_steady_file_stays(rate: float) -> None:
    assert max(repeated(cfr(300, rate, ticks=1000), fps) for fps in (6, 7, rate, 30 if rate > 29 else rate)) < 0.02
