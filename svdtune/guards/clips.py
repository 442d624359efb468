"""The clips, from their headers alone: readable, long enough, fast enough, of a shape that the frame can use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, floor
from pathlib import Path

import numpy as np

from svdtune.config.schema import Config, Data
from svdtune.data.catalog import find_videos, index_files, linked_folders, split
from svdtune.data.clips import latest_start, repeated
from svdtune.data.index import VideoIndex
from svdtune.data.readers import decord_objection
from svdtune.errors import DataError
from svdtune.guards.findings import Finding
from svdtune.guards.latents import check_latents

_SAMPLED, _HELD_OUT = 64, 32
"""Files looked at by default, and of the held-out ones on top."""
_NAMED = 3
_FEW = 0.05
"""A share of files below which a shape that fits badly is not worth a warning."""
_REPEATED = 0.1
"""A share of frames on screen twice from which on a file has gaps."""
_KEPT = 0.5
"""Less than this of the picture, or of the frame, is too little."""
_UPSCALED = 2.0
_HEAD = 1 << 16


@dataclass(frozen=True)
class _Seen:
    """The files that were looked at."""

    data: Data
    total: int
    """All files below data.root."""
    indexes: tuple[VideoIndex, ...]
    unreadable: tuple[tuple[Path, str], ...]

    @property
    def looked(self) -> int:
        return len(self.indexes) + len(self.unreadable)

    def fits(self, index: VideoIndex, **changed: float) -> bool:
        """Whether the file gives a clip, also with other `num_frames` or `fps`."""
        options = {"num_frames": self.data.num_frames, "fps": self.data.fps, **changed}
        try:
            latest_start(index, num_frames=int(options["num_frames"]), fps=options["fps"])
        except DataError:
            return False
        return True

    def used(self, index: VideoIndex, **changed: float) -> bool:
        """Whether the file gives a clip, and to the decoder that is asked for."""
        return self.fits(index, **changed) and not (self.data.decoder == "decord" and decord_objection(index))

    def usable(self, **changed: float) -> int:
        """How many files are used."""
        return sum(self.used(index, **changed) for index in self.indexes)

    def share(self, files: Sequence[VideoIndex] | Sequence[Path]) -> str:
        """`3 of 64 files looked at (of 900 in all; --all looks at every one): a.mp4, b.mp4, c.mp4`."""
        if self.total == 1:
            return str(_path(files[0]))
        names = ", ".join(_path(file).name for file in files[:_NAMED]) + (", ..." if len(files) > _NAMED else "")
        if self.looked < self.total:
            return f"{len(files)} of {self.looked} files looked at (of {self.total}; --all looks at every one): {names}"
        return f"{len(files)} of {self.total} files: {names}"

    def where(self, files: Sequence[VideoIndex] | Sequence[Path]) -> str:
        """The file when it is one, else the folder."""
        return str(_path(files[0])) if len(files) == 1 else self.data.root


def check_clips(config: Config, *, exhaustive: bool = False) -> list[Finding]:
    """DAT301 and following, from the headers of a sample of the files (all with `exhaustive`), and of validation.images."""
    cached = check_latents(config) if config.data.latents else []
    if config.data.latents and not Path(config.data.root).is_dir():
        return [*cached, *_images(config)]  # the videos are elsewhere, and nothing will open them
    return [*cached, *_check_files(config, exhaustive), *_images(config)]


def _first_batch(config: Config, seen: _Seen) -> list[Finding]:
    from svdtune.guards.batch import check_batch
    from svdtune.guards.table import facts_of

    facts = facts_of(config)
    files = [index for index in seen.indexes if seen.used(index)]
    if facts is None or not files or config.data.height % facts.f or config.data.width % facts.f:
        return []  # said by the stages config and checkpoint
    return check_batch(config, facts, files)


def _check_files(config: Config, exhaustive: bool) -> list[Finding]:
    data = config.data
    try:
        paths = find_videos(data.root)
    except DataError as error:
        return [Finding("DAT301", "error", "data.root", str(error).removeprefix("data.root: ")), *_links(data)]
    chosen = paths if exhaustive else sample(paths, data)
    seen = _look(data, paths, chosen)
    if not seen.usable() and len(chosen) < len(paths):
        seen = _look(data, paths, paths)
    found = [*_unreadable(seen), *_slow(seen), *_short(seen), *_decord(seen)]
    if not seen.usable():
        found = [_no_clips(seen), *(replace(finding, severity="error") for finding in found)]
    gaps = _gaps(seen)
    batch = [finding for finding in _first_batch(config, seen) if not (gaps and finding.code == "DAT314")]
    return [*found, *_aspect(seen), *_small(seen), *_copies(seen), *_nothing_held_out(config, seen),
            *_interlaced(seen), *gaps, *_links(data), *batch]  # fmt: skip


def sample(paths: Sequence[Path], data: Data) -> list[Path]:
    """At most 64 of `paths`, chosen by a hash of their names so that it stays the same, and up to 32 held-out ones."""
    root = Path(data.root)
    names = [path.relative_to(root).as_posix() for path in paths]
    by_hash = sorted(range(len(paths)), key=lambda i: hashlib.sha256(b"sample:" + names[i].encode()).digest())
    held_out = set(split(names, data.holdout)[1])
    chosen = {*by_hash[:_SAMPLED], *[i for i in by_hash if i in held_out][:_HELD_OUT]}
    return [paths[i] for i in sorted(chosen)]


def _look(data: Data, paths: Sequence[Path], chosen: Sequence[Path]) -> _Seen:
    read = index_files(data.root, paths, chosen)
    indexes = tuple(item for item in read if isinstance(item, VideoIndex))
    broken = tuple((p, str(e)) for p, e in zip(chosen, read, strict=True) if isinstance(e, DataError))
    return _Seen(data, len(paths), indexes, broken)


def _no_clips(seen: _Seen) -> Finding:
    return Finding(
        "DAT301", "error", "data.root", f"none of the {seen.total} file(s) in {seen.data.root} can be used",
        "at least one clip to train on", "The other findings of this stage say why each is left out.",
    )  # fmt: skip


def _them(files: Sequence[object]) -> str:
    return "it" if len(files) == 1 else "them"


def _left_out(seen: _Seen) -> str:
    if seen.data.on_bad_clip == "error":
        return "data.on_bad_clip=error stops the run at such a file."
    return "data.on_bad_clip=skip leaves such files out of training."


def _unreadable(seen: _Seen) -> list[Finding]:
    if not seen.unreadable:
        return []
    paths = [path for path, _ in seen.unreadable]
    first = seen.unreadable[0][1].removeprefix(f"{paths[0]}: ")
    got = first if len(paths) == 1 else f"{seen.share(paths)}; the first {first}"
    fix = f"Mend or remove {_them(paths)}"
    fix += "." if seen.data.on_bad_clip == "skip" else ", or set data.on_bad_clip=skip."
    if len(paths) == 1 and "remove it" in first.lower():
        fix = ""  # said already, with the way to mend it
    return [_finding("DAT302", seen, paths, got, "a video that can be read", _left_out(seen), fix)]


def _slow(seen: _Seen) -> list[Finding]:
    """Files whose real frame rate is below data.fps: with one frame any length is enough, so only the rate can refuse."""
    slow = [index for index in seen.indexes if not seen.fits(index, num_frames=1)]
    if not slow:
        return []
    rates = sorted(index.fps for index in slow)
    got = f"{_span(rates, 'frames per second')}: {seen.share(slow)}"
    why = f"At data.fps={seen.data.fps:g} frames would repeat, and the model would learn to stutter. {_left_out(seen)}"
    lower = [floor(rate * 10 + 1e-6) / 10 for rate in rates]
    patch = _best(seen, "fps", [rate for rate in lower if rate >= 1]) if _most(seen, slow) else ()
    fix = f"Set {patch[0]}." if patch else f"Lower data.fps, or remove {_them(slow)}."
    stalls = [index for index in slow if 1 / index.frame_seconds >= seen.data.fps]
    if len(stalls) == len(slow):
        why = f"{why} Most of their frames come {1 / stalls[0].frame_seconds:.3g} times a second, but there are gaps without any."
        fix, patch = f"Cut the gaps out, or remove {_them(slow)}.", ()
    return [_finding("DAT305", seen, slow, got, f"at least data.fps={seen.data.fps:g}", why, fix, patch)]


def _short(seen: _Seen) -> list[Finding]:
    """Files that are fast enough and still give no clip are too short."""
    data = seen.data
    short = [index for index in seen.indexes if seen.fits(index, num_frames=1) and not seen.fits(index)]
    if not short:
        return []
    needed = (data.num_frames - 1) / data.fps
    lengths = sorted(index.duration for index in short)
    got = f"{_span(lengths, 's from first to last frame')}: {seen.share(short)}"
    expected = f"{needed:.2f} s for data.num_frames={data.num_frames} at data.fps={data.fps:g}"
    faster = [ceil((data.num_frames - 1) / length * 10) / 10 for length in lengths if length > 0]
    fewer = [floor(length * data.fps + 1e-6) + 1 for length in lengths]
    patch = ()
    if _most(seen, short):
        patch = _best(seen, "fps", [fps for fps in faster if fps <= 30])
        patch = patch or _best(seen, "num_frames", [count for count in fewer if count >= 2])
    fix = f"Set {patch[0]}." if patch else f"Raise data.fps, lower data.num_frames, or remove {_them(short)}."
    return [_finding("DAT304", seen, short, got, expected, _left_out(seen), fix, patch)]


def _gaps(seen: _Seen) -> list[Finding]:
    """DAT314: files that are fast enough on average, with gaps in which one frame stays on screen."""
    shares = {index: repeated(index, seen.data.fps) for index in seen.indexes if seen.used(index)}
    stalled = [index for index, share in shares.items() if share >= _REPEATED]
    if not stalled:
        return []
    longest = max(float(np.diff(index.times).max()) for index in stalled)
    worst = max(shares[index] for index in stalled)
    got = f"up to {worst:.0%} of the frames at data.fps={seen.data.fps:g} are the one before again, in gaps of up to {longest:.2g} s"
    got = f"{got}: {seen.share(stalled)}"
    why = "The model would learn to stand still and jump: recordings of a screen, or cut pieces, hold no frames for what stands still."
    fix = f"Cut the gaps out, or remove {_them(stalled)}."
    return [Finding("DAT314", "warning", seen.where(stalled), got, "a new frame for each moment", why, fix)]


def _most(seen: _Seen, files: Sequence[VideoIndex]) -> bool:
    """One odd file is no reason to change the run: more than half are."""
    return len(files) * 2 > len(seen.indexes)


def _best(seen: _Seen, key: str, values: Sequence[float]) -> tuple[str, ...]:
    """The mildest of `values` that lets nearly all files give a clip, or the one that lets most; () when none helps."""
    counts = {value: seen.usable(**{key: value}) for value in set(values)}
    top = max(counts.values(), default=0)
    if top * 2 <= len(seen.indexes):
        return ()
    now = getattr(seen.data, key)
    value = min((v for v, count in counts.items() if count >= 0.9 * top), key=lambda v: abs(v - now))
    return (f"data.{key}={value:g}",)


def _span(values: Sequence[float], unit: str) -> str:
    low, high = f"{values[0]:.2f}", f"{values[-1]:.2f}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _aspect(seen: _Seen) -> list[Finding]:
    data = seen.data
    wrong = [index for index in seen.indexes if _kept(index, data.height, data.width) < _KEPT]
    if len(wrong) <= _FEW * len(seen.indexes):
        return []
    worst = min(_kept(index, data.height, data.width) for index in wrong)
    loss = {
        "cover": f"Cropping the centre throws away {1 - worst:.0%} of the picture.",
        "pad": f"Black borders fill {1 - worst:.0%} of the frame, and the model learns to paint them.",
        "squash": f"Pictures are stretched {1 / worst:.1f} times in one direction.",
    }[data.resize]
    first = wrong[0]
    got = f"{first.width}x{first.height} (width x height) and the like: {seen.share(wrong)}"
    turned = [index for index in wrong if _kept(index, data.width, data.height) >= _KEPT]
    patch = (f"data.height={data.width}", f"data.width={data.height}") if len(turned) * 2 > len(seen.indexes) else ()
    fix = (
        f"Set {' '.join(patch)}."
        if patch
        else "Choose data.height and data.width of the clips' shape, or crop the files."
    )
    return [Finding("DAT306", "warning", seen.where(wrong), got, f"about {data.width}x{data.height}", loss, fix, patch)]


def _kept(index: VideoIndex, height: int, width: int) -> float:
    """How much of the picture is left after a centre crop to the frame's shape; the same share of the frame a padded one fills."""
    ratio = index.width * index.pixel_aspect / index.height / (width / height)
    return min(ratio, 1 / ratio)


def _small(seen: _Seen) -> list[Finding]:
    data = seen.data
    scales = {index: _scale(index, data) for index in seen.indexes}
    small = [index for index, scale in scales.items() if scale > _UPSCALED]
    if len(small) <= _FEW * len(seen.indexes):
        return []
    got = f"{small[0].width}x{small[0].height} (width x height) and the like: {seen.share(small)}"
    expected = f"at least half of data.width x data.height = {data.width}x{data.height}"
    why = f"They are scaled up {max(scales.values()):.1f} times, and the model learns their blur."
    patch = _smaller(data, sorted(scales.values())[len(scales) // 2]) if _most(seen, small) else ()
    fix = f"Set {' '.join(patch)}, or take larger clips." if patch else f"Take larger clips, or remove {_them(small)}."
    return [Finding("DAT307", "warning", seen.where(small), got, expected, why, fix, patch)]


def _scale(index: VideoIndex, data: Data) -> float:
    """How many times a picture is enlarged, in the direction that is enlarged most."""
    scales = data.height / index.height, data.width / (index.width * index.pixel_aspect)
    return min(scales) if data.resize == "pad" else max(scales)


def _smaller(data: Data, scale: float) -> tuple[str, ...]:
    step = 64 if data.height % 64 == data.width % 64 == 0 else 8
    height, width = (max(step, round(size / scale / step) * step) for size in (data.height, data.width))
    return f"data.height={height}", f"data.width={width}"


def _decord(seen: _Seen) -> list[Finding]:
    if seen.data.decoder != "decord":
        return []
    refused = [index for index in seen.indexes if decord_objection(index)]
    if not refused:
        return []
    got = f"{decord_objection(refused[0])}: {seen.share(refused)}"
    why = f"decord would return wrong pictures, so svdtune does not let it read them. {_left_out(seen)}"
    patch = ("data.decoder=auto",)
    return [
        _finding("DAT308", seen, refused, got, "files that decord reads rightly", why, "Set data.decoder=auto.", patch)
    ]


def _copies(seen: _Seen) -> list[Finding]:
    """Files equal to the byte: all of them, or on both sides of the held-out split."""
    names = {index: index.path.relative_to(Path(seen.data.root)).as_posix() for index in seen.indexes}
    usable = [index for index in seen.indexes if seen.used(index)]
    groups = _equal(usable)
    if len(usable) > 1 and groups and len(groups[0]) == len(usable):
        got = f"all {len(usable)} files looked at are copies of one"
        return [Finding("DAT309", "warning", "data.root", got, "different clips", "The model would learn one clip by heart, and "
                        "the held-out loss cannot show it.", "Put different clips into data.root.")]  # fmt: skip
    _, held = split([names[index] for index in usable], seen.data.holdout) if seen.looked == seen.total else ([], [])
    held_out = {usable[i] for i in held}
    both = [pair for group in groups if (pair := _across(group, held_out))]
    if not both:
        return []
    one, other = both[0]
    got = f"{len(both)} held-out file(s) equal a training file: {names[one]} = {names[other]}"
    return [Finding("DAT309", "warning", "data.root", got, "held-out files that are not trained on", "The held-out loss of such "
                    "a file falls because it is trained on.", "Remove one of each pair.")]  # fmt: skip


def _across(group: Sequence[VideoIndex], held_out: set[VideoIndex]) -> tuple[VideoIndex, VideoIndex] | None:
    held = [index for index in group if index in held_out]
    trained = [index for index in group if index not in held_out]
    return (held[0], trained[0]) if held and trained else None


def _equal(indexes: Sequence[VideoIndex]) -> list[list[VideoIndex]]:
    """Groups of two and more files of equal content, the largest first; whole files are hashed only where their ends agree."""
    groups = [list(indexes)]
    tests: tuple[Callable[[VideoIndex], object], ...] = (_num_bytes, _head, _digest)
    for test in tests:
        groups = [part for group in groups for part in _split_by(group, test) if len(part) > 1]
    return sorted(groups, key=len, reverse=True)


def _split_by(group: Sequence[VideoIndex], test: Callable[[VideoIndex], object]) -> list[list[VideoIndex]]:
    parts: dict[object, list[VideoIndex]] = {}
    for index in group:
        parts.setdefault(test(index), []).append(index)
    return list(parts.values())


def _num_bytes(index: VideoIndex) -> int:
    return index.path.stat().st_size


def _head(index: VideoIndex) -> bytes:
    with index.path.open("rb") as file:
        return hashlib.sha256(file.read(_HEAD)).digest()


def _digest(index: VideoIndex) -> bytes:
    with index.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _nothing_held_out(config: Config, seen: _Seen) -> list[Finding]:
    if config.data.holdout == 0 or config.validation.clips == 0 or seen.looked < seen.total or seen.usable() != 1:
        return []
    return [
        Finding(
            "DAT310", "warning", "data.holdout", "1 usable file, and none left to hold out", "2 or more files",
            "There is no held-out loss, and sample videos start from the clip that is trained on.",
            "Add a file, or say that you want it so: validation.clips=0.", ("validation.clips=0",),
        )
    ]  # fmt: skip


def _interlaced(seen: _Seen) -> list[Finding]:
    files = [index for index in seen.indexes if index.interlaced]
    if not files:
        return []
    why = "Each picture holds two half pictures of different times: moving edges are combs, and the model would learn them."
    fix = "Deinterlace with ffmpeg (-vf bwdif=mode=send_frame)."
    return [
        Finding("DAT312", "warning", seen.where(files), f"interlaced: {seen.share(files)}", "whole pictures", why, fix)
    ]


def _links(data: Data) -> list[Finding]:
    links = linked_folders(data.root) if Path(data.root).is_dir() else []
    if not links:
        return []
    names = ", ".join(map(str, links[:_NAMED])) + (", ..." if len(links) > _NAMED else "")
    why = "Linked folders are not followed, so no clip in them is used."
    fix = "Move the clips there, or give the folder that is linked to as data.root."
    return [Finding("DAT313", "warning", str(links[0]), f"linked: {names}", "folders of their own", why, fix)]


def _images(config: Config) -> list[Finding]:
    """DAT303, with the function that opens them while training."""
    return [finding for image in config.validation.images for finding in _image(config.data, image)]


def _image(data: Data, image: str) -> list[Finding]:
    from svdtune.sample.video import read_image

    read = partial(read_image, height=data.height, width=data.width, resize=data.resize)
    try:
        read(image)
    except DataError as error:
        why = "Sample videos start from this picture, and the run would stop at the first one."
        return [Finding("DAT303", "error", "validation.images", str(error), "a picture that opens", why)]
    return []


def _finding(
    code: str, seen: _Seen, files: Sequence[VideoIndex] | Sequence[Path], got: str, expected: str, why: str, fix: str,
    patch: tuple[str, ...] = (),
) -> Finding:  # fmt: skip
    severity = "error" if seen.data.on_bad_clip == "error" else "warning"
    return Finding(code, severity, seen.where(files), got, expected, why, fix, patch)


def _path(file: VideoIndex | Path) -> Path:
    return file.path if isinstance(file, VideoIndex) else file
