"""What a run's own files say of its training, and the licence of the base, which binds what is made from it. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from svdtune.checkpoint.files import load_json
from svdtune.checkpoint.manifest import read_manifest
from svdtune.config.load import load_config
from svdtune.config.schema import Config
from svdtune.errors import CheckpointError, ConfigError, ModelError
from svdtune.model.source import local_source

HUB = "https://huggingface.co"
TINY = "tiny"
UNKNOWN = {"license": "other", "license_name": "unknown"}
STABILITY = {
    "stabilityai/stable-video-diffusion-img2vid": "stable-video-diffusion-community",
    "stabilityai/stable-video-diffusion-img2vid-xt": "stable-video-diffusion-community",
    "stabilityai/stable-video-diffusion-img2vid-xt-1-1": "stable-video-diffusion-1-1-community",
}
"""Name of the licence by hub id, as in the front matter of these repositories; the text is their LICENSE.md."""


_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Training:
    """What a card says of a training."""

    name: str
    """`run.name`; any printable text."""
    step: int
    """Optimizer steps behind the weights."""
    conventions: Mapping[str, Any]
    """The manifest's."""
    base: str | None = None
    """Hub id of the base, or `tiny`; None: a model on somebody's disk, whose path is nobody else's business."""
    licence: Mapping[str, str] = field(default_factory=lambda: dict(UNKNOWN))
    """Front matter of the base, from `base_license`."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Rows for the table beside the conventions: label to text."""
    decode_chunk_size: int = 4
    """Frames that the VAE decoded at once in the run's samples; at the edges of a chunk it shows in the frames."""
    losses: tuple[float, float] | None = None
    """Held-out loss, first and last."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """The manifest's."""


def base_license(pretrained: str, source: Path | None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the base, as its own front matter or its hub id say.

    `source` is where it lies on this machine, None when that is not known. What cannot be read is `other`, `unknown`.
    A link is a full address, or the name of a file that has to be copied from the base.
    """
    known = _known_license(pretrained)
    read = _read_license(source / "README.md") if source is not None else {}
    if not read:
        return known or dict(UNKNOWN)
    found = {"license": read["license"]}
    name = read.get("license_name") or known.get("license_name", "")
    if read["license"] == "other" or name:
        found["license_name"] = name or UNKNOWN["license_name"]
    if link := _link(read.get("license_link", ""), pretrained, source, name):
        found["license_link"] = link
    return found


def training_of_run(run: Path, checkpoint: Path, *, source: Path | None = None) -> Training:
    """What the files of a run and one of its checkpoints say; `source` is the base on this machine, if it is known.

    The options are those of the checkpoint's own config, with overrides. What is missing or unreadable is left out, but
    for the manifest: raises CheckpointError without a whole one.
    """
    manifest = read_manifest(checkpoint)
    pretrained = str(manifest.conventions.get("base", {}).get("pretrained", ""))
    config, trainer = _config(checkpoint), _trainer(checkpoint)
    return Training(
        name=config.run.name if config else run.resolve().name,
        step=manifest.step,
        conventions=manifest.conventions,
        base=public_name(pretrained, source),
        licence=base_license(pretrained, source or _local(pretrained)),
        options=_options(config, trainer) if config else {},
        decode_chunk_size=config.memory.vae_chunk if config else Training.decode_chunk_size,
        losses=_held_out(run / "metrics.jsonl", manifest.step),
        versions=manifest.versions,
    )


def card_images(run: Path) -> list[Path]:
    """The pictures of a run that a card shows. What a person sampled is theirs to publish or not."""
    return [path for path in (run / "contact_sheet.png",) if path.is_file()]


def is_inside(name: str) -> bool:
    """Whether `name` is a relative path that stays inside its folder, on any system."""
    return bool(name) and name.isprintable() and not re.match(r"[/~]|.*[:\\]", name) and ".." not in name.split("/")


def number(value: Any) -> str:
    """7 for 7.0, 0.02 for 0.02: Python reads it back equal."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _known_license(pretrained: str) -> dict[str, str]:
    if pretrained == TINY:
        return {"license": "apache-2.0"}  # svdtune's own
    name = STABILITY.get(pretrained)
    if name is None:
        return {}
    return {"license": "other", "license_name": name, "license_link": f"{HUB}/{pretrained}/blob/main/LICENSE.md"}


def _read_license(readme: Path) -> dict[str, str]:
    """The licence fields that are text in the front matter of `readme`; {} without a `license` there."""
    try:
        found = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
        content = yaml.safe_load(found[1]) if found else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    wanted = {key: content.get(key) for key in ("license", "license_name", "license_link")}
    fields = {key: value.strip() for key, value in wanted.items() if isinstance(value, str) and value.strip()}
    return fields if "license" in fields else {}


def _link(written: str, pretrained: str, source: Path | None, name: str) -> str:
    """`license_link` of the base as it holds outside the base's own repository; "" for none."""
    if written.startswith("https://"):
        return written
    if home := next((hub for hub in (pretrained, *STABILITY) if STABILITY.get(hub) == name), None):
        return _known_license(home)["license_link"]
    if not is_inside(written):
        return ""
    public = public_name(pretrained, source)
    return f"{HUB}/{public}/blob/main/{written}" if public not in (None, TINY) else written


def public_name(pretrained: str, source: Path | None) -> str | None:
    """`pretrained` where it is a hub id or `tiny`; None for what lies on this machine, or is neither.

    `models/svd` may be an id or a folder: `source` tells, where it is known, since the hub's cache names its folders.
    """
    if pretrained == TINY or pretrained in STABILITY:
        return pretrained
    cached = source is None or f"models--{pretrained.replace('/', '--')}" in source.parts
    return pretrained if cached and _ID.fullmatch(pretrained) and not Path(pretrained).exists() else None


def _local(pretrained: str) -> Path | None:
    try:
        return local_source(pretrained) if pretrained else None
    except ModelError:
        return None


def _config(checkpoint: Path) -> Config | None:
    try:
        return load_config(checkpoint / "config.yaml")
    except ConfigError:
        return None


def _trainer(checkpoint: Path) -> dict[str, Any]:
    try:
        content = load_json(checkpoint / "trainer.json")
    except (CheckpointError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _options(config: Config, trainer: Mapping[str, Any]) -> dict[str, str]:
    train, adapt = config.train, config.adapt
    processes = trainer.get("world_size")
    rows: dict[str, Any] = {
        "learning rate": f"{train.lr:g}, {train.schedule}, {train.warmup} steps of warm-up",
        "clips per step": f"{train.batch_size} × {train.accumulation} accumulated"
        + (f" × {processes} process{'es' if processes > 1 else ''}" if isinstance(processes, int) else ""),
        "clips seen, repeats counted": trainer.get("samples"),
        "optimizer": f"{train.optimizer}, weight decay {train.weight_decay:g}",
        "precision": train.precision if train.precision != "no" else "float32",
        "average of the weights": f"EMA, decay up to {train.ema_decay:g}" if train.ema else None,
        "seed": config.run.seed,
    }
    if adapt.method == "lora":
        alpha = adapt.rank if adapt.alpha is None else adapt.alpha
        rows["LoRA"] = f"rank {adapt.rank}, alpha {number(alpha)}{', DoRA' if adapt.dora else ''}"
    return {label: str(text) for label, text in rows.items() if text is not None}


def _held_out(metrics: Path, step: int) -> tuple[float, float] | None:
    """First and last held-out loss up to `step`; None where there are not two."""
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    losses = [loss for line in lines if (loss := _held_out_loss(line, step)) is not None]
    return (losses[0], losses[-1]) if len(losses) > 1 else None


def _held_out_loss(line: str, step: int) -> float | None:
    try:
        values = json.loads(line)
        loss, at = values["held_out_loss"], values["step"]
        return float(loss) if at <= step and math.isfinite(loss) else None
    except (ValueError, TypeError, KeyError):
        return None
