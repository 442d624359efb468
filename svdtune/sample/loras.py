"""LoRA files and adapter folders on the models that are to be sampled."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from svdtune.checkpoint.notes import notes_in_file, notes_in_folder, trained_on
from svdtune.errors import ModelError, UsageError
from svdtune.model.facts import FILES
from svdtune.model.family import recognise
from svdtune.model.files import PICKLES
from svdtune.model.headers import read_header
from svdtune.model.single_file import what_it_is
from svdtune.sample.run import is_run
from svdtune.sample.subject import Subject, lora_file


def with_lora(subjects: list[Subject], path: Path | None, scale: float | None) -> list[Subject]:
    """Each of `subjects` with the LoRA at `path` on it, or with its own scaled. Raises UsageError, ModelError, CheckpointError."""
    if scale is not None and not isfinite(scale):
        raise UsageError(f"--lora-scale: got {scale}, expected a finite number; 1 acts as trained, 0 not at all.")
    if path is not None:
        return [_put_on(subject, path, scale) for subject in subjects]
    if scale is None:
        return subjects
    for subject in subjects:
        if not subject.is_lora_run:
            kind = (
                f"it was trained with adapt.method={subject.checkpoint.config.adapt.method}"
                if subject.checkpoint
                else "it is a model"
            )
            raise UsageError(f"--lora-scale: {subject.label} has no LoRA ({kind}). Give one with --lora.")
    return [replace(subject, scale=scale, label=_scaled(subject.label, scale)) for subject in subjects]


def _put_on(subject: Subject, path: Path, scale: float | None) -> Subject:
    from svdtune.checkpoint.lora import read_lora

    lora = read_lora(path, subject.base.configs.unet)
    trained = mapping(lora.notes, "conventions")
    _require_own_base(subject, path, mapping(trained, "base"))
    if subject.checkpoint and (path / FILES["image_encoder"]).is_file():
        raise UsageError(
            f"--lora: {path} has an image encoder of its own, which a run's checkpoint cannot take. Give its base as SOURCE."
        )
    label = _scaled(short_name(path).removesuffix(".safetensors"), scale)
    if subject.checkpoint:
        label = f"{subject.label} + {label}"
    return replace(subject, lora=lora, scale=scale, label=label, conventions=trained or subject.conventions)


def require_lora(path: Path) -> None:
    """Raise UsageError, ModelError when `path` cannot be a LoRA, from its header."""
    if not path.exists():
        sibling = near(path)
        hint = f" Did you mean {sibling}?" if sibling else ""
        raise UsageError(f"--lora: no such file or folder: {path}.{hint}")
    if path.is_dir() and is_run(path):
        raise UsageError(f"--lora: {path} is a run. Give it as SOURCE, or its {path / 'export'} as --lora.")
    if path.is_dir() and not lora_file(path).is_file():
        raise ModelError(
            f"--lora: {path} holds no adapter_model.safetensors. Give peft's adapter folder, or a LoRA's .safetensors file."
        )
    if path.suffix in PICKLES:
        raise ModelError(pickle_refused(path))
    family = recognise({name: entry.shape for name, entry in read_header(lora_file(path)).tensors.items()})
    if family.name not in ("LoRA", "unknown"):
        raise ModelError(f"--lora: {path} is no LoRA but {what_it_is(family)}. Give a model as SOURCE.")


def _require_own_base(subject: Subject, path: Path, noted: Mapping[str, Any]) -> None:
    """A LoRA may go on the UNet that it was trained on, and on what was trained from that."""
    expected = noted.get("unet_sha256")
    if not isinstance(expected, str) or expected == mapping(subject.conventions, "base").get("unet_sha256"):
        return
    base, got = subject.base, subject.base.unet_sha256
    if not trained_on(noted, got, base.configs.source, base.model.variant):
        raise ModelError(
            f"--lora: LoRA of another base: {path} was trained on {noted.get('pretrained')} (variant {noted.get('variant')}), whose "
            f"UNet has sha256 {expected[:16]}…; the UNet of {subject.source} (variant {subject.base.model.variant}) has {got[:16]}…. "
            "A LoRA acts only on the weights it was trained on: give that base as SOURCE."
        )


def conventions_in(path: Path) -> Mapping[str, Any]:
    """What svdtune noted of the training in a LoRA or an export; {} where there is nothing."""
    if not path.exists():
        return {}
    return mapping(notes_in_folder(path) if path.is_dir() else notes_in_file(path), "conventions")


def lora_as_source(path: Path, base: str | None) -> str:
    """What is said of a LoRA that was given as the model; `base` is what peft's config names."""
    names = [name for name in (mapping(conventions_in(path), "base").get("pretrained"), base) if isinstance(name, str)]
    here = next((name for name in names if name == "tiny" or Path(name).exists() or name.count("/") == 1), None)
    trained = f" (it was trained on {names[0]})" if names and here is None else ""
    command = f"svdtune sample {shlex.quote(here) if here else 'BASE'} IMAGE --lora {shlex.quote(str(path))}"
    return (
        f"{path} is a LoRA, which adds to a model and is none{trained}. Give the model that it was trained on and the LoRA: "
        f"{command}"
    )


def pickle_refused(path: Path) -> str:
    """Why such a file is not read."""
    return (
        f"{path}: a {path.suffix} file is a pickle, which can run code when it is opened; svdtune reads safetensors only. "
        "Take the .safetensors file of the release."
    )


def near(path: Path) -> Path | None:
    """What lies beside the missing `path` under almost its name."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    found = get_close_matches(path.name, names, n=1, cutoff=0.75)
    return path.parent / found[0] if found else None


def short_name(path: Path) -> str:
    """The path's own name, with the one above it where the name says nothing."""
    whole = path.resolve()
    return (
        f"{whole.parent.name}/{whole.name}"
        if whole.name in ("export", "unet") or whole.name.startswith("step-")
        else whole.name
    )


def _scaled(label: str, scale: float | None) -> str:
    return label if scale in (None, 1) else f"{label} x {scale:g}"


def mapping(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key` of notes that anybody may have edited; {} where there is none."""
    value = found.get(key)
    return value if isinstance(value, dict) else {}
