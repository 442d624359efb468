"""Files at the two ends of sampling: the first frame comes in, the mp4 goes out."""

from __future__ import annotations

import difflib
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from svdtune.checkpoint.files import move_file, partial_name, swap_in
from svdtune.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Resize = Literal["cover", "pad", "squash"]

_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def write_mp4(path: str | os.PathLike[str], frames: np.ndarray, fps: float, *, comment: str = "") -> None:
    """Write `frames` (uint8 RGB, (t, h, w, 3)) as an H.264 file that plays in browsers, QuickTime and VLC.

    High profile, 4:2:0, BT.709 limited range (converted and tagged alike), closed GOPs, moov before mdat.
    H.264 4:2:0 has even sides only: an odd side is extended by repeating its last row or column.
    `comment` goes into the file's metadata. The same arguments give the same bytes.
    The file appears at `path` only when it is whole. Raises ValueError for other dtypes or shapes.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: got {frames.dtype} {frames.shape}, expected uint8 (t, h, w, 3)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _encode(partial, _pad_to_even(frames), _rate(fps), comment)
        move_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_frames(folder: Path, frames: np.ndarray, comment: str) -> None:
    """Write `0001.png`, `0002.png`, ... into `folder`, `comment` in each; the folder replaces one of the same name in one step."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("comment", comment)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for number, pixels in enumerate(frames, start=1):
            Image.fromarray(np.ascontiguousarray(pixels)).save(partial / f"{number:04}.png", pnginfo=text)
        swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_image(path: str | os.PathLike[str], *, height: int, width: int, resize: Resize = "cover") -> Tensor:
    """The picture at `path` as a float32 tensor (3, height, width) in [-1, 1].

    EXIF rotation is applied, transparency is laid over white, the resize is antialiased bicubic as for training clips:
    `cover` scales to fill and crops the centre, `pad` scales to fit with black borders, `squash` scales each side.
    Raises DataError when there is no such file, or it is no picture, damaged, or has more than 8 bits a channel in grey.
    """
    import torch

    image = _fit(_open_rgb(Path(path)), height, width, resize)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels.float() / 127.5 - 1.0).contiguous()


def _rate(fps: float) -> Fraction:
    """`fps` as the fraction it stands for: 29.97002997 is 30000/1001, 7.5 is 15/2."""
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise ValueError(f"fps: got {fps!r}, expected more than 1/1001")
    return rate


def _pad_to_even(frames: np.ndarray) -> np.ndarray:
    _, height, width, _ = frames.shape
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode(path: Path, frames: np.ndarray, rate: Fraction, comment: str) -> None:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

    _, height, width, _ = frames.shape
    # Mean chroma of each 2 x 2 block, rounded: 0.5 of a level off at most, where swscale's default is 0.8 and biased.
    exact = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Without B-frames no edit list is needed, and every reader finds frame 0 at time 0.
        # One thread: the bytes must not depend on the machine's number of cores.
        stream.options = {
            "crf": "16",
            "preset": "medium",
            "profile": "high",
            "bf": "0",
            "flags": "+cgop",
            "threads": "1",
        }
        context = stream.codec_context
        context.gop_size = 12
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=exact,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _open_rgb(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise DataError(_missing_image(path))
    try:
        with Image.open(path) as opened:
            if opened.mode in _DEEP_MODES:
                raise DataError(
                    f"image {path}: got {opened.mode} (grey with more than 8 bits), expected 8 bits a channel. "
                    "Its brightness would be cut off; save it as an 8-bit PNG or JPEG."
                )
            image = ImageOps.exif_transpose(opened)
            return _over_white(image)
    except UnidentifiedImageError:
        raise DataError(
            f"image {path}: this is not a picture that Pillow can read. "
            "Give the first frame as PNG, JPEG or WebP (a video file has to be cut to a frame first)."
        ) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"image {path}: the picture cannot be decoded ({error}). It is damaged or cut short; save it anew."
        ) from error


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _missing_image(path: Path) -> str:
    if path.is_dir():
        return f"image {path}: this is a folder, expected one picture file (PNG, JPEG or WebP)."
    if not path.parent.is_dir():
        return f"image {path}: no such file; there is no folder {path.parent} either."
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"image {path}: no such file. Did you mean {path.parent / near[0]}?"
    folder = "the current folder" if path.parent == Path() else path.parent
    held = {0: "no files", 1: "one other file"}.get(len(names), f"{len(names)} other files")
    return f"image {path}: no such file; {folder} holds {held}."


def _fit(image: Image.Image, height: int, width: int, resize: Resize) -> Image.Image:
    from PIL import Image

    bicubic = Image.Resampling.BICUBIC
    if resize == "squash":
        return image.resize((width, height), bicubic)
    ratios = width / image.width, height / image.height
    scale = max(ratios) if resize == "cover" else min(ratios)
    scaled = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), bicubic)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    # A crop that reaches outside the picture is filled with black: the borders of `pad`.
    return scaled.crop((left, top, left + width, top + height))
