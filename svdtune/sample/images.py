"""IMAGE: one picture, or the pictures of a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from svdtune.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Picture:
    """A first frame on the disk."""

    path: Path
    name: str
    """What its videos are called after."""


def find_pictures(path: Path) -> list[Picture]:
    """The picture at `path`, or those directly in that folder, 2.png before 10.png. Raises DataError for a folder without."""
    if not path.is_dir():
        return [Picture(path, path.stem)]
    found = [file for file in path.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")]
    paths = sorted((file for file in found if file.is_file()), key=_natural)
    if not paths:
        raise DataError(
            f"image {path}: this folder holds no pictures ({', '.join(PICTURES)}), and its subfolders are not searched. "
            "Give a folder of pictures, or one picture."
        )
    stems = {file.stem for file in paths}
    return [Picture(file, file.stem if len(stems) == len(paths) else file.name) for file in paths]


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name.lower())
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts] + [(-1, path.name)]
