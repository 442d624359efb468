"""`svdtune sample RUN IMAGE`: the base and the trained weights of a run, sampled by the conventions it was trained with."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from svdtune.errors import UsageError
from svdtune.sample.run import Checkpoint, find_checkpoint, open_checkpoint, trained_model
from svdtune.sample.sampler import SampleSettings, build_pipeline, sample_video
from svdtune.sample.video import read_image, write_mp4

if TYPE_CHECKING:
    import torch
    from diffusers import StableVideoDiffusionPipeline

_FROM_TRAINING = {
    "num_frames": "num_frames",
    "fps": "fps",
    "motion_bucket_id": "motion_bucket",
    "noise_aug_strength": "noise_aug_strength",
    "num_inference_steps": "inference_steps",
}
"""Setting to the name of the manifest's convention."""


def sample_run(
    run: Path,
    image: Path,
    *,
    out: Path | None = None,
    checkpoint: str | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    motion_bucket: float | None = None,
    noise_aug_strength: float | None = None,
    steps: int | None = None,
    guidance_min: float | None = None,
    guidance_max: float | None = None,
    seed: int = 0,
) -> Path:
    """Write a video that starts at `image`, and return its path (default `RUN/samples/<image>-seed<seed>.mp4`).

    `checkpoint` is a folder name under RUN/checkpoints or a step number; None takes the newest whole one. Null settings
    are those of training, from the checkpoint's manifest. The EMA is sampled when the run keeps one.
    Raises UsageError (no such run or checkpoint, a setting out of range), CheckpointError, ModelError, DataError.
    """
    target = _out_file(out, run, image, seed)
    opened = open_checkpoint(find_checkpoint(run, checkpoint))
    given = {
        "num_frames": num_frames,
        "fps": fps,
        "motion_bucket_id": motion_bucket,
        "noise_aug_strength": noise_aug_strength,
        "num_inference_steps": steps,
        "min_guidance_scale": guidance_min,
        "max_guidance_scale": guidance_max,
    }
    settings = trained_settings(opened)
    settings = replace(settings, **{key: value for key, value in given.items() if value is not None})
    size = {key: opened.convention(key) for key in ("height", "width", "resize")}
    first_frame = read_image(image, **size)
    _make_folder(target)
    device, settings = _device(settings)
    pipeline = load_pipeline(opened, settings.precision, device)
    write_mp4(target, sample_video(pipeline, first_frame, settings, seed=seed), settings.fps)
    return target


def trained_settings(checkpoint: Checkpoint) -> SampleSettings:
    """The settings that the checkpoint was trained for. Raises CheckpointError when one is not recorded."""
    low, high = checkpoint.convention("guidance")
    recorded = {key: checkpoint.convention(name) for key, name in _FROM_TRAINING.items()}
    return replace(
        SampleSettings.from_config(checkpoint.config), min_guidance_scale=low, max_guidance_scale=high, **recorded
    )


def load_pipeline(checkpoint: Checkpoint, precision: str, device: torch.device) -> StableVideoDiffusionPipeline:
    """Base model plus the trained weights of `checkpoint`, on `device`. Raises as `trained_model` does."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]
    model = trained_model(checkpoint, dtype)
    model.unet.to(device)  # pyright: ignore[reportArgumentType]
    model.vae.to(device)  # pyright: ignore[reportArgumentType]
    model.image_encoder.to(device, dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return build_pipeline(
        model.unet, model.vae, model.image_encoder, model.configs.scheduler, model.configs.feature_extractor
    )


def _device(settings: SampleSettings) -> tuple[torch.device, SampleSettings]:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda"), settings
    # A run trained in fp16 on a GPU is sampled on a CPU in float32: CPUs have no fp16 autocast worth the name.
    return torch.device("cpu"), replace(settings, precision="no") if settings.precision == "fp16" else settings


def _out_file(out: Path | None, run: Path, image: Path, seed: int) -> Path:
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: got {seed}, expected a whole number from 0 to 2**63 - 1")
    if out is None:
        return run / "samples" / f"{image.stem}-seed{seed}.mp4"
    if out.suffix.lower() != ".mp4" or out.is_dir():
        raise UsageError(f"out: got {out}, expected the path of a file that ends in .mp4")
    return out


def _make_folder(target: Path) -> None:
    """Make the folder of `target` and try to write there: sampling takes minutes, and must not be for nothing."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        in_the_way = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        why = f"{in_the_way} is a file, not a folder" if in_the_way else error.strerror or error
        raise UsageError(
            f"out: {target} cannot be written: {why}. Give with --out a path in a folder that can be written to."
        ) from error
