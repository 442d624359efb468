"""A run's state to its checkpoint folder and back; what is in it, in one list."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdtune.checkpoint import state as disk
from svdtune.checkpoint.files import load_json, save_json
from svdtune.checkpoint.optimizer import load_optimizer, save_optimizer
from svdtune.checkpoint.store import find_latest, publish
from svdtune.trainer.build import Session


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps made, and global samples used (which key everything random)."""

    step: int = 0
    samples: int = 0


def save(session: Session, position: Position, config_text: str) -> Path:
    """Publish step-XXXXXXXX. Called on the main process only."""

    def write(folder: Path) -> None:
        disk.save_trained(folder, session.trained, lora=session.config.adapt.method == "lora")
        save_optimizer(folder, _raw(session.optimizer), session.trained)
        if session.ema is not None:
            disk.save_ema(folder, session.ema, session.trained)
        save_json(folder / "scheduler.json", {"last_epoch": position.step})
        save_json(folder / "trainer.json", _trainer_json(session, position))
        (folder / "config.yaml").write_text(config_text)

    return publish(
        session.folder.checkpoints,
        position.step,
        write,
        conventions=session.conventions,
        config_hash=hashlib.sha256(config_text.encode()).hexdigest(),
        keep=session.config.checkpoint.keep,
    )


def resume(session: Session) -> tuple[Position, list[str]]:
    """Load the newest valid checkpoint, on every rank. Returns where the run stands, and lines to say."""
    latest = find_latest(session.folder.checkpoints)
    said = [f"skipped {line}" for line in latest.skipped]
    if latest.folder is None:
        return Position(), said
    disk.load_trained(latest.folder, session.trained)
    load_optimizer(latest.folder, _raw(session.optimizer), session.trained)
    if session.ema is not None:
        disk.load_ema(latest.folder, session.ema, session.trained)
    trainer = load_json(latest.folder / "trainer.json")
    position = Position(trainer["step"], trainer["samples"])
    _advance(session, position.step)
    if session.accelerator.scaler is not None and trainer["scaler"]:
        session.accelerator.scaler.load_state_dict(trainer["scaler"])
    return position, [*said, f"resuming {latest.folder} at step {position.step}"]


def _trainer_json(session: Session, position: Position) -> dict[str, Any]:
    train, scaler = session.config.train, session.accelerator.scaler
    return {
        "step": position.step,
        "samples": position.samples,
        "seed": session.config.run.seed,
        "world_size": session.accelerator.num_processes,
        "batch_size": train.batch_size,
        "accumulation": train.accumulation,
        "threads": torch.get_num_threads(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def _advance(session: Session, step: int) -> None:
    """The schedule is a function of the step; the optimizer takes its rate from there, so an edited schedule applies."""
    schedule = session.schedule
    schedule.last_epoch = step
    rates = [base * f(step) for base, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]  # pyright: ignore[reportAttributeAccessIssue]
    for group, rate in zip(_raw(session.optimizer).param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
