"""Where videos go and what is written into them."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdtune import __version__
from svdtune.checkpoint.manifest import MANIFEST
from svdtune.errors import UsageError
from svdtune.sample.run import is_run
from svdtune.sample.shot import Shot

_FIX = "Give with --out a path in a folder that can be written to."
_FRAME = re.compile(r"\d{4,}\.png")


@dataclass(frozen=True)
class Place:
    """The folder of the results, and the one file where a person named it."""

    folder: Path
    file: Path | None = None

    def video(self, name: str) -> Path:
        return self.file or self.folder / f"{name}.mp4"

    def sheet(self, name: str) -> Path:
        """Below the videos: pictures among them would look like first frames."""
        return self.folder / "sheets" / f"{name}.png"


def place(out: Path | None, source: str, *, videos: int) -> Place:
    """From --out, or what SOURCE is. Raises UsageError for a file where there is more than one video, or no mp4."""
    if out is None:
        return Place(_default(Path(source)))
    if out.suffix.lower() == ".mp4" and not out.is_dir():
        if videos > 1:
            raise UsageError(
                f"--out: got {out}, one file for {videos} videos. Give a folder: --out {out.with_suffix('')}"
            )
        return Place(out.parent, out)
    if not out.is_dir() and (out.is_file() or re.fullmatch(r"\.[A-Za-z]\w{2,3}", out.suffix)):
        raise UsageError(f"--out: got {out}, expected a folder, or the path of a file that ends in .mp4")
    return Place(out)


def frame_folder(video: Path) -> Path:
    """Where the frames of a video go."""
    return video.with_name(f"{video.stem}-frames")


def require_free(paths: list[Path]) -> None:
    """Raise UsageError where a result would replace another, or something that is no earlier result."""
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice:
        raise UsageError(f"--out: two results would have the name {twice}. Rename the LoRA or the picture.")
    for path in paths:
        if path.suffix and path.is_dir():
            raise UsageError(
                f"--out: {path} is a folder, and a file of that name is to be written. Rename it, or give another --out."
            )
        if (
            not path.suffix
            and path.is_dir()
            and (strange := [p.name for p in path.iterdir() if not _FRAME.fullmatch(p.name)])
        ):
            raise UsageError(
                f"--frames: {path} holds something else than frames ({strange[0]}). Rename it, or give another --out."
            )


@contextmanager
def made_folder(target: Path) -> Iterator[None]:
    """The folder of `target`, made and tried: sampling takes minutes, and must not be for nothing. Left empty, it is taken away."""
    folder = target.parent
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _take_away(missing)
        in_the_way = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        why = f"{in_the_way} is a file, not a folder" if in_the_way else error.strerror or error
        raise UsageError(f"--out: {target} cannot be written: {why}. {_FIX}") from error
    try:
        yield
    finally:
        _take_away(missing)


def slug(text: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def comment(shot: Shot, image: Path, seed: int, *origins: dict[str, Any]) -> str:
    """All that a video was made from, as one JSON in ASCII: `model`, or `models` of a comparison."""
    models = {"model": origins[0]} if len(origins) == 1 else {"models": list(origins)}
    size = {"height": shot.height, "width": shot.width, "resize": shot.resize}
    made = {
        "svdtune": __version__,
        "image": image.name,
        "seed": seed,
        **size,
        "settings": asdict(shot.settings),
        **models,
    }
    return json.dumps(made)


def _default(source: Path) -> Path:
    if source.is_dir() and is_run(source):
        return source / "samples"
    if (source / MANIFEST).is_file() and is_run(source.resolve().parents[1]):
        return source.resolve().parents[1] / "samples"
    return Path("samples")


def _take_away(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds something
            folder.rmdir()
