"""What no tensor says of a result: how it was trained. `svdtune.json` in a folder, the header's metadata in a single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdtune import __version__
from svdtune.checkpoint.files import load_json, save_json
from svdtune.checkpoint.manifest import Manifest
from svdtune.checkpoint.training import public_name
from svdtune.model.headers import read_header
from svdtune.model.single_file import NOTES, notes_of
from svdtune.model.source import fp16_hash

FILE = "svdtune.json"


def make_notes(manifest: Manifest, source: Path) -> dict[str, Any]:
    """The notes of a training: conventions and step of a checkpoint, and the sha256 of its trained weights.

    Results are published: of a base in `source` that is no hub model only its own name is told, not where it lies.
    """
    conventions = dict(manifest.conventions)
    base = dict(conventions.get("base", {}))
    if pretrained := base.get("pretrained"):
        base["pretrained"] = public_name(pretrained, source) or Path(pretrained).name
        base["unet_fp16_sha256"] = fp16_hash(source, "unet", base.get("variant"))
    return {
        "svdtune": __version__,
        "conventions": {**conventions, "base": base},
        "step": manifest.step,
        "weights": manifest.files[manifest.trained_file].sha256,
    }


def trained_on(base: Mapping[str, Any], got: str, source: Path, variant: str | None) -> bool:
    """Whether the noted `base` is the UNet in `source`, whose `weights_hash` is `got`, or that in another dtype of its release."""
    known = {base.get("unet_sha256"), base.get("unet_fp16_sha256")}
    return got in known or fp16_hash(source, "unet", variant) in known


def notes_in_folder(folder: Path) -> dict[str, Any]:
    """{} where svdtune did not write the folder. Raises CheckpointError for a file that is no JSON."""
    found = load_json(folder / FILE) if (folder / FILE).is_file() else {}
    return found if isinstance(found, dict) else {}


def notes_in_file(path: Path) -> dict[str, Any]:
    """{} where svdtune did not write the file. Raises ModelError (BadFile) when it is no safetensors file."""
    return notes_of(read_header(path))


def write_notes(folder: Path, notes: Mapping[str, Any]) -> None:
    """Beside the weights in a folder."""
    save_json(folder / FILE, dict(notes))


def as_metadata(notes: Mapping[str, Any]) -> dict[str, str]:
    """For the header of a safetensors file. `format` is what transformers asks for."""
    return {"format": "pt", NOTES: json.dumps(dict(notes), sort_keys=True)}
