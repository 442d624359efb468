"""Videos beside each other: the grid, its limits and its labels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from svdtune.sample.sheet import drawable
from svdtune.sample.side_by_side import _cut, _Grid, side_by_side


def flat(value: int, height: int, width: int) -> np.ndarray:
    """A grey that grows by one from frame to frame."""
    return np.stack([np.full((height, width, 3), value + frame, np.uint8) for frame in range(3)])


@pytest.mark.parametrize(
    ("count", "height", "width", "cell", "columns"),
    [
        (2, 576, 1024, (1024, 576), 2),
        (4, 576, 1024, (943, 530), 4),
        (6, 64, 96, (384, 256), 4),
        (3, 320, 320, (320, 320), 3),
        (3, 201, 321, (321, 201), 3),
    ],
)
def test_every_video_stands_in_its_cell(
    count: int, height: int, width: int, cell: tuple[int, int], columns: int
) -> None:
    made = side_by_side([(f"model {index}", flat(20 * index, height, width)) for index in range(count)])
    grid = _Grid(count, height, width)
    assert (grid.cell, grid.columns) == (cell, columns)
    assert made.shape == (3, grid.size[1], grid.size[0], 3)
    assert made.shape[1] % 2 == made.shape[2] % 2 == 0
    assert made.shape[2] <= 3840
    for index, (left, top) in enumerate(grid.corners):
        top += grid.label
        for frame in range(3):
            assert (made[frame, top : top + cell[1], left : left + cell[0]] == 20 * index + frame).all()
    assert len(set(grid.corners)) == count
    assert (made[:, :16] == (250, 250, 248)).all()


def test_labels_are_cut_in_the_middle_and_do_not_touch() -> None:
    font = ImageFont.load_default(22)
    long = "a very long name of a LoRA that somebody gave it x 0.75"
    short = _cut(long, font, 300)
    assert font.getlength(short) <= 300
    assert short.startswith("a very")
    assert short.endswith("x 0.75")
    assert _cut("base", font, 300) == "base"
    made = side_by_side([(long, flat(0, 64, 96)), (long, flat(0, 64, 96))])
    assert (made[0, 16:50, 16 + 384 : 16 + 384 + 12] > 200).all()


def test_letters_that_the_font_lacks() -> None:
    assert [drawable(text) for text in ("Ünïcode", "step-1 x 0.5", "東京")] == ["Unicode", "step-1 x 0.5", "??"]
