"""What SOURCE and --lora name: each model that is to be sampled, from JSON, manifests and headers. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdtune.checkpoint.files import load_json
from svdtune.checkpoint.manifest import MANIFEST
from svdtune.checkpoint.notes import notes_in_file, notes_in_folder
from svdtune.checkpoint.store import verify
from svdtune.config.schema import Model
from svdtune.errors import ModelError, UsageError
from svdtune.model.family import recognise
from svdtune.model.files import PICKLES, find_weights
from svdtune.model.headers import read_header
from svdtune.model.source import PARTS, local_source, model_source, read_configs
from svdtune.sample.images import PICTURES
from svdtune.sample.loras import (
    conventions_in,
    lora_as_source,
    mapping,
    near,
    pickle_refused,
    require_lora,
    short_name,
    with_lora,
)
from svdtune.sample.run import find_checkpoint, is_run, no_checkpoint, no_such_run, open_checkpoint, whole_checkpoints
from svdtune.sample.subject import Base, Subject, run_base

_KINDS = "SOURCE is a run, a checkpoint, a diffusers folder, a single file (svd_xt.safetensors), a hub id (owner/name) or 'tiny'."
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Choice:
    """What to sample, as a person says it."""

    source: str
    checkpoints: tuple[str, ...] = ()
    lora: Path | None = None
    lora_scale: float | None = None
    compare: bool = False


def open_subjects(choice: Choice) -> list[Subject]:
    """The models that `choice` names, the base first in a comparison, in the order of rows.

    Raises UsageError for what is none of the kinds or does not go together, ModelError and CheckpointError for what is damaged.
    """
    path = Path(choice.source)
    if choice.lora is not None:
        require_lora(choice.lora)
    run = path.is_dir() and is_run(path)
    if choice.checkpoints and not run:
        raise UsageError(
            f"--checkpoint: got {', '.join(choice.checkpoints)}, but {path} is no run folder, and only a run has checkpoints."
        )
    if run:
        subjects = [_of_checkpoint(folder, short_name(path)) for folder in _chosen(path, choice)]
    elif (path / MANIFEST).is_file():
        verify(path)
        subjects = [_of_checkpoint(path, short_name(path))]
    else:
        subjects = [_of_model(choice)]
    subjects = with_lora(subjects, choice.lora, choice.lora_scale)
    if not choice.compare:
        return subjects
    last = subjects[-1]
    if last.checkpoint is None and last.lora is None:
        raise UsageError(
            f"--compare: {path} is one model. Give a run, or a LoRA with --lora, to compare it with its base."
        )
    return [replace(last, label="base", checkpoint=None, lora=None, scale=None), *subjects]


def _chosen(run: Path, choice: Choice) -> list[Path]:
    if choice.compare and not choice.checkpoints:
        return whole_checkpoints(run)
    folders = [find_checkpoint(run, name) for name in choice.checkpoints or (None,)]
    return list(dict.fromkeys(folders))


def _of_checkpoint(folder: Path, source: str) -> Subject:
    checkpoint = open_checkpoint(folder)
    return Subject(folder.resolve().name, source, run_base(checkpoint), checkpoint.manifest.conventions, checkpoint)


def _of_model(choice: Choice) -> Subject:
    source, path = choice.source, Path(choice.source)
    if source != "tiny":
        if path.is_file():
            _refuse_file(path)
        elif path.is_dir():
            _refuse_folder(path)
        elif not _may_be_hub_id(path):
            raise UsageError(_no_source(path))
    noted = mapping(conventions_in(choice.lora), "base") if choice.lora else {}
    model = choose_model(source, noted)
    configs = read_configs(model_source(model))
    notes = notes_in_file(configs.source) if configs.source.is_file() else notes_in_folder(configs.source)
    name = short_name(path) if path.exists() else source
    return Subject(name, name, Base(model, configs), mapping(notes, "conventions"))


def choose_model(source: str, noted: Mapping[str, Any]) -> Model:
    """Which weight files: those that the LoRA was trained on, else the plain ones, else the only variant there is."""
    here = local_source(source)
    if here is None:
        own = (noted["variant"],) if "variant" in noted else ()
        revision = noted.get("revision") if noted.get("pretrained") == source else None
        models = [Model(source, variant, revision) for variant in dict.fromkeys((*own, "fp16", None))]
        return next((model for model in models[:-1] if _complete(model_source(model), model.variant)), models[-1])
    if here.is_file():
        return Model(source, None)
    read_configs(here)
    variants = find_weights(here / "unet", "unet", None).variants
    for variant in dict.fromkeys((noted.get("variant"), None, *variants)):
        if _complete(here, variant):
            return Model(source, variant)
    there = "; ".join(f"{part}: {', '.join(find_weights(here / part, part, None).there) or 'none'}" for part in PARTS)
    raise ModelError(
        f"{here}: no weights that all three networks have, got {there}. svdtune reads safetensors only (a .bin or .pt file can "
        "run code when it is opened), and takes one variant for all: download the folder again."
    )


def _complete(folder: Path, variant: str | None) -> bool:
    return all(find_weights(folder / part, part, variant).files for part in PARTS)


def _refuse_file(path: Path) -> None:
    """Raise unless `path` may be a whole model; what else is wrong with it is said when its header is read."""
    if path.suffix.lower() in PICTURES:
        raise UsageError(f"{path} is a picture; the model comes first: svdtune sample SOURCE {path}")
    if path.suffix in PICKLES:
        raise ModelError(pickle_refused(path))
    if recognise({name: entry.shape for name, entry in read_header(path).tensors.items()}).name == "LoRA":
        raise UsageError(lora_as_source(path, None))


def _refuse_folder(path: Path) -> None:
    if (path / _ADAPTER).is_file():
        settings = load_json(path / _ADAPTER)
        raise UsageError(
            lora_as_source(path, settings.get("base_model_name_or_path") if isinstance(settings, dict) else None)
        )
    if (path / "unet").is_dir() or (path / "model_index.json").is_file():
        return
    if path.resolve().name == "checkpoints" and any(path.glob("step-*")):
        raise UsageError(f"{path} holds the checkpoints of a run. Give the run: {path.resolve().parent}")
    if (path / "config.yaml").is_file():
        raise UsageError(no_checkpoint(path))
    if (path / "config.json").is_file():
        raise UsageError(
            f"{path} is one part of a model. Give the folder above it, which has unet/, vae/ and image_encoder/."
        )
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        raise UsageError(f"{path} is no diffusers folder (it has no unet/). Give the file in it: {files[0]}")
    raise UsageError(f"{path} is no run (it has no checkpoints/) and no model (it has no unet/). {_KINDS}")


def _may_be_hub_id(path: Path) -> bool:
    """`owner/name`, where that is not a path in a folder that is here, or in the one for runs, mistyped."""
    first = path.parts[0] if path.parts else ""
    return (
        len(path.parts) == 2
        and not first.startswith((".", "/", "~"))
        and first != "runs"
        and not Path(first).is_dir()
        and path.suffix not in (".safetensors", *PICKLES)
    )


def _no_source(path: Path) -> str:
    text, sibling = no_such_run(path), near(path)
    if "Did you mean" in text:
        return text
    return f"no such file or folder: {path}. Did you mean {sibling}?" if sibling else f"{text} {_KINDS}"
