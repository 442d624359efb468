"""Folders of clips as people really have them."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.mutations.checkpoint_cases import HTML
from tests.mutations.sandbox import Mutation, Sandbox, put

DAT = ("DAT",)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 1048576\n"
GIF = (
    b"GIF89a"
    + bytes([1, 0, 1, 0, 128, 0, 0])
    + bytes(6)
    + b"!\xf9\x04\x01\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
)


def _all(content: Callable[[bytes], bytes]) -> Callable[[Sandbox], None]:
    """Every clip spoiled the same way."""

    def apply(box: Sandbox) -> None:
        for path in box.videos:
            put(path, content(path.read_bytes()))

    return apply


def _one(content: Callable[[bytes], bytes], *overrides: str) -> Callable[[Sandbox], None]:
    """One clip spoiled; the others are sound."""

    def apply(box: Sandbox) -> None:
        put(box.videos[2], content(box.videos[2].read_bytes()))
        box.set(*overrides)

    return apply


def _written(write: Callable[[Path], None], suffix: str = ".mp4") -> Callable[[Sandbox], None]:
    """Every clip replaced by one that `write` makes."""

    def apply(box: Sandbox) -> None:
        for path in box.videos:
            path.unlink()
        for number in range(3):
            write(box.clips / f"clip-{number}{suffix}")

    return apply


def _png(_: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"\0\0")
    ) + chunk(b"IEND", b"")  # fmt: skip


def video(path: Path, *, frames: int = 60, fps: int = 24, codec: str = "libx264", pixels: str = "yuv420p",
          height: int = 64, width: int = 96, transfer: int | None = None, colorspace: int | None = None) -> None:  # fmt: skip
    """A clip of moving noise-free gradients, written with PyAV."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if transfer is not None:
            stream.codec_context.color_trc = transfer
            stream.codec_context.color_primaries, stream.codec_context.colorspace = 9, 9
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        for number in range(frames):
            row = (np.arange(width) * 2 + number * 3) % 256
            picture = np.broadcast_to(row[None, :, None], (height, width, 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())


def _sound_only(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        for start in range(0, 44100, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _root(make: Callable[[Sandbox], Path]) -> Callable[[Sandbox], None]:
    return lambda box: box.set(f"data.root={make(box)}")


def _folder(*files: str) -> Callable[[Sandbox], Path]:
    def make(box: Sandbox) -> Path:
        folder = box.work / "other"
        folder.mkdir()
        for name in files:
            (folder / name).write_bytes(b"frame")
        return folder

    return make


def _one_of_each(box: Sandbox) -> None:
    contents = [b"", LFS, HTML, GIF, box.videos[0].read_bytes()[:900], b"\0" * 5000]
    for path, content in zip(box.videos, contents, strict=True):
        put(path, content)


def _hidden(box: Sandbox) -> None:
    (box.clips / ".clips").mkdir()
    for path in box.videos:
        shutil.move(path, box.clips / ".clips")


def _slow_and_quick(box: Sandbox) -> None:
    for path in box.videos[:-1]:
        path.unlink()
        video(path, frames=12, fps=4)


_file = "file"
DATA = [
    Mutation("all clips empty", _file, DAT, "I03", _all(lambda _: b"")),
    Mutation("clips that are text", _file, DAT, "I03", _all(lambda _: b"frame0001.png\nframe0002.png\n" * 40)),
    Mutation("clips that are web pages", _file, DAT, "I03", _all(lambda _: HTML)),
    Mutation("clips that are git-lfs pointers", _file, DAT, "B16", _all(lambda _: LFS)),
    Mutation("clips cut in the middle", _file, DAT, "I01 I03", _all(lambda b: b[: len(b) // 2])),
    Mutation("clips cut inside their header", _file, DAT, "I03", _all(lambda b: b[:600])),
    Mutation("clips of zeros", _file, DAT, "I01", _all(lambda b: b"\0" * len(b))),
    Mutation("GIFs called .mp4", _file, DAT, "I03", _all(lambda _: GIF)),
    Mutation("PNGs called .mp4", _file, DAT, "I03", _all(_png)),
    Mutation("clips of one frame", _file, DAT, "I10 E16", _written(lambda p: video(p, frames=1))),
    Mutation("clips without pictures", _file, DAT, "I03", _written(_sound_only)),
    Mutation("clips too short for the window", _file, DAT, "I10 I23", _written(lambda p: video(p, frames=4))),
    Mutation("clips slower than data.fps", _file, DAT, "I08", _written(lambda p: video(p, frames=20, fps=4))),
    Mutation("HDR clips", _file, DAT, "I25 F38",
             _written(lambda p: video(p, codec="libx265", pixels="yuv420p10le", transfer=16), ".mkv")),
    Mutation("clips with alpha", _file, DAT, "C13", _written(lambda p: video(p, codec="qtrle", pixels="argb"), ".mov")),
    Mutation("every clip bad in its own way", _file, DAT, "I01 I03", _one_of_each),
    Mutation("one clip cut and on_bad_clip=error", _file, DAT, "I01", _one(lambda b: b[: len(b) // 2], "data.on_bad_clip=error")),
    Mutation("one clip empty and on_bad_clip=error", _file, DAT, "I03", _one(lambda _: b"", "data.on_bad_clip=error")),
    Mutation("one clip cut, the others good", _file, DAT, "I01", _one(lambda b: b[: len(b) // 2]), warning_is_enough=True),
    Mutation("most clips too slow", _file, DAT, "I08 I10", _slow_and_quick, warning_is_enough=True),
    Mutation("root misspelt", _file, DAT, "I06", _root(lambda box: box.work / "clpis")),
    Mutation("root is a clip", _file, DAT, "I06", _root(lambda box: box.videos[0])),
    Mutation("root is empty", _file, DAT, "I06", _root(_folder())),
    Mutation("root holds pictures, no videos", _file, DAT, "I15 I06", _root(_folder("frame_1.png", "frame_2.png", "notes.txt"))),
    Mutation("clips in a hidden folder", _file, DAT, "I06", _hidden),
]  # fmt: skip
