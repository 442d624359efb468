"""The numbers of a video: those of the training, where it recorded them, and those that a person asked for instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from svdtune.config.schema import Memory, Train
from svdtune.errors import ModelError, UsageError
from svdtune.model.facts import TINY
from svdtune.sample.sampler import SampleSettings
from svdtune.sample.subject import Subject
from svdtune.sample.video import Resize

_RELEASED = (576, 1024)
"""Height and width that SVD was trained at. Its JSON says 96 latents, which is neither."""
_TINY = (64, 96)
_SVD = {
    "fps": 7,
    "motion_bucket": 127,
    "noise_aug_strength": 0.02,
    "inference_steps": 25,
    "guidance": (1.0, 3.0),
    "resize": "cover",
}
"""For a base that says nothing of its training: as SVD's authors sample it."""
_COMPARED = ("num_frames", "fps", "motion_bucket", "height", "width")
"""What a training fixes; the sampler's own numbers are free."""


@dataclass(frozen=True)
class Asked:
    """What a person asks for instead of the training's numbers."""

    num_frames: int | None = None
    fps: float | None = None
    motion_bucket: float | None = None
    noise_aug_strength: float | None = None
    steps: int | None = None
    guidance_min: float | None = None
    guidance_max: float | None = None
    height: int | None = None
    width: int | None = None
    decode_chunk: int | None = None


@dataclass(frozen=True)
class Shot:
    """How every video of one command is made."""

    settings: SampleSettings
    height: int
    width: int
    resize: Resize


def plan_shot(subject: Subject, asked: Asked) -> Shot:
    """By the training of `subject`, changed as `asked`. Raises UsageError for a value out of range.

    Raises CheckpointError when a run's manifest lacks a number, ModelError when notes hold something that is none.
    """
    known = _known(subject)
    try:
        shot = _shot(subject, known)
        given = {
            "num_frames": asked.num_frames,
            "fps": asked.fps,
            "motion_bucket_id": asked.motion_bucket,
            "noise_aug_strength": asked.noise_aug_strength,
            "num_inference_steps": asked.steps,
            "min_guidance_scale": asked.guidance_min,
            "max_guidance_scale": asked.guidance_max,
            "decode_chunk_size": asked.decode_chunk,
        }
        settings = replace(shot.settings, **_set(given))
        shot = replace(shot, settings=settings, **_set({"height": asked.height, "width": asked.width}))
        _require_latents(shot, subject.facts.f)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{subject.source}: its notes of the training (conventions) hold something else than numbers ({error}). Export it again."
        ) from error
    return shot


def other_than_trained(subject: Subject, shot: Shot) -> str:
    """`num_frames: 14, trained with 25; ...`; empty where all is as trained, or nothing is known of the training."""
    made = {
        "num_frames": shot.settings.num_frames,
        "fps": shot.settings.fps,
        "motion_bucket": shot.settings.motion_bucket_id,
        "height": shot.height,
        "width": shot.width,
    }
    trained = {key: subject.conventions[key] for key in _COMPARED if key in subject.conventions}
    return "; ".join(f"{key}: {made[key]:g}, trained with {old:g}" for key, old in trained.items() if made[key] != old)


def _known(subject: Subject) -> dict[str, Any]:
    keys = ("num_frames", "height", "width", *_SVD)
    recorded = {key: subject.conventions[key] for key in keys if key in subject.conventions}
    if subject.checkpoint is not None:
        return {key: recorded[key] if key in recorded else subject.checkpoint.convention(key) for key in keys}
    height, width = _size(subject)
    return {"num_frames": subject.facts.num_frames, "height": height, "width": width, **_SVD, **recorded}


def _size(subject: Subject) -> tuple[int, int]:
    """Of a base without notes, from the UNet's `sample_size` (in latents)."""
    size, f = subject.configs.unet.get("sample_size"), subject.facts.f
    if subject.configs.source == TINY:
        return _TINY
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0] * f, size[1] * f
    return (size * f, size * f) if isinstance(size, int) and size != 96 else _RELEASED


def _shot(subject: Subject, known: dict[str, Any]) -> Shot:
    low, high = known["guidance"]
    config = subject.checkpoint.config if subject.checkpoint else None
    settings = SampleSettings(
        num_frames=known["num_frames"],
        fps=known["fps"],
        motion_bucket_id=known["motion_bucket"],
        noise_aug_strength=known["noise_aug_strength"],
        num_inference_steps=known["inference_steps"],
        min_guidance_scale=low,
        max_guidance_scale=high,
        decode_chunk_size=subject.conventions.get("vae_chunk", (config.memory if config else Memory()).vae_chunk),
        precision=(config.train if config else Train()).precision,
    )
    if known["resize"] not in ("cover", "pad", "squash"):
        raise ValueError(f"resize: {known['resize']!r}")
    return Shot(settings, known["height"], known["width"], known["resize"])


def _require_latents(shot: Shot, f: int) -> None:
    for key in ("height", "width"):
        size = getattr(shot, key)
        if size < f or size % f:
            low = max(f, size // f * f)
            near = f"{low}" if size < f else f"{low} or {low + f}"
            raise UsageError(
                f"{key}: got {size}, expected a multiple of {f}, as the VAE makes one latent of {f} x {f} pixels. Nearest: {near}."
            )


def _set(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}
