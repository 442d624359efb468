"""`svdtune sample SOURCE IMAGE`: videos of a run, of any model or of a LoRA, by the conventions they were trained with."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdtune.errors import UsageError
from svdtune.sample.images import Picture, find_pictures
from svdtune.sample.output import Place, comment, frame_folder, made_folder, place, require_free, slug
from svdtune.sample.progress import Progress, say
from svdtune.sample.run import Checkpoint, trained_model
from svdtune.sample.sampler import build_pipeline, sample_video
from svdtune.sample.sheet import contact_sheet
from svdtune.sample.shot import Asked, Shot, other_than_trained, plan_shot
from svdtune.sample.side_by_side import side_by_side
from svdtune.sample.sources import Choice, open_subjects
from svdtune.sample.subject import Subject
from svdtune.sample.video import read_image, write_frames, write_mp4

if TYPE_CHECKING:
    import torch
    from diffusers import StableVideoDiffusionPipeline

    from svdtune.model.load import ModelParts


@dataclass(frozen=True)
class Request:
    """One command."""

    choice: Choice
    image: Path
    """A picture, or a folder of pictures."""
    out: Path | None = None
    """An mp4 for one video, else a folder; None: RUN/samples, or samples/ here."""
    seeds: tuple[int, ...] = (0,)
    asked: Asked = field(default_factory=Asked)
    frames: bool = False
    """Each frame as PNG too."""
    sheet: bool = False
    """One contact sheet of all videos."""


@dataclass(frozen=True)
class _Clip:
    """One picture and one seed: each model makes one video of it."""

    picture: Picture
    seed: int

    @property
    def name(self) -> str:
        return f"{self.picture.name}-seed{self.seed}"


def sample(request: Request) -> Iterator[Path]:
    """Make what is asked for; each path once its file is whole. Nothing is written before all of the input was looked at.

    Raises UsageError (no such source, a value out of range), CheckpointError, ModelError, DataError.
    """
    for seed in request.seeds:
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed: got {seed}, expected a whole number from 0 to 2**63 - 1")
    subjects = open_subjects(request.choice)
    shot = plan_shot(subjects[-1], request.asked)
    for subject in subjects:
        _ = subject.facts  # raises for parts that do not belong together
    clips = [_Clip(picture, seed) for picture in find_pictures(request.image) for seed in dict.fromkeys(request.seeds)]
    for clip in clips:
        _first_frame(clip, shot)
    where = place(request.out, request.choice.source, videos=len(subjects) * len(clips))
    work = _Work(request, subjects, clips, _on_device(subjects[-1], shot), where)
    require_free(work.targets())
    for line in dict.fromkeys(other_than_trained(subject, shot) for subject in subjects):
        if line:
            say(line)
    with made_folder(work.target(subjects[-1], clips[0])):
        yield from work.make()


def sample_run(source: str | Path, image: Path, *, asked: Asked | None = None, **chosen: Any) -> Path:
    """`sample` for one video; its path. `chosen` is as in Choice and Request."""
    rest = {key: chosen.pop(key) for key in ("out", "seeds") if key in chosen}
    (path,) = sample(Request(Choice(str(source), **chosen), image, asked=asked or Asked(), **rest))
    return path


def load_pipeline(checkpoint: Checkpoint, precision: str, device: torch.device) -> StableVideoDiffusionPipeline:
    """Base model plus the trained weights of `checkpoint`, on `device`. Raises as `trained_model` does."""
    dtype = _dtype(precision)
    return _pipeline(trained_model(checkpoint, dtype), dtype, device)


@dataclass(frozen=True)
class _Work:
    """Everything found and checked; what is left is to sample."""

    request: Request
    subjects: list[Subject]
    clips: list[_Clip]
    shot: Shot
    place: Place

    def make(self) -> Iterator[Path]:
        """One model after another, the trained ones first: what does not fit its base is told before the base is sampled."""
        progress = Progress(len(self.subjects) * len(self.clips))
        keep = self.request.choice.compare or self.request.sheet
        with ExitStack() as stack:
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svdtune-"))) if keep else None
            for subject in reversed(self.subjects):
                yield from self._videos(subject, progress, kept)
                _free()
            if kept is not None:
                yield from self._together(kept)

    def targets(self) -> list[Path]:
        """Every path that will be written."""
        videos = [self.target(subject, clip) for subject in self.subjects for clip in self.clips]
        together = [path for clip in self.clips for path in self._compared(clip)] if self.request.choice.compare else []
        sheets = [self.place.sheet("contact_sheet")] if self.request.sheet else []
        return [*videos, *(map(frame_folder, videos) if self.request.frames else ()), *together, *sheets]

    def target(self, subject: Subject, clip: _Clip) -> Path:
        """The video of one model; it names the model where there are several."""
        return self.place.video(f"{clip.name}-{slug(subject.label)}" if len(self.subjects) > 1 else clip.name)

    def _compared(self, clip: _Clip) -> tuple[Path, Path]:
        return self.place.video(f"{clip.name}-compare"), self.place.sheet(f"{clip.name}-compare-sheet")

    def _videos(self, subject: Subject, progress: Progress, kept: Path | None) -> Iterator[Path]:
        pipeline = _load(subject, self.shot.settings.precision)
        settings = self.shot.settings
        for clip in self.clips:
            path = self.target(subject, clip)
            what = f"{subject.label} {clip.picture.path.name} seed {clip.seed}"
            with progress.video(what, settings.num_inference_steps, path) as on_step:
                frames = sample_video(
                    pipeline, _first_frame(clip, self.shot), settings, seed=clip.seed, on_step=on_step
                )
                text = comment(self.shot, clip.picture.path, clip.seed, subject.origin())
                if kept is not None:
                    np.save(self._kept(kept, subject, clip), frames)
                if self.request.frames:
                    write_frames(frame_folder(path), frames, text)
                write_mp4(path, frames, settings.fps, comment=text)
            yield path
            if self.request.frames:
                yield frame_folder(path)

    def _together(self, kept: Path) -> Iterator[Path]:
        """The comparisons and the contact sheet, from frames that were kept as they were sampled."""
        if self.request.choice.compare:
            for clip in self.clips:
                rows = [(subject.label, np.load(self._kept(kept, subject, clip))) for subject in self.subjects]
                video, sheet = self._compared(clip)
                text = comment(
                    self.shot, clip.picture.path, clip.seed, *(subject.origin() for subject in self.subjects)
                )
                write_mp4(video, side_by_side(rows), self.shot.settings.fps, comment=text)
                yield video
                contact_sheet(sheet, rows)
                yield sheet
        if self.request.sheet:
            path = self.place.sheet("contact_sheet")
            contact_sheet(
                path,
                [
                    (
                        f"{subject.label}   {clip.picture.path.name}   seed {clip.seed}",
                        np.load(self._kept(kept, subject, clip)),
                    )
                    for clip in self.clips
                    for subject in self.subjects
                ],
            )
            yield path

    def _kept(self, kept: Path, subject: Subject, clip: _Clip) -> Path:
        return kept / f"{self.target(subject, clip).stem}.npy"


def _first_frame(clip: _Clip, shot: Shot) -> torch.Tensor:
    return read_image(clip.picture.path, height=shot.height, width=shot.width, resize=shot.resize)


def _load(subject: Subject, precision: str) -> StableVideoDiffusionPipeline:
    dtype = _dtype(precision)
    return _pipeline(subject.load(dtype), dtype, _device())


def _pipeline(model: ModelParts, dtype: torch.dtype, device: torch.device) -> StableVideoDiffusionPipeline:
    from svdtune.model.attention import use_attention
    from svdtune.model.fold import fold

    fold(model.unet)
    use_attention(model.unet, "auto")
    model.unet.to(device)  # pyright: ignore[reportArgumentType]
    model.vae.to(device)  # pyright: ignore[reportArgumentType]
    model.image_encoder.to(device, dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return build_pipeline(
        model.unet, model.vae, model.image_encoder, model.configs.scheduler, model.configs.feature_extractor
    )


def _free() -> None:
    """Let the memory of a model go before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dtype(precision: str) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _on_device(subject: Subject, shot: Shot) -> Shot:
    """A CPU has no fp16 autocast worth the name, and computes a model that names no precision in float32."""
    if _device().type == "cuda" or (subject.checkpoint is not None and shot.settings.precision == "bf16"):
        return shot
    return replace(shot, settings=replace(shot.settings, precision="no"))
