"""Files made on the spot with PyAV, and the nine reference files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

ASSETS = Path(__file__).parents[1] / "assets" / "video"
TICKS = 12800


def picture(number: int, *, height: int, width: int) -> np.ndarray:
    """uint8 RGB: a level that rises with the frame number, the top left quarter brighter, so turns can be seen."""
    frame = np.full((height, width, 3), 20 + 4 * number % 120, np.uint8)
    frame[: height // 2, : width // 2] += 100
    return frame


def write_video(
    path: Path,
    *,
    frames: int = 30,
    fps: int = 10,
    height: int = 48,
    width: int = 64,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[float] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    setup: Callable | None = None,
) -> Path:
    """Write `frames` pictures, at `times` (seconds) or evenly at `fps`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = Fraction(1, TICKS)
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if setup:
            setup(stream)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height=height, width=width), format="rgb24")
            frame = frame.reformat(format=pixel_format)
            seconds = times[number] if times is not None else number / fps
            frame.pts, frame.time_base = round(seconds * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def video(tmp_path: Path) -> Callable[..., Path]:
    """Writes one file under tmp_path: `video("a.mp4", frames=30, ...)`."""
    return lambda name="clip.mp4", **options: write_video(tmp_path / name, **options)
