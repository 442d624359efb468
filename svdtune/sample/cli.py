"""`svdtune sample RUN IMAGE`: the base and the trained weights of a run, sampled by the conventions it was trained with."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.checkpoint.manifest import read_manifest
from svdtune.checkpoint.store import find_latest, folder_name, verify
from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.errors import CheckpointError, ModelError, UsageError
from svdtune.sample.sampler import SampleSettings, build_pipeline, sample_video
from svdtune.sample.video import read_image, write_mp4

if TYPE_CHECKING:
    import torch
    from diffusers import StableVideoDiffusionPipeline

_log = logging.getLogger(__name__)

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
    folder = find_checkpoint(run, checkpoint)
    config, conventions = load_config(folder / "config.yaml"), read_manifest(folder).conventions
    given = {
        "num_frames": num_frames,
        "fps": fps,
        "motion_bucket_id": motion_bucket,
        "noise_aug_strength": noise_aug_strength,
        "num_inference_steps": steps,
        "min_guidance_scale": guidance_min,
        "max_guidance_scale": guidance_max,
    }
    settings = trained_settings(folder, config, conventions)
    settings = replace(settings, **{key: value for key, value in given.items() if value is not None})
    size = {key: _convention(folder, conventions, key) for key in ("height", "width", "resize")}
    first_frame = read_image(image, **size)
    _make_folder(target)
    device, settings = _device(settings)
    pipeline = load_pipeline(folder, config, conventions, settings.precision, device)
    write_mp4(target, sample_video(pipeline, first_frame, settings, seed=seed), settings.fps)
    return target


def find_checkpoint(run: Path, checkpoint: str | None) -> Path:
    """The folder of the named checkpoint (`step-00000100`, `100`), or of the newest whole one, verified byte by byte.

    Raises UsageError naming the nearest run, or the checkpoints that are there; CheckpointError when it is damaged.
    """
    checkpoints = run / "checkpoints"
    if not run.is_dir():
        raise UsageError(_no_run(run))
    if checkpoint is not None:
        folder = checkpoints / (folder_name(int(checkpoint)) if checkpoint.isdecimal() else Path(checkpoint).name)
        there = _names(checkpoints)
        if folder.name not in there:
            listed = f"there: {', '.join(there)}" if there else "there is none yet"
            raise UsageError(f"checkpoint {checkpoint}: no such checkpoint in {checkpoints}; {listed}.")
        verify(folder)
        return folder
    latest = find_latest(checkpoints)
    if latest.folder is None and latest.skipped:
        raise CheckpointError(f"{checkpoints}: no checkpoint can be used.\n  " + "\n  ".join(latest.skipped))
    if latest.folder is None:
        raise UsageError(_no_checkpoint(run))
    for line in latest.skipped:
        _log.warning("skipped %s", line)
    return latest.folder


def trained_settings(folder: Path, config: Config, conventions: Mapping[str, Any]) -> SampleSettings:
    """The settings that the checkpoint in `folder` was trained for. Raises CheckpointError when one is not recorded."""
    low, high = _convention(folder, conventions, "guidance")
    recorded = {key: _convention(folder, conventions, name) for key, name in _FROM_TRAINING.items()}
    return replace(SampleSettings.from_config(config), min_guidance_scale=low, max_guidance_scale=high, **recorded)


def load_pipeline(
    folder: Path, config: Config, conventions: Mapping[str, Any], precision: str, device: torch.device
) -> StableVideoDiffusionPipeline:
    """Base model plus the trained weights in `folder`, on `device`.

    Raises ModelError when the base is not the one that was trained on, CheckpointError when the weights do not fit it.
    """
    import torch

    from svdtune.checkpoint.state import load_trained
    from svdtune.model.adapt import adapt
    from svdtune.model.load import load_model
    from svdtune.model.source import weights_hash

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]
    model = load_model(config.model, bridge=config.conditioning.bridge is not None, seed=config.run.seed)
    _same_base(
        folder,
        config.model.pretrained,
        got=weights_hash(model.configs.source, "unet", config.model.variant),
        expected=_convention(folder, conventions, "base")["unet_sha256"],
    )
    trained = adapt(model.unet, config.adapt, dtype=dtype, seed=config.run.seed)
    load_trained(folder, trained, ema=(folder / "ema.safetensors").is_file())
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


def _convention(folder: Path, conventions: Mapping[str, Any], key: str) -> Any:
    if key not in conventions:
        raise CheckpointError(
            f"{folder / 'MANIFEST.json'}: the conventions have no {key!r}, so it is unknown how this run was trained. "
            "Use the svdtune version that made the checkpoint."
        )
    return conventions[key]


def _same_base(folder: Path, pretrained: str, *, got: str, expected: str) -> None:
    if got != expected:
        raise ModelError(
            f"model.pretrained: the UNet of {pretrained} has sha256 {got[:16]}…, {folder.name} was trained on "
            f"{expected[:16]}…. Trained weights act only on their own base: restore it, or set model.revision to the old one."
        )


def _no_run(run: Path) -> str:
    runs = [path for parent in (run.parent, Path("runs")) if parent.is_dir() for path in parent.iterdir()]
    by_name = {path.name: path for path in runs if (path / "checkpoints").is_dir()}
    near = get_close_matches(run.name, by_name, n=1)
    if near:
        return f"no such run: {run}. Did you mean {by_name[near[0]]}?"
    listed = f"Runs: {', '.join(sorted(map(str, by_name.values())))}." if by_name else "There is no run yet."
    return f"no such run: {run}. {listed} A run is the folder that `svdtune train` makes (run.dir/run.name)."


def _no_checkpoint(run: Path) -> str:
    if not (run / "checkpoints").is_dir() and not (run / "config.yaml").is_file():
        return f"{run} is not a run: it has neither checkpoints/ nor config.yaml. Give the folder that `svdtune train` made."
    return (
        f"run {run} has no checkpoint yet. One is saved every checkpoint.interval steps and at the last step; "
        "wait for it, or start the training again to go on."
    )


def _names(checkpoints: Path) -> list[str]:
    if not checkpoints.is_dir():
        return []
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and not path.name.startswith("."))
