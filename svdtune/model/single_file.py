"""An SVD model in one file of the original's naming: recognised from its header, which says how its tensors become diffusers'."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdtune.errors import ModelError
from svdtune.model.derive import derive_configs
from svdtune.model.facts import FILES, ModelConfigs
from svdtune.model.family import Family, recognise
from svdtune.model.headers import Header, read_header
from svdtune.model.original import PREFIXES, Plan, rules, to_diffusers

NOTES = "svdtune"
"""Key of the header's metadata under which svdtune writes what no tensor says: configs, conventions, base. JSON."""
LEFTOVERS = (
    "model_ema.",
    "denoiser.",
    "conditioner.embedders.3.",
    *(f"conditioner.embedders.0.open_clip.model.{name}" for name in (
        "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale", "attn_mask",
    )),
)  # fmt: skip
"""What released files hold beside the model: averages, a second encoder, CLIP's text tower."""
_TAKE = "Take the release's own file (svd_xt.safetensors), or the diffusers folder."
_NAMED = {"unet": "UNet", "vae": "VAE", "image_encoder": "CLIP image encoder"}


@dataclass(frozen=True)
class SingleFile:
    """The header of a whole SVD file, and what follows from it."""

    header: Header
    family: Family
    configs: ModelConfigs
    notes: Mapping[str, Any]
    """What svdtune wrote into the file: configs, the conventions of a training. Empty for other writers."""

    @property
    def path(self) -> Path:
        return self.header.path

    def names(self, part: str) -> list[str]:
        """Original names of a part, without prefix."""
        prefix = PREFIXES[part]
        return [name.removeprefix(prefix) for name in self.header.tensors if name.startswith(prefix)]

    def plan(self, part: str) -> Plan:
        """How the diffusers tensors of a part are made."""
        return to_diffusers(part, getattr(self.configs, part), self.names(part))


def read_single_file(path: Path) -> SingleFile:
    """The file at `path`, from its header alone.

    Raises ModelError saying what the file is instead: no safetensors (a pickle, a cut download), another model, not whole.
    """
    header = read_header(path)
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    family = recognise(shapes)
    if not family.is_svd or family.naming != "original":
        raise ModelError(f"{path}: one file: {what_it_is(family)}; expected a whole SVD model. {_instead(family)}")
    for part, prefix in PREFIXES.items():
        if not any(name.startswith(prefix) for name in shapes):
            raise ModelError(
                f"{path}: it holds no {_NAMED[part]} (no weight's name begins with {prefix}). Without it no video can be made of "
                f"an image: ComfyUI's nodes save UNets and whole checkpoints. {_TAKE}"
            )
    notes = notes_of(header)
    configs = notes.get("configs")
    if not isinstance(configs, dict) or not all(isinstance(configs.get(part), dict) for part in FILES):
        configs = _derived(path, shapes)
    for part in PREFIXES:
        rules(part, configs[part])  # raises where the JSON lacks what names follow from
    return SingleFile(header, family, ModelConfigs(path, **{part: configs[part] for part in FILES}), notes)


def what_it_is(family: Family) -> str:
    """A family in words: `SDXL, original naming`."""
    return f"{family.name}, {family.naming} naming" if family.naming else family.name


def _instead(family: Family) -> str:
    told = "".join(f"{note} " for note in family.notes)
    if family.name == "LoRA":
        return f"{told}Give the model as model.pretrained; `svdtune sample BASE IMAGE --lora FILE` puts a LoRA on it."
    if family.is_svd:
        return f"{told}These are the weights of {' and '.join(family.parts)} in diffusers' names: give the folder above them."
    return f"{told}{_TAKE}"


def notes_of(header: Header) -> dict[str, Any]:
    """What svdtune noted in the header; {} where another program wrote the file, or wrote over the notes."""
    try:
        found = json.loads(header.metadata.get(NOTES, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _derived(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    try:
        return derive_configs(shapes, num_frames=_frames(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def _frames(path: Path) -> int:
    """Frames the model was made for. The file's name alone says it, and it only sets defaults of sampling."""
    return 25 if re.search(r"(?<![a-z])(svd)?xt(?![a-z])", path.stem.lower()) else 14
