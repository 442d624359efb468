"""wandb and TensorBoard through accelerate's trackers. metrics.jsonl is the run folder's business, not theirs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from svdtune.errors import ConfigError
from svdtune.trainer.build import Session
from svdtune.trainer.state import flat


def start(session: Session, resolved: str) -> None:
    """Open the trackers of `tracking.backends`, with the options as in config.resolved.yaml (no value of the environment).

    Raises ConfigError when one is not installed or refuses to start.
    """
    config = session.config
    if not config.tracking.backends:
        return
    # A tracker must not store code, command lines or printed text: they may hold secrets.
    os.environ.setdefault("WANDB_DISABLE_CODE", "true")
    wandb = {
        "name": config.run.name,
        "mode": config.tracking.wandb_mode,
        "dir": str(session.folder.path),
        "settings": {"console": "off", "disable_git": True, "silent": True},
    }
    try:
        session.accelerator.init_trackers(config.tracking.project, flat(yaml.safe_load(resolved)), {"wandb": wandb})
    except Exception as error:
        raise ConfigError(
            f"tracking.backends: {', '.join(config.tracking.backends)} did not start: {error}. "
            "For wandb without a network or an account use tracking.wandb_mode=offline; tracking.backends=[] turns trackers off."
        ) from error


def log(session: Session, values: dict[str, Any], step: int) -> None:
    """Numbers of one optimizer step, to every tracker."""
    session.accelerator.log({name: value for name, value in values.items() if name != "step"}, step=step)


def log_finding(session: Session, code: str, text: str, step: int) -> None:
    """Something that was noticed at `step`: a mark beside the numbers, and wandb's alert. Called on the main process."""
    session.accelerator.log({f"findings/{code}": 1}, step=step)
    if "wandb" in session.config.tracking.backends:
        run: Any = session.accelerator.get_tracker("wandb", unwrap=True)
        run.alert(title=f"{code} at step {step}", text=text)


def log_videos(session: Session, videos: list[Path], step: int) -> None:
    """Sample videos: wandb gets the mp4 files as they are."""
    if not videos or "wandb" not in session.config.tracking.backends or not session.accelerator.is_main_process:
        return
    import wandb

    media = {f"samples/{video.stem}": wandb.Video(str(video), format="mp4") for video in videos}
    session.accelerator.get_tracker("wandb").log(media, step=step)
