"""Runs as the trainer leaves them, and the same model in other formats."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from svdtune.checkpoint.export import Base, export_run
from svdtune.checkpoint.notes import as_metadata, write_notes
from svdtune.checkpoint.state import save_ema, save_trained
from svdtune.checkpoint.store import publish
from svdtune.config.load import load_config, resolved_yaml
from svdtune.model.adapt import adapt
from svdtune.model.facts import FILES
from svdtune.model.load import load_model, load_part
from svdtune.model.original import PREFIXES, to_original
from svdtune.model.source import read_configs
from svdtune.sample.run import open_checkpoint, trained_model
from svdtune.trainer.build import conventions
from svdtune.trainer.optimizer import make_ema


def write_config(run: Path, base: Path, *overrides: str) -> None:
    options = [
        f"model.pretrained={base}", "model.variant=null", "data.num_frames=4", "data.height=16", "data.width=24", "data.fps=7.5",
        "data.motion_bucket=50", "adapt.rank=2", "train.precision=no", "validation.inference_steps=2",
        "validation.guidance=[1.0,2.0]", *overrides,
    ]  # fmt: skip
    (run / "config.resolved.yaml").write_text(resolved_yaml(load_config(run / "config.yaml", options)))


def save(run: Path, step: int, *, shift: float = 0.0, ema_shift: float | None = None, **changes: object) -> Path:
    """What the trainer saves after `step` steps that moved every trained weight by `shift`."""
    config = load_config(run / "config.resolved.yaml")
    model = load_model(config.model, bridge=config.conditioning.bridge is not None)
    trained = adapt(model.unet, config.adapt, dtype=torch.float32, seed=0)
    move(trained, shift)

    def write(folder: Path) -> None:
        save_trained(folder, trained, lora=config.adapt.method == "lora")
        (folder / "config.yaml").write_text((run / "config.resolved.yaml").read_text())
        if ema_shift is not None:
            config.train.ema = True
            move(trained, ema_shift - shift)
            save_ema(folder, make_ema(config.train, trained.values()), trained)

    recorded = {**conventions(config, model), **changes}
    return publish(run / "checkpoints", step, write, conventions=recorded, config_hash="", keep=9)


def move(trained: dict, by: float) -> None:
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(by)


def export(checkpoint: Path, destination: Path) -> Path:
    """The checkpoint as a diffusers or adapter folder, with svdtune.json in it."""
    opened = open_checkpoint(checkpoint)
    model, config = trained_model(opened, torch.float32), opened.config
    base = Base(config.model.pretrained, model.configs.source, config.model.variant)
    export_run(destination, base=base, unet=model.unet, lora=config.adapt.method == "lora", half=False)
    write_notes(destination, {"conventions": dict(opened.manifest.conventions)})
    return destination


def single_file(folder: Path, path: Path, notes: dict, *, configs: bool = True) -> Path:
    """The diffusers folder as one file of the original's names."""
    read = read_configs(folder)
    tensors = {}
    for part, prefix in PREFIXES.items():
        weights = load_part(read, part, None).state_dict()
        plan = to_original(part, getattr(read, part), weights)
        assert not plan.unknown
        for name, take in plan.takes.items():
            tensors[prefix + name] = take.apply(weights[source] for source in take.sources).contiguous().clone()
    own = {"configs": {part: dict(getattr(read, part)) for part in FILES}} if configs else {}
    save_file(tensors, path, metadata=as_metadata({**notes, **own}))
    return path


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def pngs_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def comment_of(path: Path) -> str:
    with av.open(str(path)) as container:
        return container.metadata["comment"]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
