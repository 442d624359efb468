"""A run's state to its checkpoint folder and back; what is in it, in one list."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import Tensor

from svdtune.checkpoint import state as disk
from svdtune.checkpoint.files import load_json, save_json
from svdtune.checkpoint.manifest import read_manifest
from svdtune.checkpoint.optimizer import OptimizerState, load_optimizer, optimizer_state, write_optimizer
from svdtune.checkpoint.store import find_latest, publish, tidy
from svdtune.checkpoint.tensors import whole
from svdtune.errors import CheckpointError
from svdtune.trainer.build import Session


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps made, and global samples used (which key everything random)."""

    step: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Snapshot:
    """What learns, whole: the same files whatever number of processes, by whatever engine, had parts of it."""

    trained: dict[str, Tensor]
    optimizer: OptimizerState
    ema: EMAModel | None


def save(session: Session, position: Position, resolved: str) -> Path | None:
    """Publish step-XXXXXXXX; `resolved` is the YAML with overrides, so that the checkpoint alone can be rebuilt.

    Called on every rank; returns the folder on the main process, which writes it, and None on the others.
    """
    main = session.accelerator.is_main_process
    held = snapshot(session, keep=main)
    return write(session, held, position, resolved) if main else None


def snapshot(session: Session, *, keep: bool) -> Snapshot:
    """Put together from the shards, one parameter after the other, on every rank; `keep` where it is wanted."""
    ema = copy.copy(session.ema)
    trained = {name: whole(parameter, keep=keep) for name, parameter in session.trained.items()}
    optimizer = optimizer_state(raw_optimizer(session), session.trained, keep=keep)
    if ema is not None:
        ema.shadow_params = [whole(average, keep=keep) for average in ema.shadow_params]
    return Snapshot(trained, optimizer, ema)


def write(session: Session, held: Snapshot, position: Position, resolved: str) -> Path:
    """Publish a snapshot."""

    def write(folder: Path) -> None:
        disk.save_trained(folder, held.trained, lora=session.config.adapt.method == "lora")
        write_optimizer(folder, held.optimizer)
        if held.ema is not None:
            disk.save_ema(folder, held.ema, session.trained)
        save_json(folder / "scheduler.json", {"last_epoch": position.step})
        save_json(folder / "trainer.json", _trainer_json(session, position))
        (folder / "config.yaml").write_text(resolved)

    return publish(
        session.folder.checkpoints,
        position.step,
        write,
        conventions=session.conventions,
        config_hash=hashlib.sha256(resolved.encode()).hexdigest(),
        keep=session.config.checkpoint.keep,
    )


def resume(session: Session, resolved: str) -> tuple[Position, list[str]]:
    """Load the newest valid checkpoint, on every rank. Returns where the run stands, and lines to say.

    Raises CheckpointError when there are checkpoints but none is whole, or it was made for other parameters.

    Weights, averages and optimizer state come from the checkpoint; every option comes from `resolved`, the YAML of now.
    """
    folder, skipped = _find(session)
    if folder is None and skipped:
        raise CheckpointError(
            "no checkpoint of this run can be used, and starting again from step 0 would throw the run away:\n  "
            + "\n  ".join(skipped)
            + "\nRestore one from a copy, or set another run.name to start anew."
        )
    if folder is None:
        return Position(), []
    position, said = restore(session, folder)
    changed = changed_options((folder / "config.yaml").read_text(), resolved)
    return position, [*(f"skipped {line}" for line in skipped), f"resuming {folder}", *changed, *said]


def restore(session: Session, folder: Path) -> tuple[Position, list[str]]:
    """Everything that `save` wrote into `folder`, put back; returns where it stands, and lines to say.

    Raises CheckpointError as `resume` does.
    """
    raw = raw_optimizer(session)
    options = [{key: value for key, value in group.items() if key != "params"} for group in raw.param_groups]
    disk.load_trained(folder, session.trained)
    load_optimizer(folder, raw, session.trained)
    for group, values in zip(raw.param_groups, options, strict=True):
        group.update(values)
    said = _load_ema(session, folder)
    trainer = load_json(folder / "trainer.json")
    position = Position(trainer["step"], trainer["samples"])
    _advance(session, position.step)
    if session.accelerator.scaler is not None and trainer["scaler"]:
        session.accelerator.scaler.load_state_dict(trainer["scaler"])
    if trainer["threads"] != torch.get_num_threads():
        said.append(
            f"it ran with {trainer['threads']} CPU threads, this process has {torch.get_num_threads()}: on a CPU the last "
            "digits will differ; run.threads sets the number"
        )
    return position, said


def changed_options(before: str, now: str) -> list[str]:
    """One line for each option that differs between two resolved YAMLs."""
    old, new = flat(yaml.safe_load(before)), flat(yaml.safe_load(now))
    return [
        f"option changed since that checkpoint: {key} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1e-4}} to {"train.lr": 1e-4}; what is no plain value becomes text, as TensorBoard's hparams want."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return result


def _load_ema(session: Session, folder: Path) -> list[str]:
    if session.ema is None:
        return []
    if not (folder / "ema.safetensors").is_file():
        for average, parameter in zip(session.ema.shadow_params, session.trained.values(), strict=True):
            average.copy_(parameter.detach())
        return ["train.ema is new to this run: the averages start from the weights of this checkpoint"]
    disk.load_ema(folder, session.ema, session.trained)
    session.ema.decay = session.config.train.ema_decay
    return []


def _find(session: Session) -> tuple[Path | None, list[str]]:
    """The main process reads and hashes the checkpoints once; the others take its choice."""
    found: list[Any] = [None]
    if session.accelerator.is_main_process:
        tidy(session.folder.checkpoints)
        latest = find_latest(session.folder.checkpoints)
        found = [(latest.folder, list(latest.skipped), _other_base(session, latest.folder))]
    folder, skipped, problem = broadcast_object_list(found)[0]
    if problem:
        raise CheckpointError(problem)
    return folder, skipped


def _other_base(session: Session, folder: Path | None) -> str:
    """A sentence when the checkpoint was trained on another base than this run loaded, or nothing."""
    recorded = read_manifest(folder).conventions.get("base", {}).get("unet_sha256") if folder else None
    loaded = session.conventions["base"]["unet_sha256"]
    if recorded in (None, loaded):
        return ""
    return (
        f"model.pretrained: the UNet of {session.config.model.pretrained} has sha256 {loaded[:16]}…, {folder} was trained on "
        f"{recorded[:16]}…. Trained weights act only on their own base: restore it, or set another run.name to start anew."
    )


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
    for group, rate in zip(raw_optimizer(session).param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def raw_optimizer(session: Session) -> torch.optim.Optimizer:
    """The optimizer without accelerate's wrapper."""
    optimizer: Any = session.optimizer
    return getattr(optimizer, "optimizer", optimizer)
