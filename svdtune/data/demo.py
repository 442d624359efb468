"""Demo clips: one warm-coloured shape on a cool background, moving at a constant speed.

Distances are in *reference pixels*: those of a 64 x 96 (height x width) frame. A frame twice as high and wide shows
the same picture with every distance doubled. The embedded tiny base was trained on `render_clip`, with
`speed = motion_bucket_id / BUCKETS_PER_PIXEL_PER_SECOND`, so that the micro-conditions mean something to it.
"""

from __future__ import annotations

import colorsys
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from svdtune.errors import UsageError

Motion = Literal["right", "left", "down", "up"]
Kind = Literal["disc", "square", "triangle", "diamond"]

MOTIONS: tuple[Motion, ...] = get_args(Motion)
KINDS: tuple[Kind, ...] = get_args(Kind)
DIRECTIONS: dict[Motion, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}

REFERENCE_HEIGHT = 64
REFERENCE_WIDTH = 96
BUCKETS_PER_PIXEL_PER_SECOND = 4.0
DEMO_MOTION_BUCKET = 127

_BT601 = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], np.float32) / 255.0


@dataclass(frozen=True)
class Scene:
    """What one clip shows. Lengths in reference pixels, colours in RGB between 0 and 1."""

    kind: Kind
    radius: float
    start: tuple[float, float]  # centre of the shape in the first frame: x, y
    color: tuple[float, float, float]
    background: tuple[tuple[float, float, float], tuple[float, float, float]]  # the two ends of the gradient
    gradient_angle: float


def speed_of_bucket(motion_bucket_id: float) -> float:
    """Speed in reference pixels per second that `motion_bucket_id` stands for in the demo data and the tiny base."""
    return motion_bucket_id / BUCKETS_PER_PIXEL_PER_SECOND


def draw_scene(
    rng: np.random.Generator,
    *,
    motion: Motion,
    distance: float,
    frame_height: float = REFERENCE_HEIGHT,
    frame_width: float = REFERENCE_WIDTH,
) -> Scene:
    """A random scene whose shape stays inside the frame while it moves `distance` reference pixels."""
    kind = KINDS[rng.integers(len(KINDS))]
    radius = float(rng.uniform(8.0, 11.0))
    x_step, y_step = DIRECTIONS[motion]
    start = (
        _draw_start(rng, frame_width, radius, x_step * distance, motion),
        _draw_start(rng, frame_height, radius, y_step * distance, motion),
    )
    plain = rng.random() < 0.4
    first = _cool_color(rng)
    second = first if plain else _cool_color(rng)
    angle = float(rng.uniform(0.0, 2.0 * np.pi))
    return Scene(kind, radius, start, _warm_color(rng), (first, second), angle)


def render_frame(scene: Scene, center: tuple[float, float], *, height: int, width: int) -> np.ndarray:
    """Draws `scene` with its shape at `center` (x, y in reference pixels): uint8 RGB, (height, width, 3)."""
    scale = _scale(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5) / scale
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None] / scale
    background = _background(scene, x, y, width / scale, height / scale)
    distance = _signed_distance(scene.kind, x - center[0], y - center[1], scene.radius)
    coverage = np.clip(0.5 - distance * scale, 0.0, 1.0)[..., None]
    rgb = background * (1.0 - coverage) + np.asarray(scene.color, dtype=np.float32) * coverage
    return (rgb * 255.0 + 0.5).astype(np.uint8)


def render_clip(
    rng: np.random.Generator,
    *,
    motion: Motion,
    num_frames: int,
    fps: float,
    speed: float,
    height: int = REFERENCE_HEIGHT,
    width: int = REFERENCE_WIDTH,
) -> np.ndarray:
    """A clip of a random scene moving at `speed` reference pixels per second: uint8 RGB, (num_frames, height, width, 3).

    Raises ValueError when the shape would leave the frame.
    """
    scale = _scale(height, width)
    step = speed / fps
    scene = draw_scene(
        rng,
        motion=motion,
        distance=step * (num_frames - 1),
        frame_height=height / scale,
        frame_width=width / scale,
    )
    x_step, y_step = DIRECTIONS[motion]
    x, y = scene.start
    centers = [(x + x_step * step * i, y + y_step * step * i) for i in range(num_frames)]
    return np.stack([render_frame(scene, center, height=height, width=width) for center in centers])


def write_demo(
    folder: str | os.PathLike[str],
    *,
    clips: int = 24,
    motion: Motion = "down",
    seed: int = 0,
    num_frames: int = 30,
    fps: int = 24,
    height: int = 2 * REFERENCE_HEIGHT,
    width: int = 2 * REFERENCE_WIDTH,
    motion_bucket: float = DEMO_MOTION_BUCKET,
) -> list[Path]:
    """Writes `clips` H.264 files `demo-0000.mp4`, ... into `folder` and returns their paths.

    Clip i depends on (seed, i) and the settings only, so a second run writes the same bytes.
    Raises UsageError when `folder` cannot be written to.
    """
    folder = Path(folder)
    _make_folder(folder)
    paths = []
    for index in range(clips):
        frames = render_clip(
            np.random.default_rng([seed, index]),
            motion=motion,
            num_frames=num_frames,
            fps=fps,
            speed=speed_of_bucket(motion_bucket),
            height=height,
            width=width,
        )
        path = folder / f"demo-{index:04d}.mp4"
        try:
            _write_h264_atomically(path, frames, fps)
        except OSError as error:
            raise UsageError(_not_writable(folder, error)) from error
        paths.append(path)
    return paths


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(_not_writable(folder, error)) from error


def _not_writable(folder: Path, error: OSError) -> str:
    in_the_way = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    why = f"{in_the_way} is a file, not a folder" if in_the_way else error.strerror or error
    return f"{folder}: demo clips cannot be written there: {why}. Give a folder that can be written to."


def measure_displacement(frames: np.ndarray) -> tuple[float, float]:
    """How far the shape moved from the first to the last frame: (dx, dy) in pixels, right and down positive.

    `frames`: uint8 RGB, (t, h, w, 3). Each frame's shape is located by the centroid of the colour distance from the
    frame's background; distances below half the largest do not count, which keeps blur and faint ghosts out.
    """
    first, last = _locate(frames[0]), _locate(frames[-1])
    return last[0] - first[0], last[1] - first[1]


def _scale(height: int, width: int) -> float:
    return min(height / REFERENCE_HEIGHT, width / REFERENCE_WIDTH)


def _draw_start(rng: np.random.Generator, extent: float, radius: float, travel: float, motion: str) -> float:
    low = radius + max(0.0, -travel)
    high = extent - radius - max(0.0, travel)
    if low > high:
        raise ValueError(
            f"a shape of radius {radius:.1f} moving {motion} by {abs(travel):.1f} leaves a frame of {extent:g} "
            "(reference pixels): fewer frames, a lower speed or a higher fps"
        )
    return float(rng.uniform(low, high))


def _warm_color(rng: np.random.Generator) -> tuple[float, float, float]:
    hue = rng.uniform(-20.0, 62.0) % 360.0
    return colorsys.hsv_to_rgb(hue / 360.0, rng.uniform(0.8, 1.0), rng.uniform(0.85, 1.0))


def _cool_color(rng: np.random.Generator) -> tuple[float, float, float]:
    hue = rng.uniform(195.0, 240.0)
    return colorsys.hsv_to_rgb(hue / 360.0, rng.uniform(0.3, 0.7), rng.uniform(0.08, 0.45))


def _background(scene: Scene, x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """The gradient between the two background colours, (h, w, 3)."""
    along = (x / width - 0.5) * np.cos(scene.gradient_angle) + (y / height - 0.5) * np.sin(scene.gradient_angle)
    mix = np.clip(along + 0.5, 0.0, 1.0)[..., None].astype(np.float32)
    first, second = (np.asarray(color, dtype=np.float32) for color in scene.background)
    return first * (1.0 - mix) + second * mix


def _signed_distance(kind: Kind, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in reference pixels, negative inside, (h, w). All kinds fit a circle of `radius`."""
    if kind == "disc":
        return np.hypot(dx, dy) - radius
    if kind == "square":
        return np.maximum(abs(dx), abs(dy)) - radius * 0.8
    if kind == "diamond":
        return (abs(dx) + abs(dy) - radius) * np.sqrt(0.5)
    # An upright equilateral triangle: the largest of the distances to its three sides.
    slanted = abs(dx) * np.sqrt(0.75) - dy * 0.5
    return np.maximum(slanted, dy) - radius * 0.5


def _locate(frame: np.ndarray) -> tuple[float, float]:
    """Centroid (x, y) of what differs from the background of one uint8 (h, w, 3) frame."""
    rgb = frame.astype(np.float32)
    distance = np.linalg.norm(rgb - _fit_background(rgb), axis=-1)
    weight = np.clip(distance - 0.5 * distance.max(), 0.0, None)
    total = max(float(weight.sum()), 1e-6)
    rows, columns = np.indices(weight.shape)
    return float((weight * columns).sum()) / total, float((weight * rows).sum()) / total


def _fit_background(rgb: np.ndarray) -> np.ndarray:
    """The plane through the colours of a float (h, w, 3) frame, refitted without its outliers: the shape."""
    rows, columns = np.indices(rgb.shape[:2])
    basis = np.stack([np.ones(rows.size), rows.ravel() / rgb.shape[0], columns.ravel() / rgb.shape[1]], axis=1)
    colors = rgb.reshape(-1, 3).astype(np.float64)
    background = np.broadcast_to(np.median(colors, axis=0), colors.shape)
    for _ in range(3):
        distance = np.linalg.norm(colors - background, axis=1)
        keep = distance <= np.quantile(distance, 0.7)
        background = basis @ np.linalg.lstsq(basis[keep], colors[keep], rcond=None)[0]
    return background.reshape(rgb.shape)


def _write_h264_atomically(path: Path, frames: np.ndarray, fps: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    _write_h264(partial, frames, fps)
    os.replace(partial, path)


def _write_h264(path: Path, frames: np.ndarray, fps: int) -> None:
    """Encodes uint8 RGB (t, h, w, 3), height and width even, as H.264 4:2:0, playable before it is fully loaded."""
    import av

    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18", "preset": "medium"}
        # The bytes must not depend on the number of cores.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_rgb_to_yuv420(frame), format="yuv420p")))
        container.mux(stream.encode())


def _rgb_to_yuv420(rgb: np.ndarray) -> np.ndarray:
    """uint8 RGB (h, w, 3) to the stacked planes of BT.601 limited-range YUV 4:2:0, uint8 (3 h / 2, w).

    Here and not in libswscale, whose rounding depends on where its buffers happen to lie in memory.
    """
    height, width, _ = rgb.shape
    luma, blue, red = np.moveaxis(rgb.astype(np.float32) @ _BT601.T + np.array([16, 128, 128], np.float32), -1, 0)
    halved = (plane.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)) for plane in (blue, red))
    return np.concatenate([plane.round().astype(np.uint8).reshape(-1, width) for plane in (luma, *halved)])
