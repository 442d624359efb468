"""The truth about a file's frames: one demux pass without decoding, plus one decoded frame for size and orientation.

Frame n of a file is the picture with the n-th smallest presentation time among the packets a player shows. Containers'
own frame counts and average rates play no part: both are wrong for edit lists, cut files and variable frame rate.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svdtune.data.container import damage, open_video
from svdtune.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics (ITU-T H.273, table 3) whose pictures need tone mapping."""
_MISSING_SECONDS = 1.0
"""A container that promises this much more than its packets hold was cut."""


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes the displayed one: first transpose (swap axes), then mirror."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def upright(self) -> bool:
        """True when stored and displayed picture are the same."""
        return not (self.transpose or self.mirror_x or self.mirror_y)


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """What one file holds, known without decoding it."""

    path: Path
    pts: np.ndarray
    """(n,) int64: presentation time of every displayed frame in ticks, ascending; frame number = position here."""
    keyframe_pts: np.ndarray
    """(k,) int64: presentation times decoding can start from, ascending; includes ones that are not displayed."""
    time_base: Fraction
    """Seconds per tick."""
    width: int
    """Pixels as displayed, after rotation."""
    height: int
    """Pixels as displayed, after rotation."""
    pixel_aspect: float
    """Width of a displayed pixel over its height; 1 for square ones."""
    orientation: Orientation
    has_edit_list: bool
    """Packets exist that a player does not show."""
    has_leading_pictures: bool
    """Open groups of pictures: frames shown before the keyframe they are stored behind."""
    interlaced: bool
    """The first picture is stored as two half pictures of different times."""
    container: str
    codec: str
    pixel_format: str
    colorspace: int
    """Matrix coefficients (ITU-T H.273, table 4); 2: not stated, read as BT.601 as FFmpeg does."""

    def __len__(self) -> int:
        return len(self.pts)

    @cached_property
    def times(self) -> np.ndarray:
        """(n,) float64: seconds from the first displayed frame."""
        return (self.pts - self.pts[0]) * float(self.time_base)

    @property
    def duration(self) -> float:
        """Seconds from the first to the last displayed frame."""
        return float(self.times[-1])

    @property
    def fps(self) -> float:
        """Displayed frames per second, on average."""
        return (len(self) - 1) / self.duration

    @cached_property
    def frame_seconds(self) -> float:
        """The usual time between two frames (median), in seconds."""
        return float(np.median(np.diff(self.times)))


def index_video(path: Path) -> VideoIndex:
    """Read the index of one file (milliseconds).

    Raises DataError naming the file and the reason: not a video, header cut, cut in the middle, no pictures, fewer
    than two frames, no timestamps, alpha, HDR, a rotation that is no quarter turn.
    """
    with open_video(path) as (container, stream):
        frame = _first_frame(container, stream, path)
    with open_video(path) as (container, stream):
        packets = _demux(container, stream, path)
        codec, time_base = stream.codec_context.name, stream.time_base
        alpha = "alpha_mode" in stream.metadata or any(c.is_alpha for c in frame.format.components)
        aspect = float(stream.sample_aspect_ratio or 1)
        name = container.format.name
    _refuse_picture(path, frame, alpha)
    orientation = _orientation(path, frame)
    width, height = (frame.height, frame.width) if orientation.transpose else (frame.width, frame.height)
    if time_base is None:
        raise DataError(f"{path}: its frames carry no times; re-encode it with `ffmpeg -i IN -c:v libx264 OUT.mp4`")
    return VideoIndex(
        path=path,
        pts=packets.pts,
        keyframe_pts=packets.keyframe_pts,
        time_base=time_base,
        width=width,
        height=height,
        pixel_aspect=1 / aspect if orientation.transpose else aspect,
        orientation=orientation,
        has_edit_list=packets.has_edit_list,
        has_leading_pictures=packets.has_leading_pictures,
        interlaced=bool(frame.interlaced_frame),
        container=name,
        codec=codec,
        pixel_format=frame.format.name,
        colorspace=int(frame.colorspace),
    )


@dataclass(frozen=True, eq=False)
class _Packets:
    pts: np.ndarray
    keyframe_pts: np.ndarray
    has_edit_list: bool
    has_leading_pictures: bool


def _demux(container: InputContainer, stream: VideoStream, path: Path) -> _Packets:
    """One pass over the packets in decoding order."""
    _refuse_short_file(container, stream, path)
    shown, keys, leading, discarded, end, dts = [], [], False, False, 0.0, None
    for packet in container.demux(*_streams_to_read(container, stream)):
        if not packet.size:
            continue
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        pts = _checked_pts(packet, dts, path)
        dts = packet.dts if packet.dts is not None else dts
        if packet.is_keyframe:
            keys.append(pts)
        elif not keys or pts < keys[0]:
            continue  # refers to pictures that are not in the file
        elif pts < keys[-1]:
            leading = True
        discarded = discarded or packet.is_discard
        if not packet.is_discard and _is_shown(packet, stream):
            shown.append(pts)
    _refuse_early_end(container, path, end)
    if len(set(shown)) < 2:
        raise DataError(f"{path}: has {len(set(shown))} frame(s); a clip needs at least 2. Remove it from data.root")
    return _Packets(np.unique(np.array(shown, np.int64)), np.unique(np.array(keys, np.int64)), discarded, leading)


def _checked_pts(packet: Packet, last_dts: int | None, path: Path) -> int:
    if packet.is_corrupt:
        raise DataError(
            f"{path}: cut, damaged or joined from pieces: the data of a frame is incomplete; copy it again, or re-encode it with ffmpeg"
        )
    if packet.pts is None:
        raise DataError(f"{path}: its frames carry no times; re-encode it with `ffmpeg -i IN -c:v libx264 OUT.mp4`")
    if last_dts is not None and packet.dts is not None and packet.dts < last_dts:
        raise DataError(f"{path}: its times jump backwards; re-encode it with `ffmpeg -i IN -c:v libx264 OUT.mp4`")
    return packet.pts


def _is_shown(packet: Packet, stream: VideoStream) -> bool:
    # VP8 stores hidden reference frames as packets of their own: bit 4 of the frame tag, RFC 6386 section 9.1.
    return stream.codec_context.name not in ("vp8", "libvpx") or bool(bytes(packet)[0] & 0x10)


def _streams_to_read(container: InputContainer, stream: VideoStream) -> list:
    """Where the header promises a length for all streams together, all of them are needed to see whether it is kept."""
    return list(container.streams) if _promises_length(container) else [stream]


def _promises_length(container: InputContainer) -> bool:
    return container.format.name.split(",")[0] in ("matroska", "avi", "flv", "asf")


def _refuse_short_file(container: InputContainer, stream: VideoStream, path: Path) -> None:
    size = path.stat().st_size
    needed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if needed > size and container.format.name.startswith("mov"):
        raise DataError(f"{path}: is cut: its header wants {needed} bytes, the file has {size}; copy it again")


def _refuse_early_end(container: InputContainer, path: Path, end: float) -> None:
    promised = (container.duration or 0) / 1e6
    if _promises_length(container) and promised - end > _MISSING_SECONDS:
        raise DataError(
            f"{path}: is cut: its header says {promised:.2f} s, its frames end at {end:.2f} s; copy it again"
        )


def _first_frame(container: InputContainer, stream: VideoStream, path: Path) -> VideoFrame:
    import av

    try:
        return next(container.decode(stream))
    except StopIteration:
        raise DataError(
            f"{path}: has 0 frames that can be decoded: damaged, or cut without re-encoding behind its only key picture"
        ) from None
    except av.FFmpegError as error:
        raise DataError(f"{path}: {damage(error)}") from error


def _refuse_picture(path: Path, frame: VideoFrame, alpha: bool) -> None:
    if alpha:
        raise DataError(
            f"{path}: has an alpha channel ({frame.format.name}), and what lies under transparent pixels is undefined; "
            "flatten it with `ffmpeg -i IN -pix_fmt yuv420p OUT.mp4`"
        )
    if transfer := _HDR.get(int(frame.color_trc)):
        raise DataError(
            f"{path}: is HDR ({transfer}), and would look washed out without tone mapping; "
            "convert it to SDR (BT.709) with ffmpeg's zscale and tonemap filters"
        )


def _orientation(path: Path, frame: VideoFrame) -> Orientation:
    """Reads the display matrix (ISO/IEC 14496-12, 6.2.2): x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
    if a and d and not b and not c:
        return Orientation(False, a < 0, d < 0)
    if b and c and not a and not d:
        return Orientation(True, c < 0, b < 0)
    raise DataError(
        f"{path}: is rotated by {frame.rotation} degrees; only quarter turns can be shown. "
        "Re-encode it with ffmpeg, which turns the pictures"
    )
