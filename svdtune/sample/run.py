"""A run's checkpoint as a model in memory: found, verified, put on its base."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.checkpoint.manifest import Manifest, read_manifest
from svdtune.checkpoint.store import find_latest, folder_name, verify
from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.errors import CheckpointError, ModelError, UsageError

if TYPE_CHECKING:
    import torch

    from svdtune.model.load import ModelParts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder, with what it says of its training."""

    folder: Path
    config: Config
    manifest: Manifest

    @property
    def has_ema(self) -> bool:
        return (self.folder / "ema.safetensors").is_file()

    @property
    def weights(self) -> str:
        """sha256 of `weights_file`."""
        return self.manifest.files[self.weights_file.name].sha256

    @property
    def weights_file(self) -> Path:
        """The trained weights that are sampled and exported."""
        return self.folder / self.manifest.trained_file

    def convention(self, key: str) -> Any:
        """What the manifest records. Raises CheckpointError when it does not."""
        conventions = self.manifest.conventions
        if key not in conventions:
            raise CheckpointError(
                f"{self.folder / 'MANIFEST.json'}: the conventions have no {key!r}, so it is unknown how this run was trained. "
                "Use the svdtune version that made the checkpoint."
            )
        return conventions[key]


def open_checkpoint(folder: Path) -> Checkpoint:
    """The configuration and manifest in `folder`."""
    folder = folder.resolve()  # its run is found above it
    return Checkpoint(folder, load_config(folder / "config.yaml"), read_manifest(folder))


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder."""
    return (path / "checkpoints").is_dir() or (path / "config.resolved.yaml").is_file()


def find_checkpoint(run: Path, checkpoint: str | None) -> Path:
    """The folder of the named checkpoint (`step-00000100`, `100`), or of the newest whole one, verified byte by byte.

    Raises UsageError naming the nearest run, or the checkpoints that are there; CheckpointError when it is damaged.
    """
    checkpoints = run / "checkpoints"
    if not run.is_dir():
        raise UsageError(no_such_run(run))
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
        raise UsageError(no_checkpoint(run))
    for line in latest.skipped:
        _log.warning("skipped %s", line)
    return latest.folder


def whole_checkpoints(run: Path) -> list[Path]:
    """Every checkpoint of a run that passes `verify`, oldest first; a warning for each other. Raises as `find_checkpoint` does."""
    whole = []
    for name in _names(run / "checkpoints"):
        try:
            verify(run / "checkpoints" / name)
        except CheckpointError as error:
            _log.warning("skipped %s: %s", name, error)
        else:
            whole.append(run / "checkpoints" / name)
    return whole or [find_checkpoint(run, None)]


def trained_model(checkpoint: Checkpoint, dtype: torch.dtype) -> ModelParts:
    """The base with the trained weights (their averages where the run keeps them) in it, frozen weights in `dtype`, on the CPU.

    Raises ModelError when the base is not the one that was trained on, CheckpointError when the weights do not fit it.
    """
    from svdtune.checkpoint.state import load_trained
    from svdtune.model.adapt import adapt
    from svdtune.model.load import load_model

    config = checkpoint.config
    model = load_model(config.model, bridge=config.conditioning.bridge is not None, seed=config.run.seed)
    require_own_base(checkpoint, model.configs.source)
    trained = adapt(model.unet, config.adapt, dtype=dtype, seed=config.run.seed)
    load_trained(checkpoint.folder, trained, ema=checkpoint.has_ema)
    return model


def require_own_base(checkpoint: Checkpoint, source: Path) -> None:
    """Raise ModelError when the UNet in `source` is not the one that the run was trained on."""
    from svdtune.model.source import weights_hash

    model, expected = checkpoint.config.model, checkpoint.convention("base")["unet_sha256"]
    got = weights_hash(source, "unet", model.variant)
    if got != expected:
        raise ModelError(
            f"model.pretrained: the UNet of {model.pretrained} has sha256 {got[:16]}…, {checkpoint.folder.name} was trained on "
            f"{expected[:16]}…. Trained weights act only on their own base: restore it, or set model.revision to the old one."
        )


def no_such_run(run: Path) -> str:
    """What is said of a path where there is nothing, with the nearest run."""
    runs = [path for parent in (run.parent, Path("runs")) if parent.is_dir() for path in parent.iterdir()]
    by_name = {path.name: path for path in runs if (path / "checkpoints").is_dir()}
    near = get_close_matches(run.name, by_name, n=1)
    if near:
        return f"no such run: {run}. Did you mean {by_name[near[0]]}?"
    listed = f"Runs: {', '.join(sorted(map(str, by_name.values())))}." if by_name else "There is no run yet."
    return f"no such run: {run}. {listed} A run is the folder that `svdtune train` makes (run.dir/run.name)."


def no_checkpoint(run: Path) -> str:
    """What is said of a folder without checkpoints."""
    if not (run / "checkpoints").is_dir() and not (run / "config.yaml").is_file():
        return f"{run} is not a run: it has neither checkpoints/ nor config.yaml. Give the folder that `svdtune train` made."
    if (run / "export").is_dir():
        return f"run {run} has no checkpoint any more, but its result: give {run / 'export'}."
    return (
        f"run {run} has no checkpoint yet. One is saved every checkpoint.interval steps and at the last step; "
        "wait for it, or start the training again to go on."
    )


def _names(checkpoints: Path) -> list[str]:
    if not checkpoints.is_dir():
        return []
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and not path.name.startswith("."))
