"""The contact sheet: its size, which frames it shows, and that they are those frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdtune.sample.sheet import _choose, _lay_out, contact_sheet


def flat(values: list[int], height: int = 64, width: int = 96) -> np.ndarray:
    """One grey per frame."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), height, width, 3)).copy()


def cells(path: Path, row_top: int, size: tuple[int, int], count: int) -> list[int]:
    """The grey in the middle of each cell of the row whose pictures start at `row_top`."""
    sheet = np.asarray(Image.open(path))
    width, height = size
    return [int(sheet[row_top + height // 2, 24 + i * (width + 8) + width // 2, 0]) for i in range(count)]


def test_small_frames_grow_by_a_whole_factor(tmp_path: Path) -> None:
    values = [10, 40, 70, 100, 130, 160, 190, 220]
    frames = flat(values)
    frames[0, 0, 0] = 255
    contact_sheet(tmp_path / "new" / "a.png", [("First frame", frames[:1]), ("Base", frames), ("Truth", frames[::-1])])
    with Image.open(tmp_path / "new" / "a.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 8 * 192 + 7 * 8 + 2 * 24
        pixels = np.asarray(sheet)
    top = 24 + 38
    assert pixels[top : top + 2, 24:26].min() == 255  # the one white pixel is two by two
    assert pixels[top : top + 3, 26:28].max() == 10
    row = 38 + 128 + 24 + 28
    assert cells(tmp_path / "new" / "a.png", top, (192, 128), 1) == [10]
    assert cells(tmp_path / "new" / "a.png", top + row, (192, 128), 8) == values
    assert cells(tmp_path / "new" / "a.png", top + 2 * row, (192, 128), 8) == values[::-1]
    assert (pixels[top + row : top + row + 128, 24 + 192 : 24 + 200] == 250).all(axis=(0, 1))[:2].all()  # paper between
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_large_frames_shrink(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "a.png", [("Base", flat(list(range(0, 250, 10)), 576, 1024))])
    with Image.open(tmp_path / "a.png") as sheet:
        assert 1580 <= sheet.width <= 1600
    chosen = [0, 3, 7, 10, 14, 17, 21, 24]
    assert cells(tmp_path / "a.png", 24 + 38, (187, 105), 8) == [10 * index for index in chosen]


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (2, [0, 1]), (8, list(range(8))), (14, [0, 2, 4, 6, 7, 9, 11, 13])]
)
def test_frames_are_spread_from_first_to_last(count: int, chosen: list[int]) -> None:
    assert _choose(count, 8) == chosen
    assert _lay_out("Base", flat([0] * count), 8).numbers == [index + 1 for index in chosen]


def test_title_and_numbers_are_drawn(tmp_path: Path) -> None:
    frames = flat([0, 0])
    contact_sheet(tmp_path / "a.png", [("Base", frames)])
    contact_sheet(tmp_path / "b.png", [("Truth", frames)])
    first, second = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    assert np.abs(first[24:60] - second[24:60]).sum() > 1000
    assert (first[-48:-24] < 200).sum() > 20


def test_wrong_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows: got none"):
        contact_sheet(tmp_path / "a.png", [])
    with pytest.raises(ValueError, match=r"row 'Base': got float64 \(2, 64, 96, 3\), expected uint8"):
        contact_sheet(tmp_path / "a.png", [("Base", flat([0, 0]).astype(float))])
