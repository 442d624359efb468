"""What `svdtune convert` is given: a whole model, or a LoRA and (where it is known) the base that it is for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from svdtune.checkpoint.export import BRIDGE, VISUAL, fold_bridge
from svdtune.checkpoint.files import load_json
from svdtune.checkpoint.lora import Lora, layers_of, merge_lora, put_lora, read_lora
from svdtune.checkpoint.notes import make_notes, notes_in_file, notes_in_folder, trained_on
from svdtune.checkpoint.store import verify
from svdtune.checkpoint.tensors import load_tensors
from svdtune.errors import CheckpointError, ModelError, UsageError
from svdtune.model.facts import HARMLESS, PACKAGE, SHIPPED, ModelConfigs
from svdtune.model.family import recognise
from svdtune.model.files import PICKLES, find_weights
from svdtune.model.headers import BadFile, read_header, read_index
from svdtune.model.load import load_part, load_unet
from svdtune.model.source import (
    PARTS,
    local_source,
    model_source,
    part_weights,
    read_configs,
    weights_hash,
)
from svdtune.model.weights import Weights, in_memory, laid_over
from svdtune.sample.run import Checkpoint, find_checkpoint, is_run, open_checkpoint, require_own_base
from svdtune.sample.sources import choose_model


@dataclass(frozen=True)
class Whole:
    """A whole SVD model: the JSON of its parts, and their tensors under diffusers names."""

    configs: ModelConfigs
    parts: Mapping[str, Weights]
    notes: Mapping[str, Any] = field(default_factory=dict)
    trained: frozenset[str] | None = None
    """Names of the UNet's tensors that a training changed; None where that is not known."""
    checkpoint: Path | None = None
    """The folder of a run's checkpoints that it came from."""
    base: Path | None = None
    """Where the base of a training lies."""
    dtypes: Mapping[str, Mapping[str, torch.dtype]] = field(default_factory=dict)
    """Of the base's tensors, by part: what a training made of them is float32."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA that was read, with what it is for."""

    lora: Lora
    unet: Mapping[str, Any]
    """Config of the UNet whose names it has."""
    base: Base | None
    """The base's weights, where they are on this machine or were named."""
    checkpoint: Path | None = None
    bridge: torch.Tensor | None = None
    """What was trained with it between the CLIP tower and the UNet."""


@dataclass(frozen=True)
class Base:
    """A model on this machine, and which of a folder's weights are meant."""

    name: str
    source: Path
    variant: str | None


def open_source(source: str, *, base: str | None, checkpoint: str | None, into: Path | None = None) -> Whole | Adapter:
    """Look at headers and JSON of `source`: a run, a diffusers folder, a single file, `tiny`, a hub id, or a LoRA.

    The base of a LoRA is `base`, else the one it was trained on where that is here, else `into`. Raises UsageError for what is
    none of these, ModelError and CheckpointError for what is damaged or of another model.
    """
    path = Path(source)
    if path.is_dir() and is_run(path):
        return _of_run(path, open_checkpoint(find_checkpoint(path, checkpoint)), base)
    if checkpoint is not None:
        raise UsageError(
            f"--checkpoint: got {checkpoint}, but {source} is no run folder, and only a run has checkpoints."
        )
    if (path / "MANIFEST.json").is_file():
        verify(path)
        return _of_run(path, open_checkpoint(path), base)
    if path.is_file() and path.suffix in PICKLES:
        raise ModelError(
            f"{path}: a {path.suffix} file can run code when it is opened; svdtune reads safetensors only."
        )
    adapter = (path / "adapter_config.json").is_file()
    if adapter or (path.is_file() and recognise(_shapes(path)).name == "LoRA"):
        notes = notes_in_folder(path) if adapter else notes_in_file(path)
        found = _base(base, notes, path) or (Base(str(into), into, None) if into else None)
        unet = read_configs(found.source).unet if found else _shipped_unet(notes)
        try:
            return Adapter(read_lora(path, unet), unet, found)
        except ModelError as error:
            if found or isinstance(error, BadFile):
                raise
            raise ModelError(
                f"{error} No base was given, so it was taken to be for SVD as released: give another base with --base."
            ) from error
    if base is not None:
        raise UsageError(f"--base: got {base}, but {source} is a whole model, not a LoRA.")
    return open_whole(source)


def open_whole(source: str) -> Whole:
    """A model that is no run and no LoRA."""
    found = _at(source)
    configs = read_configs(found.source)
    notes = notes_in_file(found.source) if found.source.is_file() else notes_in_folder(found.source)
    return Whole(configs, _parts(found), {key: value for key, value in notes.items() if key != "configs"})


def merged(adapter: Adapter) -> Whole:
    """The base with the LoRA in its weights, which become float32. Raises UsageError when no base is known."""
    if adapter.base is None:
        raise UsageError(
            f"--base: got none, expected the model that {adapter.lora.path} was trained on: to merge, its weights are needed. "
            "Give a diffusers folder, a single file or a hub id."
        )
    base = adapter.base
    _require_own_base(adapter, base)
    configs = read_configs(base.source)
    unet = load_part(configs, "unet", base.variant)
    put_lora(unet, adapter.lora)
    changed = merge_lora(unet)
    own = {name: parameter.detach() for name, parameter in unet.named_parameters() if name in changed}
    parts = _parts(base)
    dtypes = _dtypes(parts)
    parts["unet"] = laid_over(parts["unet"], own)
    if adapter.bridge is not None:
        configs, parts["image_encoder"] = _bridged(configs, parts["image_encoder"], adapter.bridge)
    return Whole(
        configs, parts, adapter.lora.notes, frozenset(changed), adapter.checkpoint, base.source, dtypes
    )  # fmt: skip


def _of_run(run: Path, checkpoint: Checkpoint, base: str | None) -> Whole | Adapter:
    """A checkpoint: the base's tensors with the trained ones (their averages, where kept) laid over; or its LoRA."""
    if base is not None:
        raise UsageError(f"--base: got {base}, but a run knows its base ({checkpoint.config.model.pretrained}).")
    config = checkpoint.config
    found = Base(config.model.pretrained, model_source(config.model), config.model.variant)
    require_own_base(checkpoint, found.source)
    configs = read_configs(found.source)
    notes = make_notes(checkpoint.manifest, found.source)
    trained = load_tensors(checkpoint.weights_file)
    projection = trained.pop(BRIDGE, None)
    if config.adapt.method == "lora":
        settings = {"lora_alpha": config.adapt.rank if config.adapt.alpha is None else config.adapt.alpha}
        layers = layers_of(checkpoint.weights_file, trained, configs.unet, settings)
        return Adapter(Lora(checkpoint.folder, layers, notes), configs.unet, found, checkpoint.folder, projection)
    parts = _parts(found)
    dtypes = _dtypes(parts)
    if checkpoint.manifest.conventions.get("widened"):
        widened, _ = load_unet(config.model, configs, config.run.seed)
        parts["unet"] = in_memory(widened.state_dict())
    parts["unet"] = laid_over(parts["unet"], trained)
    if projection is not None:
        configs, parts["image_encoder"] = _bridged(configs, parts["image_encoder"], projection)
    return Whole(configs, parts, notes, frozenset(trained), checkpoint.folder, found.source, dtypes)


def _bridged(configs: ModelConfigs, tower: Weights, projection: torch.Tensor) -> tuple[ModelConfigs, Weights]:
    clip, visual = fold_bridge(configs.image_encoder, tower.read(VISUAL), projection)
    return replace(configs, image_encoder=clip), laid_over(tower, {VISUAL: visual})


def _base(named: str | None, notes: Mapping[str, Any], path: Path) -> Base | None:
    """The base that was named, or the one in the LoRA's notes or peft's settings where it is on this machine."""
    if named is not None:
        return _at(named)
    noted = notes.get("conventions", {}).get("base", {})
    pretrained = noted.get("pretrained") or _in_settings(path / "adapter_config.json")
    if not isinstance(pretrained, str) or not (pretrained == "tiny" or _is_model(Path(pretrained))):
        return None
    if "variant" not in noted:
        return _at(pretrained)
    return Base(pretrained, _here(pretrained), noted["variant"])


def _in_settings(path: Path) -> object:
    """The base that peft's adapter_config.json names, if it can be read; reading the adapter says what is wrong with it."""
    try:
        return load_json(path).get("base_model_name_or_path")
    except (CheckpointError, OSError, AttributeError):
        return None


def _at(source: str) -> Base:
    """A model by its path or hub id; of a folder the plain weights, else the only variant there is."""
    path = Path(source)
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix not in (".safetensors", *PICKLES)
    if source != "tiny" and not path.exists() and (not named or path.parent.is_dir()):
        raise UsageError(
            f"{source}: no such run, folder or file. Give a run, a diffusers folder, a .safetensors file, a LoRA, a hub id "
            "(owner/name) or tiny."
        )
    if source != "tiny" and path.is_dir() and not (path / "unet").is_dir():
        raise ModelError(_no_model(path))
    try:
        model = choose_model(source, {})
        return Base(source, model_source(model), model.variant)
    except ModelError as error:
        raise ModelError(str(error).replace("model.pretrained", source, 1)) from error


def _no_model(path: Path) -> str:
    above = path.resolve().parent
    if (path / "config.json").is_file() and (above / "unet").is_dir():
        return f"{path}: it is one part of a model. Give the folder above it, {above}."
    return (
        f"{path}: it is no run (it has no checkpoints/), no diffusers folder (no unet/) and no LoRA (no adapter_config.json). Give one "
        "of these, a .safetensors file, or a hub id."
    )


def _here(pretrained: str) -> Path:
    found = local_source(pretrained)
    assert found is not None
    return found


def _is_model(path: Path) -> bool:
    return path.is_file() or (path / "unet").is_dir()


def _parts(base: Base) -> dict[str, Weights]:
    if base.source.is_dir():
        for part in PARTS:
            _require_shards(base.source / part, part, base.variant)
    parts = {part: part_weights(base.source, part, base.variant) for part in PARTS}
    tower = parts["image_encoder"]
    kept = {name: form for name, form in tower.forms.items() if name not in HARMLESS}
    return {**parts, "image_encoder": Weights(kept, tower.read)}


def _require_shards(folder: Path, part: str, variant: str | None) -> None:
    index = find_weights(folder, part, variant).index
    named = read_index(index) if index is not None else []
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of its {len(named)} shards are not there ({', '.join(missing[:3])}). Download them again."
        )


def _dtypes(parts: Mapping[str, Weights]) -> dict[str, dict[str, torch.dtype]]:
    return {part: {name: form.dtype for name, form in weights.forms.items()} for part, weights in parts.items()}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in read_header(path).tensors.items()}


def _shipped_unet(notes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The UNet's config where the base is not here: all releases of SVD have the same."""
    pretrained = notes.get("conventions", {}).get("base", {}).get("pretrained", "")
    return read_configs(SHIPPED.get(pretrained, PACKAGE / "facts" / "svd-xt")).unet


def _require_own_base(adapter: Adapter, base: Base) -> None:
    noted = adapter.lora.notes.get("conventions", {}).get("base", {})
    expected = noted.get("unet_sha256")
    if expected is None or adapter.checkpoint is not None:
        return
    got = weights_hash(base.source, "unet", base.variant)
    if not trained_on(noted, got, base.source, base.variant):
        raise ModelError(
            f"{adapter.lora.path}: this LoRA was trained on {noted.get('pretrained')} (UNet {expected[:16]}…), the base "
            f"{base.name} has the UNet {got[:16]}…. A LoRA acts only on its own base: give that one with --base."
        )
