"""Two readers of frames by number behind one small interface, both bound to the packet index."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from svdtune.data.container import damage, open_container, picture_stream
from svdtune.data.index import Orientation, VideoIndex
from svdtune.errors import DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Decoder = Literal["auto", "decord", "pyav"]

_SAME_SECONDS = 1e-3
"""Times of decord (float32) and of the index count as equal up to here."""
_BT601 = (2, 5, 6)
"""Matrix coefficients that decord's conversion is right for: not stated, BT.470BG, SMPTE 170M."""
_NARROW = 80
"""Widths 16, 24, 48 and 72 fail in decord 0.6; every even one from here to 420 does not."""
_NEAR = 8
"""A seek costs what decoding so many frames costs: those that B-pictures hold back are decoded, and then decoded again."""


class Reader(Protocol):
    """Frames of one file by number (position in `VideoIndex.pts`)."""

    def read(self, frame_numbers: Sequence[int]) -> np.ndarray:
        """Frames in the order asked for: uint8 RGB (n, h, w, 3), as displayed. Raises DataError, never a neighbour."""
        ...

    def close(self) -> None:
        """Free the file and the decoder. decord reads ahead without limit while open, so close it after each clip."""
        ...


def open_reader(index: VideoIndex, decoder: Decoder = "auto") -> Reader:
    """The reader for one file.

    `auto` takes PyAV, which reads every file right and costs the least CPU time (benchmarks/loader.py). `decord` raises
    DataError for files of which it is not known to return the right frames and colours.
    """
    if decoder != "decord":
        return PyavReader(index)
    objection = decord_objection(index)
    reader = None if objection else _try_decord(index)
    if isinstance(reader, DecordReader):
        return reader
    raise DataError(
        f"{index.path}: data.decoder=decord would return wrong pictures: {objection or reader}. "
        "Set data.decoder to auto or pyav"
    )


def decord_objection(index: VideoIndex) -> str | None:
    """Why decord must not read this file, from the index alone; None when nothing speaks against it."""
    if index.has_edit_list:
        return "the file has an edit list, which decord ignores"
    if index.has_leading_pictures:
        return "the file has open groups of pictures, where decord miscounts"
    if not index.orientation.upright:
        return "the file is stored rotated or mirrored"
    if index.pixel_format != "yuv420p":
        return f"its pictures are {index.pixel_format}, not 8-bit yuv420p"
    if index.colorspace not in _BT601:
        return f"its colours (matrix {index.colorspace}) are not BT.601, the only one decord converts rightly"
    if index.width < _NARROW:
        return f"its pictures are {index.width} pixels wide; decord's buffers do not fit some that are narrower than {_NARROW}"
    return None


class PyavReader:
    """Seeks to the last keyframe at or before a frame, then decodes until the presentation time is the wanted one."""

    def __init__(self, index: VideoIndex) -> None:
        from av.video.reformatter import VideoReformatter

        self._index = index
        self._to_rgb = VideoReformatter()  # one for all: each frame would make a scaler of its own
        self._open()

    def _open(self) -> None:
        self._container = open_container(self._index.path)
        self._stream = picture_stream(self._container, self._index.path)

    def read(self, frame_numbers: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        pts = self._index.pts[np.asarray(frame_numbers)]
        pictures: dict[int, np.ndarray] = {}
        for key, wanted in self._passes(np.unique(pts)):
            pictures |= self._read_from(key, set(wanted.tolist()))
        return np.stack([pictures[time] for time in pts.tolist()])

    def close(self) -> None:
        """See `Reader.close`."""
        self._container.close()

    def _passes(self, pts: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Keyframe number and what to decode from it on; going on to the next keyframe where that is no more than `_NEAR` frames away."""
        keys = np.searchsorted(self._index.keyframe_pts, pts, side="right") - 1
        until = self._index.keyframe_pts[np.maximum(keys[1:], 0)]
        away = np.searchsorted(self._index.pts, until) - np.searchsorted(self._index.pts, pts[:-1])
        cuts = np.flatnonzero((np.diff(keys) > 0) & (away > _NEAR)) + 1
        return [(int(keys[first]), part) for first, part in zip([0, *cuts], np.split(pts, cuts), strict=True)]

    def _read_from(self, key: int, wanted: set[int]) -> dict[int, np.ndarray]:
        """Decode `wanted` from keyframe number `key`; where that misses one, from the one before, then from the start."""
        import av

        reason, missing = "", wanted
        for start in (key, key - 1, None):
            try:
                pictures = self._decode(start, wanted, skip=start == key)
            except av.FFmpegError as error:
                reason = damage(error)
                continue
            if len(pictures) == len(wanted):
                return pictures
            reason, missing = "the decoder skips it; re-encode the file with ffmpeg", wanted - pictures.keys()
        raise DataError(f"{self._index.path}: {self._name_of(min(missing))}: {reason}")

    def _decode(self, key: int | None, wanted: set[int], *, skip: bool) -> dict[int, np.ndarray]:
        if key is None:
            self.close()
            self._open()
        else:
            self._container.seek(int(self._index.keyframe_pts[max(key, 0)]), stream=self._stream, backward=True)
        pictures, last = {}, max(wanted)
        for frame in self._frames(wanted if skip and self._can_skip() else None):
            if frame.pts in wanted and not frame.is_corrupt:
                picture = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
                pictures[frame.pts] = _displayed(picture, self._index.orientation)
            if frame.pts is not None and frame.pts >= last:
                break
        return pictures

    def _can_skip(self) -> bool:
        """Whether pictures that no other refers to are marked so (nal_ref_idc), and each packet holds a whole picture."""
        return self._index.codec == "h264" and not self._index.interlaced

    def _frames(self, wanted: set[int] | None) -> Iterator[VideoFrame]:
        """Decoded frames from the next keyframe on: a seek in MPEG-TS lands between keyframes.

        Those not `wanted` to which no other refers are left out undecoded; None: every frame.
        """
        started, codec = False, self._stream.codec_context
        for packet in self._container.demux(self._stream):
            started = started or packet.is_keyframe
            if started:
                needed = wanted is None or packet.pts is None or packet.pts in wanted
                codec.skip_frame = "DEFAULT" if needed else "NONREF"
                yield from self._stream.decode(packet)

    def _name_of(self, pts: int) -> str:
        number = int(np.searchsorted(self._index.pts, pts))
        return f"frame {number} (at {self._index.times[number]:.2f} s)"


class DecordReader:
    """decord on one thread; made only by `open_reader`, after its length and times were found equal to the index."""

    def __init__(self, index: VideoIndex) -> None:
        import torch  # noqa: F401  decord segfaults when it is loaded before torch (dmlc/decord#293)

        import decord  # isort: skip

        decord.logging.set_level(decord.logging.QUIET)
        self._index = index
        # fault_tol=1: by default decord replaces frames it cannot decode by their neighbours, silently.
        self._reader: Any = decord.VideoReader(
            str(index.path.absolute()), ctx=decord.cpu(0), num_threads=1, fault_tol=1
        )

    def mismatch(self) -> str | None:
        """How decord's frames differ from the index, or None."""
        count = len(self._reader)
        if count != len(self._index):
            return f"it counts {count} frames, the file shows {len(self._index)}"
        times = self._reader.get_frame_timestamp(list(range(count)))[:, 0]
        seconds = self._index.pts * float(self._index.time_base)
        if np.abs(times - seconds).max() > _SAME_SECONDS:
            return "its times differ from the file's"
        return None

    def read(self, frame_numbers: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        try:
            return self._reader.get_batch(list(frame_numbers)).asnumpy()
        except _decord_errors() as error:
            raise DataError(f"{self._index.path}: {damage(error)}") from error

    def close(self) -> None:
        """See `Reader.close`."""
        self._reader = None


def _decord_errors() -> tuple[type[Exception], ...]:
    from decord._ffi.base import DECORDError, DECORDLimitReachedError  # not exported

    return (RuntimeError, DECORDError, DECORDLimitReachedError)


def _try_decord(index: VideoIndex) -> DecordReader | str:
    """The reader, or why decord cannot be used for this file."""
    if importlib.util.find_spec("decord") is None:
        return "it is not installed on this machine"
    try:
        reader = DecordReader(index)
    except _decord_errors():
        return "it cannot open the file"
    if mismatch := reader.mismatch():
        reader.close()
        return mismatch
    return reader


def _displayed(picture: np.ndarray, orientation: Orientation) -> np.ndarray:
    """A stored picture (h, w, 3) as it is shown."""
    if orientation.transpose:
        picture = picture.swapaxes(0, 1)
    if orientation.mirror_x:
        picture = picture[:, ::-1]
    if orientation.mirror_y:
        picture = picture[::-1]
    return picture
