"""Finding files, the held-out split, and what happens to bad ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from svdtune.config.schema import Data
from svdtune.data.catalog import SUFFIXES, clip_name, find_videos, scan, split
from svdtune.data.children import map_files
from svdtune.errors import DataError

Video = Callable[..., Path]


def data(root: Path, **options: object) -> Data:
    return Data(**{"root": str(root), "num_frames": 5, "fps": 5, "height": 32, "width": 48, "workers": 0} | options)


def test_no_such_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    root = tmp_path / "clisp"
    with pytest.raises(DataError) as caught:
        find_videos(root)
    assert str(caught.value) == (
        f"data.root: no such folder: {root} (looked in {root}). Did you mean {tmp_path / 'clips'}?"
    )


def test_no_such_folder_names_no_far_one(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    root = tmp_path / "clips"
    with pytest.raises(DataError) as caught:
        find_videos(root)
    assert str(caught.value) == f"data.root: no such folder: {root} (looked in {root})."


def test_tilde_is_the_home_folder(tmp_path: Path, video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = video("clips/a/b.mp4", frames=20)
    options = data(Path("~/clips"))
    (index,) = scan(options).train
    assert index.path == path
    assert clip_name(index, options) == "a/b.mp4"


def test_file_instead_of_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    with pytest.raises(DataError) as caught:
        find_videos(path)
    assert str(caught.value) == f"data.root: {path} is a file; expected a folder of video files: data.root={tmp_path}"


def test_no_videos_in_it_says_what_is(tmp_path: Path) -> None:
    for name in ("a.gif", "b.gif", "c.txt", ".hidden.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        find_videos(tmp_path)
    assert str(caught.value) == (
        f"data.root: no videos in {tmp_path} (it and the folders inside hold 2 .gif, 1 .txt; links to folders are not followed). "
        f"Wanted: {' '.join(SUFFIXES)}"
    )


def test_links_that_lead_nowhere_and_variables_of_the_shell(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to(tmp_path / "gone.mp4")
    with pytest.raises(DataError, match="hold 1 links that lead nowhere;"):
        find_videos(tmp_path)
    with pytest.raises(DataError, match=r"not expanded in YAML: write ~, or \$\{oc\.env:HOME\}"):
        find_videos("$HOME/clips")


def test_finds_recursively_sorted_without_hidden(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/z.MKV", "a/.git/x.mp4", ".cache/y.mp4", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in find_videos(tmp_path)] == ["a/z.MKV", "b.mp4"]


def test_bad_file_is_left_out_with_its_reason(tmp_path: Path, video: Video) -> None:
    good = [video(f"good{i}.mp4", frames=20) for i in range(2)]
    (tmp_path / "text.mp4").write_text("no video")
    video("short.mp4", frames=4)
    catalog = scan(data(tmp_path))
    assert sorted(i.path for i in catalog.train + catalog.held_out) == good
    assert [item.path.name for item in catalog.rejected] == ["short.mp4", "text.mp4"]
    assert "lasts 0.30 s" in catalog.rejected[0].reason
    assert "is a text file" in catalog.rejected[1].reason


def test_bad_file_stops_when_asked(tmp_path: Path, video: Video) -> None:
    video("good.mp4", frames=20)
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(DataError) as caught:
        scan(data(tmp_path, on_bad_clip="error"))
    assert str(caught.value) == (
        f"{path}: is a text file, not a video (it starts with 'no video'). (data.on_bad_clip=skip would leave it out)"
    )


def test_nothing_usable_lists_the_reasons(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.mp4").write_text("no video")
    with pytest.raises(DataError) as caught:
        scan(data(tmp_path))
    assert str(caught.value).splitlines() == [
        f"data.root: none of the 12 file(s) in {tmp_path} can be used:",
        f"  {tmp_path / '00.mp4'}: is a text file, not a video (it starts with 'no video')",
        "    and 11 more like it: 01.mp4, 02.mp4, 03.mp4, ...",
    ]


def test_nothing_usable_lists_reasons_that_differ_in_numbers_once(tmp_path: Path, video: Video) -> None:
    for frames in (3, 4):
        video(f"{frames}.mp4", frames=frames)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DataError) as caught:
        scan(data(tmp_path))
    _, first, alike, other = str(caught.value).splitlines()
    assert first.startswith(f"  {tmp_path / '3.mp4'}: lasts 0.20 s")
    assert alike == "    and 1 more like it: 4.mp4"
    assert other == f"  {tmp_path / 'empty.mp4'}: is empty (0 bytes); copy it again"


def test_nothing_usable_lists_ten_kinds_of_reasons(tmp_path: Path) -> None:
    for letter in "abcdefghijkl":
        (tmp_path / f"{letter}.mp4").write_text(letter)
    with pytest.raises(DataError) as caught:
        scan(data(tmp_path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  ... and 2 more"


def test_many_files_are_indexed_in_children(tmp_path: Path, video: Video) -> None:
    content = video(frames=20).read_bytes()
    for i in range(80):
        (tmp_path / f"{i:03}.mp4").write_bytes(content)
    (tmp_path / "text.mp4").write_text("no video")
    catalog = scan(data(tmp_path))
    assert len(catalog.train) + len(catalog.held_out) == 81
    assert [item.path.name for item in catalog.rejected] == ["text.mp4"]
    assert all(len(index) == 20 for index in catalog.train)


def slow_or_crashing(path: Path) -> str:
    if path.name == "hangs":
        time.sleep(1000)
    if path.name == "crashes":
        import os

        os._exit(11)
    return path.name


def test_children_that_hang_or_crash_are_named_and_the_rest_goes_on() -> None:
    paths = [Path(name) for name in ("a", "hangs", "b", "crashes", "c")]
    start = time.monotonic()
    a, hung, b, crashed, c = map_files(slow_or_crashing, paths, processes=2, seconds=8)
    assert time.monotonic() - start < 60
    assert (a, b, c) == ("a", "b", "c")
    assert str(hung) == "hangs: reading it takes over 8 s; remove it"
    assert str(crashed) == "crashes: crashes the program that reads it; remove it"


NAMES = [f"clip{i:03}.mp4" for i in range(200)]


def held_out_names(names: list[str], holdout: float) -> set[str]:
    return {names[i] for i in split(names, holdout)[1]}


def test_split_is_about_the_share_asked_for() -> None:
    train, held_out = split(NAMES, 0.1)
    assert sorted(train + held_out) == list(range(200))
    assert 10 <= len(held_out) <= 30
    assert split(NAMES, 0.0) == (list(range(200)), [])


def test_adding_files_moves_no_file_between_the_sides() -> None:
    before = held_out_names(NAMES[:60], 0.1)
    after = held_out_names(NAMES, 0.1)
    assert before
    assert after & set(NAMES[:60]) == before


def test_adding_files_never_takes_a_training_file_for_validation() -> None:
    for count in range(2, 60):
        assert not (set(NAMES[:count]) - held_out_names(NAMES[:count], 0.05)) & held_out_names(NAMES[: count + 1], 0.05)


@pytest.mark.parametrize("holdout", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_both_sides_have_a_file(holdout: float, count: int) -> None:
    train, held_out = split(NAMES[:count], holdout)
    assert train
    assert held_out


def test_a_single_file_trains() -> None:
    assert split(["a.mp4"], 0.9) == ([0], [])
