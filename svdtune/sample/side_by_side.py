"""Several videos in one picture: each with its label above, four to a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from svdtune.sample.sheet import drawable

if TYPE_CHECKING:
    from PIL import ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_COLUMNS = 4
_WIDEST = 3840
"""Pixels; players decode H.264 up to 4096."""
_CELL = 320
"""Small videos grow by a whole factor to about this width, so that a label fits above."""
_SMALLEST_TEXT, _TEXTS_ACROSS = 22, 64
"""Label height in pixels: at least this, and one in so many of the width, to be read where the whole is shown smaller."""
_MARGIN, _GAP = 16, 12
_PAPER, _INK = (250, 250, 248), (24, 26, 30)


def side_by_side(videos: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """One video of `videos`: (label, uint8 RGB frames (t, h, w, 3)), all of one shape. Both sides are even."""
    from PIL import Image, ImageDraw, ImageFont

    count, height, width, _ = videos[0][1].shape
    grid = _Grid(len(videos), height, width)
    sheet = Image.new("RGB", grid.size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(grid.text)
    for (label, _), (left, top) in zip(videos, grid.corners, strict=True):
        draw.text(
            (left, top), _cut(drawable(label), font, grid.cell[0] - grid.text // 2), fill=_INK, font=font, anchor="la"
        )
    made = np.repeat(np.asarray(sheet)[None], count, axis=0)
    across, down = grid.cell
    for (_, frames), (left, top) in zip(videos, grid.corners, strict=True):
        top += grid.label
        for index, pixels in enumerate(frames):
            made[index, top : top + down, left : left + across] = _scaled(pixels, grid.cell)
    return made


@dataclass(frozen=True)
class _Grid:
    """Where everything stands; sizes are (width, height)."""

    count: int
    height: int
    """Of one video, as it comes."""
    width: int

    @property
    def columns(self) -> int:
        return min(_COLUMNS, self.count)

    @cached_property
    def cell(self) -> tuple[int, int]:
        """One video as it is shown."""
        room = (_WIDEST - 2 * _MARGIN - (self.columns - 1) * _GAP) // self.columns
        if self.width > room:
            return room, max(1, round(self.height * room / self.width))
        factor = max(1, min(room // self.width, ceil(_CELL / self.width)))
        return self.width * factor, self.height * factor

    @property
    def text(self) -> int:
        return max(_SMALLEST_TEXT, self._across // _TEXTS_ACROSS)

    @property
    def label(self) -> int:
        """Height of a label with the space below it."""
        return round(self.text * 1.7)

    @property
    def size(self) -> tuple[int, int]:
        down = 2 * _MARGIN + ceil(self.count / self.columns) * (self.label + self.cell[1] + _GAP) - _GAP
        return self._across + self._across % 2, down + down % 2

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Left and top of each label."""
        across, down = self.cell[0] + _GAP, self.label + self.cell[1] + _GAP
        places = [divmod(index, self.columns) for index in range(self.count)]
        return [(_MARGIN + column * across, _MARGIN + row * down) for row, column in places]

    @property
    def _across(self) -> int:
        return 2 * _MARGIN + self.columns * (self.cell[0] + _GAP) - _GAP


def _scaled(pixels: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    method = Image.Resampling.NEAREST if cell[0] >= pixels.shape[1] else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(cell, method))


def _cut(label: str, font: Font, width: int) -> str:
    """`label`, its middle left out where it is too long: names differ at their ends."""
    if font.getlength(label) <= width:
        return label
    for kept in range(len(label) - 1, 0, -1):
        short = f"{label[: kept - kept // 2]}…{label[len(label) - kept // 2 :]}"
        if font.getlength(short) <= width:
            return short
    return "…"
