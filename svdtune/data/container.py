"""Opening a video file with PyAV, and saying in words why it cannot be opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from svdtune.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,avi,flv,asf,ogg"
# A playlist or concat script named clip.mp4 would otherwise make FFmpeg open other files and URLs.
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
_PICTURES = {b"GIF8": "GIF", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
"""First bytes of files that are one picture, whatever their name says."""
_SECONDS = 60.0
"""Time FFmpeg may spend opening a file, and in one read of it, before it gives up."""


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container of `path` and its picture stream, decoding on one thread; closed on leaving.

    Raises DataError naming the file when it is no video, is cut at the head, or holds no pictures. FFmpeg errors
    inside the block become DataError too.
    """
    import av

    container = open_container(path)
    try:
        yield container, picture_stream(container, path)
    except av.FFmpegError as error:
        raise DataError(f"{path}: {damage(error)}") from error
    finally:
        container.close()


def open_container(path: Path) -> InputContainer:
    """`path` opened for reading, never as a playlist or URL. Raises DataError with what the file is instead."""
    import av

    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return av.open(f"file:{path}", options=_OPTIONS, timeout=(_SECONDS, _SECONDS))
    except av.FFmpegError as error:
        raise DataError(f"{path}: {_not_a_video(head, error)}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def picture_stream(container: InputContainer, path: Path) -> VideoStream:
    """The stream that holds the pictures (cover art is none), set to decode on one thread."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams} - {"data"})) or "a header that is cut"
        raise DataError(f"{path}: holds no pictures, only {kinds}; remove it from data.root")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    stream.codec_context.thread_count = 1
    return stream


def damage(error: Exception) -> str:
    """FFmpeg's error in a sentence."""
    text = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return f"cannot be decoded ({text}): cut or damaged; copy it again, or re-encode what is left of it with ffmpeg"


def _not_a_video(head: bytes, error: Exception) -> str:
    if not head:
        return "is empty (0 bytes); copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the video itself; run `git lfs pull`"
    if picture := next((name for start, name in _PICTURES.items() if head.startswith(start)), None):
        return f"is a {picture} picture, not a video; remove it from data.root, or convert it with ffmpeg"
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return f"is a text file, not a video (it starts with {head[:24].decode('latin-1')!r})"
    if head[4:8] in (b"ftyp", b"mdat", b"free", b"wide"):
        return "has no MP4 header (moov): the end of the file is missing; copy or record it again"
    text = getattr(error, "strerror", None) or str(error)
    return f"is not a video, or its header is cut ({text}); copy it again"
