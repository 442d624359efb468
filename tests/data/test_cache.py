"""The cache of indexes: what it saves, when it must not be believed, and that nothing depends on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from svdtune.config.schema import Data
from svdtune.data import cache, catalog
from svdtune.data.cache import cache_folder
from svdtune.data.catalog import index_files, scan
from svdtune.data.index import VideoIndex, index_video
from svdtune.errors import DataError

ASSETS = Path(__file__).parents[1] / "assets" / "video"
Video = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, video: Video, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files that are an hour old, and a cache of their own."""
    monkeypatch.setenv("SVDTUNE_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        age(video(f"clips/{number}.mp4", frames=10 + number))
    return tmp_path / "clips"


def age(path: Path, seconds: float = 3600) -> Path:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are really read."""
    read: list[str] = []

    def counted(path: Path) -> VideoIndex:
        read.append(path.name)
        return index_video(path)

    monkeypatch.setattr(catalog, "index_video", counted)
    return read


def look(folder: Path) -> list[VideoIndex | DataError]:
    return index_files(folder, sorted(folder.iterdir()))


def same(one: object, other: object) -> bool:
    values = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(VideoIndex)]
    return all(np.array_equal(a, b) and type(a) is type(b) for a, b in values)


def test_files_are_read_once(folder: Path, reads: list[str]) -> None:
    look(folder)
    assert reads == ["0.mp4", "1.mp4", "2.mp4"]
    look(folder)
    scan(Data(root=str(folder), num_frames=3, fps=5))
    assert reads == ["0.mp4", "1.mp4", "2.mp4"]


@pytest.mark.parametrize("source", sorted(ASSETS.iterdir()), ids=lambda path: path.name)
def test_what_comes_back_is_what_was_read(source: Path, folder: Path, reads: list[str]) -> None:
    path = folder / source.name
    path.write_bytes(source.read_bytes())
    age(path)
    look(folder)
    reads.clear()
    found = next(index for index in look(folder) if isinstance(index, VideoIndex) and index.path == path)
    assert reads == []
    assert same(found, index_video(path))
    assert np.array_equal(found.times, index_video(path).times)


def test_a_changed_file_is_read_again(folder: Path, reads: list[str]) -> None:
    look(folder)
    reads.clear()
    (folder / "0.mp4").write_bytes((folder / "2.mp4").read_bytes())
    age(folder / "0.mp4", 60)
    found = look(folder)
    assert reads == ["0.mp4"]
    assert [len(index) for index in found if isinstance(index, VideoIndex)] == [12, 11, 12]


def test_a_file_swapped_for_one_of_the_same_size_and_time_is_read_again(folder: Path, reads: list[str]) -> None:
    look(folder)
    reads.clear()
    old = (folder / "0.mp4").stat()
    copy = folder / ".copy"
    copy.write_bytes((folder / "0.mp4").read_bytes())
    os.utime(copy, ns=(old.st_atime_ns, old.st_mtime_ns))
    copy.replace(folder / "0.mp4")
    look(folder)
    assert reads == ["0.mp4"]


def test_a_fresh_file_is_not_trusted(folder: Path, reads: list[str], video: Video) -> None:
    """Written again within a tick of the clock, it could have the same identity and another content."""
    video("clips/fresh.mp4")
    look(folder)
    reads.clear()
    look(folder)
    assert reads == ["fresh.mp4"]


def test_failures_are_tried_again(folder: Path, reads: list[str]) -> None:
    (folder / "text.mp4").write_text("no video")
    age(folder / "text.mp4")
    look(folder)
    reads.clear()
    assert isinstance(look(folder)[-1], DataError)
    assert reads == ["text.mp4"]


@pytest.mark.parametrize("damage", [b"", b"garbage", "cut", "flip", "object"], ids=str)
def test_a_broken_cache_is_made_again(damage: bytes | str, folder: Path, reads: list[str]) -> None:
    look(folder)
    (file,) = (cache_folder() / "index").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "object":
        np.savez(file, head=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        position = content.index(b"identity")
        content[position + 14] ^= 1
        file.write_bytes(content)
    else:
        assert isinstance(damage, bytes)
        file.write_bytes(damage)
    reads.clear()
    found = look(folder)
    assert reads == ["0.mp4", "1.mp4", "2.mp4"]
    assert [len(index) for index in found if isinstance(index, VideoIndex)] == [10, 11, 12]
    reads.clear()
    look(folder)
    assert reads == []


def test_another_version_reads_anew(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    look(folder)
    reads.clear()
    monkeypatch.setattr(cache, "_VERSION", 10**6)
    look(folder)
    assert len(reads) == 3


def test_a_cache_that_cannot_be_written_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "file").touch()
    monkeypatch.setenv("SVDTUNE_CACHE", str(folder.parent / "file"))
    assert [len(index) for index in look(folder) if isinstance(index, VideoIndex)] == [10, 11, 12]


def test_a_sample_adds_to_what_is_known(folder: Path, reads: list[str]) -> None:
    paths = sorted(folder.iterdir())
    index_files(folder, paths, paths[:1])
    index_files(folder, paths, paths[1:])
    look(folder)
    assert reads == ["0.mp4", "1.mp4", "2.mp4"]


def test_deleted_files_are_forgotten(folder: Path) -> None:
    look(folder)
    (folder / "0.mp4").unlink()
    age(folder / "1.mp4", 10)
    look(folder)
    (file,) = (cache_folder() / "index").iterdir()
    assert b"0.mp4" not in file.read_bytes()


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SVDTUNE_CACHE", "~/mine")
    assert cache_folder() == Path("/home/somebody/mine")
    monkeypatch.delenv("SVDTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/svdtune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/somebody/.cache/svdtune")
