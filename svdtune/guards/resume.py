"""Would the newest checkpoint of this run go into the parameters that this configuration trains?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdtune.checkpoint.files import reading
from svdtune.checkpoint.manifest import read_manifest
from svdtune.checkpoint.store import is_leftover, newest_first
from svdtune.config.schema import Config
from svdtune.errors import CheckpointError, ModelError
from svdtune.guards.findings import Finding
from svdtune.model.headers import BadFile, read_header
from svdtune.model.source import local_source, weights_hash

_RESTORE = "Restore the folder from a copy, remove it, or set another run.name to start anew."
_HASHED = 2**29
_NAMES = ("lora.safetensors", "unet.safetensors")


def check_resume(config: Config, trained: Mapping[str, Any]) -> list[Finding]:
    """CFG108: other names, shapes or types than the checkpoint's. CKP221: checkpoints of this run that are damaged.

    Reads manifests, file sizes and one header; contents are hashed when training resumes.
    """
    folders = newest_first(Path(config.run.dir) / config.run.name / "checkpoints")
    damaged = {folder: problem for folder in folders if (problem := _damage(folder))}
    problems = {folder: problem for folder, problem in damaged.items() if not is_leftover(folder)}
    whole = next((folder for folder in folders if folder not in damaged), None)
    found = [_damaged(folder, problem, whole) for folder, problem in problems.items()]
    if whole:
        found += [*_other_parameters(config, whole, trained), *_other_base(config, whole), *_finished(config, whole)]
    return found


def _finished(config: Config, folder: Path) -> list[Finding]:
    step = read_manifest(folder).step
    if step < config.train.steps:
        return []
    return [
        Finding(
            "CFG120", "warning", "run.name", f"{config.run.name}, whose newest checkpoint is at step {step}",
            f"a run below train.steps = {config.train.steps}",
            "The same run.name goes on where it stands, so nothing would be trained.",
            "Raise train.steps to train longer, or set another run.name for new clips or options.",
        )
    ]  # fmt: skip


def _other_base(config: Config, folder: Path) -> list[Finding]:
    """Where hashing the base takes no time; training always compares."""
    base = local_source(config.model.pretrained)
    recorded = read_manifest(folder).conventions.get("base", {}).get("unet_sha256")
    if base is None or recorded is None:
        return []
    files = [base] if base.is_file() else [*(base / "unet").glob("*.safetensors")]
    if sum(path.stat().st_size for path in files) > _HASHED:
        return []
    try:
        now = weights_hash(base, "unet", config.model.variant)
    except ModelError:
        return []  # the checkpoint stage says what is wrong with these files
    if now == recorded:
        return []
    return [
        Finding(
            "CFG108", "error", "model.pretrained", f"a UNet with sha256 {now[:16]}…", f"{recorded[:16]}…, which {folder} was trained on",
            "Trained weights act only on their own base.", "Restore the base, or set another run.name to start a new run.",
        )
    ]  # fmt: skip


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint as far as sizes show, or nothing."""
    try:
        with reading(folder):
            return _wrong_size(folder)
    except CheckpointError as error:
        return str(error)


def _wrong_size(folder: Path) -> str:
    manifest = read_manifest(folder)
    for name, facts in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts.size:
            return f"{path}: {'missing' if size is None else f'{size} bytes'}, its manifest says {facts.size} bytes"
    return ""


def _damaged(folder: Path, problem: str, whole: Path | None) -> Finding:
    why = (
        f"Training would go on from {whole.name} instead."
        if whole
        else "No checkpoint of this run is left to go on from."
    )
    return Finding(
        "CKP221", "warning" if whole else "error", str(folder), problem, "a whole checkpoint", why, _RESTORE,
    )  # fmt: skip


def _other_parameters(config: Config, folder: Path, trained: Mapping[str, Any]) -> list[Finding]:
    path = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if path is None:
        return []
    try:
        entries = read_header(path).tensors
    except BadFile as bad:
        why = "Training would stop when it goes on from this checkpoint."
        return [Finding("CKP221", "error", str(folder), f"{path}: {bad.what}", "a whole checkpoint", why, _RESTORE)]
    saved = {name: entry.shape for name, entry in entries.items()}
    now = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    if saved == now:
        return _other_type(config, path, {entry.dtype for entry in entries.values()})
    different = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    return [
        Finding(
            "CFG108", "error", "run.name", f"this configuration trains {len(now)} parameters, {len(different)} of them not as saved "
            f"({different[0]}{', ...' if len(different) > 1 else ''})", f"the {len(saved)} parameters in {path}",
            "The same run.name resumes the run, and its checkpoint must hold exactly what is trained.",
            "Set another run.name to start a new run, or restore the options of the old one.",
        )
    ]  # fmt: skip


def _other_type(config: Config, path: Path, saved: set[str]) -> list[Finding]:
    made = "bf16" if saved == {"BF16"} else "fp32"
    if made == config.memory.parameters:
        return []
    return [
        Finding(
            "CFG108", "error", "memory.parameters", config.memory.parameters, f"{made}, in which {path} was saved",
            "Weights would be rounded, and the optimizer's state is kept in another form.",
            "Set memory.parameters back, or another run.name to start a new run.", (f"memory.parameters={made}",),
        )
    ]  # fmt: skip
