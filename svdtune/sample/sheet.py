"""A contact sheet: one picture that shows several clips side by side, frame by frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import combining, normalize

import numpy as np

from svdtune.checkpoint.files import move_file

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_SHEET_WIDTH = 1600
_MAX_COLUMNS = 8
_MARGIN, _GAP, _ROW_GAP = 24, 8, 28
_TITLE_PX, _CAPTION_PX = 24, 15
_TITLE_HEIGHT, _CAPTION_HEIGHT = 38, 24
_PAPER, _INK, _FAINT = (250, 250, 248), (24, 26, 30), (120, 124, 130)


@dataclass(frozen=True)
class _Row:
    """One clip as it is drawn: scaled frames, and the number of each."""

    title: str
    detail: str
    cells: list[Image.Image]
    numbers: list[int]

    @property
    def height(self) -> int:
        return _TITLE_HEIGHT + self.cells[0].height + _CAPTION_HEIGHT

    @property
    def width(self) -> int:
        return max(len(self.cells) * (self.cells[0].width + _GAP) - _GAP, self.detail_left + self.detail_width)

    @property
    def detail_left(self) -> int:
        """From the title's left edge to the detail behind it."""
        from PIL import ImageFont

        return round(ImageFont.load_default(_TITLE_PX).getlength(self.title)) + 14

    @property
    def detail_width(self) -> int:
        from PIL import ImageFont

        return round(ImageFont.load_default(_CAPTION_PX).getlength(self.detail))


def contact_sheet(path: str | os.PathLike[str], rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """Write a PNG with one row per clip: `rows` holds a title and the frames (uint8 RGB, (t, h, w, 3)) of each.

    Up to 8 frames of a clip are shown, evenly spaced from the first to the last, numbered from 1. The sheet is about
    1600 pixels wide: small frames grow by a whole factor (so pixels stay visible as squares), large ones shrink.
    The file appears at `path` only when it is whole. Raises ValueError for no rows, other dtypes or other shapes.
    """
    from PIL import Image, ImageDraw

    if not rows:
        raise ValueError("rows: got none, expected at least one (title, frames)")
    columns = min(_MAX_COLUMNS, max(len(frames) for _, frames in rows))
    laid_out = [_lay_out(title, frames, columns) for title, frames in rows]
    width = max(row.width for row in laid_out) + 2 * _MARGIN
    height = sum(row.height for row in laid_out) + _ROW_GAP * (len(laid_out) - 1) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    top = _MARGIN
    for row in laid_out:
        _draw_row(sheet, ImageDraw.Draw(sheet), row, top)
        top += row.height + _ROW_GAP
    _save(Path(path), sheet)


def drawable(text: str) -> str:
    """`text` in letters that Pillow's own font has: accents are left out, a letter of another script becomes `?`."""
    plain = "".join(letter for letter in normalize("NFKD", text) if not combining(letter))
    return plain.encode("ascii", "replace").decode()


def _lay_out(title: str, frames: np.ndarray, columns: int) -> _Row:
    from PIL import Image

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"row {title!r}: got {frames.dtype} {frames.shape}, expected uint8 (t, h, w, 3)")
    count, height, width, _ = frames.shape
    chosen = _choose(count, columns)
    size, resample = _cell_size(height, width, columns)
    cells = [Image.fromarray(np.ascontiguousarray(frames[index])).resize(size, resample) for index in chosen]
    noun = "frame" if count == 1 else "frames"
    return _Row(drawable(title), f"{count} {noun}, {width} x {height}", cells, [index + 1 for index in chosen])


def _choose(count: int, columns: int) -> list[int]:
    """Indices of at most `columns` of `count` frames, evenly spaced, first and last included."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, columns)).round()]


def _cell_size(height: int, width: int, columns: int) -> tuple[tuple[int, int], Image.Resampling]:
    from PIL import Image

    room = (_SHEET_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) / columns
    scale = room / width
    if scale >= 1:
        # A few frames of a small clip would otherwise grow without bound.
        factor = min(round(scale), max(1, 640 // height))
        return (width * factor, height * factor), Image.Resampling.NEAREST
    return (int(room), max(1, round(height * scale))), Image.Resampling.LANCZOS


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, top: int) -> None:
    from PIL import ImageFont

    title_font, small_font = ImageFont.load_default(_TITLE_PX), ImageFont.load_default(_CAPTION_PX)
    draw.text((_MARGIN, top), row.title, fill=_INK, font=title_font, anchor="la")
    baseline = top + title_font.getbbox("x", anchor="la")[3]
    draw.text((_MARGIN + row.detail_left, baseline), row.detail, fill=_FAINT, font=small_font, anchor="ls")
    left = _MARGIN
    for cell, number in zip(row.cells, row.numbers, strict=True):
        sheet.paste(cell, (left, top + _TITLE_HEIGHT))
        middle = left + cell.width // 2
        draw.text(
            (middle, top + _TITLE_HEIGHT + cell.height + 5), str(number), fill=_FAINT, font=small_font, anchor="ma"
        )
        left += cell.width + _GAP


def _save(path: Path, sheet: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        sheet.save(partial, format="PNG")
        move_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)
