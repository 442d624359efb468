"""How progress is seen: held-out loss at fixed sigmas with fixed noise, sample videos, and the contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svdtune.config.schema import Config, Data
from svdtune.contracts import Batch, VideoBatch, move
from svdtune.data.cached import cached_clips
from svdtune.data.dataset import read_clip
from svdtune.data.held_out import held_out_batches
from svdtune.data.index import index_video
from svdtune.data.latents import read_index
from svdtune.data.loader import collate_cached
from svdtune.data.readers import open_reader
from svdtune.diffusion.conditioning import unpacked
from svdtune.diffusion.draws import fixed_draws
from svdtune.sample.sampler import SampleSettings, build_pipeline, sample_video
from svdtune.sample.sheet import contact_sheet
from svdtune.sample.video import read_image, write_mp4
from svdtune.trainer.agreement import Agreement
from svdtune.trainer.build import Session, for_samples_alone
from svdtune.trainer.sharding import gathered
from svdtune.trainer.step import denoise, encode


@dataclass(frozen=True)
class Subject:
    """A first frame (c, h, w) in [-1, 1] to sample a video from, and the true clip uint8 (t, h, w, 3) where one is known."""

    name: str
    image: Tensor
    truth: np.ndarray | None


@dataclass(frozen=True)
class Validator:
    """The fixed clips and subjects of a run; clips are decoded once and kept on the CPU."""

    session: Session
    agreement: Agreement = field(default_factory=Agreement)
    """Whether to go on is asked between clips and between sampler steps."""

    @cached_property
    def clips(self) -> Sequence[Batch]:
        """The held-out clips of the held-out loss, one per batch, the same on every rank."""
        config = self.session.config
        if config.data.latents:
            index = read_index(config)
            found = cached_clips(config.data, index, index.loss, config.validation.clips)
            return [collate_cached(config.data, [clip]) for clip, _ in found]
        return self._decode(config.validation.clips)

    @cached_property
    def subjects(self) -> list[Subject]:
        """What sample videos start from: the given images, or held-out clips (training clips when none is held out)."""
        config = self.session.config
        if config.validation.images:
            paths = [Path(image) for image in config.validation.images]
            return [
                _image_subject(name, path, config.data) for name, path in zip(unique_names(paths), paths, strict=True)
            ]
        if config.data.latents:
            return _cached_subjects(config)
        batches = self._decode(config.validation.samples, fall_back=True)
        names = unique_names([Path(batch.names[0]) for batch in batches])
        return [Subject(name, b.pixels[0, 0], to_uint8(b.pixels[0])) for name, b in zip(names, batches, strict=True)]

    def held_out_loss(self) -> dict[str, float]:
        """Mean loss over the held-out clips, in all and per sigma; {} without. Called on every rank, within `inference`.

        Raises Halt on every rank when one of them wants to stop.
        """
        session, sigmas = self.session, self.session.config.validation.sigmas
        if not self.clips:
            return {}
        accelerator, device = session.accelerator, session.accelerator.device
        parts = replace(session.parts, unet=session.model.unet)
        sums = torch.zeros(len(sigmas), device=device)
        with torch.no_grad():
            for clip in self._own_clips():
                axes, batch = clip.axes(parts.facts), move(clip, device)
                seed, conditioning = session.config.run.seed, session.config.conditioning
                draws = fixed_draws(clip.sample.tolist(), 1.0, axes, seed=seed, conditioning=conditioning)
                draws = move(draws, device)
                encoded = encode(parts, batch, draws)
                at = (replace(draws, sigma=torch.full_like(draws.sigma, sigma)) for sigma in sigmas)
                sums += torch.stack([denoise(parts, encoded, batch, draw).loss for draw in at])
        summed: Any = accelerator.reduce(sums, reduction="sum")
        losses = (summed / len(self.clips)).tolist()
        by_sigma = {f"held_out_loss/sigma {sigma:g}": loss for sigma, loss in zip(sigmas, losses, strict=True)}
        return {"held_out_loss": fmean(losses), **by_sigma}

    def sample_videos(self, step: int) -> dict[str, Path]:
        """One mp4 per subject in samples/step-XXXXXX/, its first frame as samples/<name>.png; by name.

        On the main process alone, within `inference`.
        Raises Halt when this process wants to stop; videos that are not whole are not there then.
        """
        folder = sample_folder(self.session, step)
        folder.mkdir(parents=True, exist_ok=True)
        videos = {}
        for subject in self.subjects:
            frames = self._sample(subject)
            videos[subject.name] = folder / f"{subject.name}.mp4"
            Image.fromarray(to_uint8(subject.image[None])[0]).save(folder.parent / f"{subject.name}.png")
            write_mp4(videos[subject.name], frames, self.session.config.data.fps)
        return videos

    def sheet(self, step: int) -> Path | None:
        """contact_sheet.png: first frame, base (the samples of step 0), fine-tuned (of `step`), truth; None if unsampled."""
        rows: list[tuple[str, np.ndarray]] = []
        for subject in self.subjects:
            base, tuned = (load_frames(sample_folder(self.session, s) / f"{subject.name}.mp4") for s in (0, step))
            first = to_uint8(subject.image[None])
            candidates = [("first frame", first), ("base", base), ("fine-tuned", tuned), ("truth", subject.truth)]
            rows += [(label, frames) for label, frames in candidates if frames is not None]
        if not rows:
            return None
        path = self.session.folder.path / "contact_sheet.png"
        contact_sheet(path, rows)
        return path

    def _own_clips(self) -> Iterator[Batch]:
        """The held-out clips of this rank; all ranks come here equally often, also those that have no clip left."""
        accelerator = self.session.accelerator
        for first in range(0, len(self.clips), accelerator.num_processes):
            self.agreement.check()
            yield from self.clips[first:][accelerator.process_index :][:1]
            self._beat()

    def _beat(self) -> None:
        if self.session.accelerator.is_main_process:
            self.session.folder.beat()

    def _on_step(self) -> None:
        self._beat()
        self.agreement.glance()

    def _sample(self, subject: Subject) -> np.ndarray:
        session, model = self.session, self.session.model
        pipeline = build_pipeline(model.unet, model.vae, model.image_encoder, dict(model.configs.scheduler),
                                  dict(model.configs.feature_extractor))  # fmt: skip
        settings, seed = SampleSettings.from_config(session.config), session.config.run.seed
        with at_hand(session):
            return sample_video(pipeline, subject.image, settings, seed=seed, on_step=self._on_step)

    def _decode(self, count: int, *, fall_back: bool = False) -> list[VideoBatch]:
        catalog, config = self.session.catalog, self.session.config
        files = catalog.held_out or (catalog.train if fall_back else ())
        if not files or not count:
            return []
        return list(held_out_batches(config.data, files, clips=count, seed=config.run.seed, batch_size=1))


@contextmanager
def inference(session: Session) -> Iterator[None]:
    """Eval mode, whole parameters, with the EMA weights in place where there are some; all comes back as it was afterwards.

    Entered by every rank; inside they need not do the same.
    """
    unet, ema, trained = session.model.unet, session.ema, list(session.trained.values())
    unet.eval()
    if ema is not None:
        ema.store(trained)
        ema.copy_to(trained)
    try:
        with gathered(unet, session.sharding):
            yield
    finally:
        if ema is not None:
            ema.restore(trained)
        unet.train()


@contextmanager
def at_hand(session: Session) -> Iterator[None]:
    """What sample videos alone need, on the device inside."""
    parts = for_samples_alone(session.model, session.config)
    for part in parts:
        part.to(session.accelerator.device)
    try:
        yield
    finally:
        for part in parts:
            part.to("cpu")


def sample_folder(session: Session, step: int) -> Path:
    """Where the sample videos of a step lie."""
    return session.folder.samples / f"step-{step:06d}"


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(t, c, h, w) in [-1, 1] to uint8 (t, h, w, c)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def unique_names(paths: Sequence[Path]) -> list[str]:
    """File stems; a stem that came before gets a number: another window of one clip, or its namesake in another folder."""
    seen: Counter[str] = Counter()
    names = []
    for path in paths:
        seen[path.stem] += 1
        names.append(path.stem if seen[path.stem] == 1 else f"{path.stem}~{seen[path.stem]}")
    return names


def _cached_subjects(config: Config) -> list[Subject]:
    """First frames from the cache; the truth from the video file, where that is on this machine."""
    index = read_index(config)
    clips = list(cached_clips(config.data, index, index.subjects, config.validation.samples))
    names = unique_names([Path(clip.name) for clip, _ in clips])
    return [
        Subject(name, unpacked(clip.tensors["first_frame"]), _truth(config.data, clip.name, start))
        for name, (clip, start) in zip(names, clips, strict=True)
    ]


def _truth(data: Data, name: str, start: int) -> np.ndarray | None:
    path = Path(data.root) / name
    return to_uint8(read_clip(data, index_video(path), start_frame=start)) if path.is_file() else None


def _image_subject(name: str, path: Path, data: Data) -> Subject:
    image = read_image(path, height=data.height, width=data.width, resize=data.resize)
    return Subject(name, image, None)


def load_frames(video: Path) -> np.ndarray | None:
    """uint8 (t, h, w, 3) of a video file; None when there is none."""
    if not video.is_file():
        return None
    index = index_video(video)
    with closing(open_reader(index, "pyav")) as reader:
        return reader.read(range(len(index.pts)))
