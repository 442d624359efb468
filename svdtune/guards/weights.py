"""Stage `checkpoint`: what a model folder really holds, from JSON and safetensors headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from svdtune.config.schema import Adapt, Config
from svdtune.errors import ModelError
from svdtune.guards.differences import told_by_cause
from svdtune.guards.findings import Finding
from svdtune.guards.model_json import check_json, check_part_json, read_jsons
from svdtune.model.facts import FILES, SHIPPED, STEMS, TINY
from svdtune.model.family import Shapes, recognise
from svdtune.model.files import PICKLES, WeightFiles, cached_folder, find_weights
from svdtune.model.headers import BadFile, Entry, read_header, read_index
from svdtune.model.single_file import SingleFile, read_single_file, what_it_is
from svdtune.model.source import part_weights

_VARIANTS = ("fp16", "bf16", "fp32", "ema", "non_ema")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CONVERT = "svdtune reads diffusers folders (unet/, vae/, image_encoder/, scheduler/, feature_extractor/) and whole single files."
_MODEL = "a diffusers folder, a single file, a hub id (owner/name) or 'tiny'"
_FILE = "a diffusers folder, or one file that holds a whole SVD model (UNet, VAE, image encoder)"
_WHOLE = (
    "Give the release's own file (svd_xt.safetensors), its diffusers folder or its hub id "
    "(stabilityai/stable-video-diffusion-img2vid-xt)."
)


def check_weights(config: Config) -> list[Finding]:
    """CKP201-219 for `model.pretrained`; reads no tensor. A hub id that is not on this machine is a warning."""
    model = config.model
    path = TINY if model.pretrained == "tiny" else Path(model.pretrained)
    if path.is_dir():
        return check_folder(path, config)
    if path.exists():
        return check_file(path, config)
    no_id = (
        len(path.parts) != 2
        or model.pretrained.startswith((".", "/", "~"))
        or path.suffix in (".safetensors", *PICKLES)
    )
    if no_id or Path(path.parts[0]).is_dir():
        got, why = f"no such folder or file: {path}", "There is nothing to train on."
        return [Finding("CKP201", "error", "model.pretrained", got, _MODEL, why,
                        "Correct the path, or give a hub id.")]  # fmt: skip
    if model.revision in _VARIANTS:
        got = f"{model.revision}: that is a variant of the files, not a state of the repository"
        patch = ("model.revision=null", f"model.variant={model.revision}")
        return [Finding("CKP222", "error", "model.revision", got, "a commit, branch or tag, or null", "The hub would find no such "
                        "revision, and nothing would be loaded.", f"Set {' '.join(patch)}.", patch)]  # fmt: skip
    try:
        snapshot = cached_folder(model)
    except ValueError as error:  # huggingface_hub refuses the name itself
        got = str(error).strip().splitlines()[0]
        return [
            Finding(
                "CKP201",
                "error",
                "model.pretrained",
                got,
                _MODEL,
            )
        ]
    if snapshot is not None:
        return check_folder(snapshot, config)
    why = "Training begins with their download (gigabytes), and they are not checked here."
    if model.pretrained not in SHIPPED:
        why += " Nor are shapes and memory: only the model's own config.json says them. Download it first to have them checked."
    near = (
        get_close_matches(model.pretrained, [*SHIPPED, "tiny"], n=1, cutoff=0.8)
        if model.pretrained not in SHIPPED
        else []
    )
    fix = f"Did you mean {near[0]}?" if near else ""
    got = f"the weights of {model.pretrained} are not on this machine yet"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set: nothing is downloaded, so training would stop at once."
        fix = fix or "Unset HF_HUB_OFFLINE, or give a local folder."
        return [Finding("CKP203", "error", "model.pretrained", got, "weights on this machine", why, fix)]
    return [Finding("CKP203", "warning", "model.pretrained", got, why=why, fix=fix)]


def check_folder(folder: Path, config: Config) -> list[Finding]:
    """All findings about one diffusers folder."""
    if not any((folder / part).is_dir() for part in FILES):
        return [_no_parts(folder)]
    parts, findings = read_jsons(folder)
    findings += check_json(folder, parts)
    found = {
        part: find_weights(folder / part, part, config.model.variant) for part in STEMS if (folder / part).is_dir()
    }
    findings += _absent(folder, found, config.model.variant)
    # Heads that do not divide change shapes: each key would be told again.
    undone = {"unet"} if any(f.code == "CKP213" and "divide" in f.expected for f in findings) else set()
    for part, weights in found.items():
        if weights.files and part not in undone:
            # A config that lacks numbers has been told; that no network can be built from it says no more.
            lacking = any(f.code in ("CKP215", "CKP216") and str(folder / part) in f.where for f in findings)
            found_here = check_part(folder / part, part, weights, parts.get(part), config)
            findings += [f for f in found_here if not (lacking and f.code == "CKP201")]
    return findings


def check_file(path: Path, config: Config) -> list[Finding]:
    """All findings about one file in the place of a folder: it has to hold a whole SVD model under the original's names."""
    try:
        header = read_header(path)
    except BadFile as bad:
        return [Finding("CKP205", "error", str(path), bad.what, _FILE, fix=_WHOLE)]
    family = recognise({name: entry.shape for name, entry in header.tensors.items()})
    if not family.is_svd or family.naming != "original":
        why = " ".join(family.notes)
        return [Finding("CKP204", "error", str(path), f"one file: {what_it_is(family)}", _FILE, why, _WHOLE)]
    try:
        file = read_single_file(path)
    except ModelError as error:
        return [Finding("CKP209", "error", str(path), str(error).removeprefix(f"{path}: "), _FILE, fix=_WHOLE)]
    if strange := _strange_dtypes(str(path), header.tensors):
        return [strange]
    found = [
        item
        for part in FILES
        for item in check_part_json(Path(file.configs.where(part)), part, getattr(file.configs, part))
    ]
    return found + [item for part in STEMS for item in _part_of_file(file, part, config)]


def _part_of_file(file: SingleFile, part: str, config: Config) -> list[Finding]:
    """The tensors of one part, under the names they will have, against the network that its config makes."""
    where = file.configs.where(part)
    if unknown := file.plan(part).unknown:
        got = (
            f"{len(unknown)} that SVD has no place for ({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''})"
        )
        return [Finding("CKP210", "error", where, got, "the names of the release", "They would be left out.", _WHOLE)]
    got = {name: form.shape for name, form in part_weights(file.path, part, None).forms.items()}
    return _against(where, where, part, getattr(file.configs, part), got, adapts=False, adapt=config.adapt)


def read_part(weights: WeightFiles) -> tuple[dict[str, Entry], list[Finding]]:
    """All tensors of a part, and CKP205/209 for files that cannot be read or are missing."""
    tensors: dict[str, Entry] = {}
    findings = []
    files = list(weights.files)
    if weights.index is not None:
        try:
            files = [weights.index.parent / name for name in read_index(weights.index)]
        except BadFile as bad:
            return {}, [Finding("CKP205", "error", str(bad.path), bad.what, "the index of the shards")]
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        why = "The model is cut into shards and not all are here; their weights would be random."
        got = f"{len(gone)} of {len(files)} shards are missing: {', '.join(gone[:3])}"
        findings.append(
            Finding(
                "CKP209", "error", str(files[0].parent), got, "every shard that the index names", why, "Download them."
            )
        )
    for file in files:
        if file.name in gone:
            continue
        try:
            tensors |= read_header(file).tensors
        except BadFile as bad:
            findings.append(Finding("CKP205", "error", str(bad.path), bad.what, "safetensors weights"))
    return tensors, findings


def expected_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the network that a part's config makes, built on the meta device by the classes that training loads."""
    import torch

    from svdtune.model.load import build_part

    with torch.device("meta"):
        network = build_part(part, config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def check_part(
    folder: Path, part: str, weights: WeightFiles, config: Mapping[str, Any] | None, run: Config
) -> list[Finding]:
    """Findings about the weights of one part, against the network that its config makes."""
    tensors, findings = read_part(weights)
    if findings:
        return findings
    if strange := _strange_dtypes(str(folder), tensors):
        findings.append(strange)
    if config is None:
        return findings
    got = {name: entry.shape for name, entry in tensors.items()}
    adapts = run.model.on_mismatch == "adapt"
    return findings + _against(
        str(folder / "config.json"), str(folder), part, config, got, adapts=adapts, adapt=run.adapt
    )


def _against(
    json_at: str, where: str, part: str, config: Mapping[str, Any], got: Shapes, *, adapts: bool, adapt: Adapt
) -> list[Finding]:
    """The weights `got` against the network that the config of their part makes; `json_at` is where that config lies."""
    try:
        expected = expected_shapes(part, config)
    except Exception as error:  # whatever diffusers or transformers raise, no network can be built from this JSON
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        why, fix = "No network can be built from this config.", "Copy it from the release."
        return [Finding("CKP201", "error", json_at, told, "a config of its class", why, fix)]
    return told_by_cause(where, part, expected, got, adapts=adapts, adapt=adapt)


def _strange_dtypes(where: str, tensors: Mapping[str, Entry]) -> Finding | None:
    strange = sorted({entry.dtype for entry in tensors.values()} - _FLOATS - {"I64"})
    if not strange:
        return None
    why = "Quantised weights are made for inference: training cannot start from them."
    return Finding(
        "CKP212", "error", where, ", ".join(strange), "F32, F16 or BF16", why, "Take the fp16 or fp32 weights."
    )


def _absent(folder: Path, found: Mapping[str, WeightFiles], variant: str | None) -> list[Finding]:
    """CKP206: parts without the weights that model.variant names, in one finding when one change mends all of them."""
    lacking = {part: weights for part, weights in found.items() if not weights.files}
    if not lacking:
        return []
    patch = _variant_of(found)
    expected = f"*.{variant}.safetensors" if variant else "safetensors without a variant in the name"
    if patch:
        got = f"no {expected} in {', '.join(lacking)}; there: {', '.join(next(iter(found.values())).variants) or 'plain'} weights"
        why = "diffusers' message for this names a .bin file that nobody wants."
        fix = f"Set model.variant={patch}."
        return [
            Finding("CKP206", "error", f"{folder}: model.variant", got, expected, why, fix, (f"model.variant={patch}",))
        ]
    return [_without_weights(folder / part, weights, expected) for part, weights in lacking.items()]


def _variant_of(found: Mapping[str, WeightFiles]) -> str | None:
    """A value of model.variant for which every part has weights."""
    if all(weights.plain for weights in found.values()):
        return "null"
    common = set.intersection(*(set(weights.variants) for weights in found.values()))
    return min(common, default=None)


def _without_weights(folder: Path, weights: WeightFiles, expected: str) -> Finding:
    dead = [f"{path.name}, a link that leads nowhere" for path in sorted(folder.iterdir()) if not path.exists()]
    there = [*weights.there, *dead]
    pickles = any(name.endswith(PICKLES) for name in weights.others)
    if weights.variants or weights.plain:
        why, fix = (
            "The parts of this folder hold different variants; one setting reads all.",
            "Download one variant of all parts.",
        )
    elif pickles:
        why = "svdtune reads safetensors only: a pickle can run code when it is opened."
        fix = "Take the safetensors of the release."
    else:
        why, fix = "There is nothing to train on.", "Download the weights of this part."
    return Finding("CKP206", "error", str(folder), f"there: {', '.join(there) or 'no weights'}", expected, why, fix)


def _no_parts(folder: Path) -> Finding:
    """CKP201 for a folder without subfolders of a pipeline, naming what it holds."""
    files = sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", *PICKLES)))
    got = f"no {'/, '.join(FILES)}/ in it"
    if (folder / "config.json").is_file():
        got += "; it is the folder of one part (it holds a config.json)"
    if (folder / "snapshots").is_dir():
        got += "; it is a model's folder in the hub's cache: its states are in snapshots/COMMIT"
    if files:
        got += f"; it holds {', '.join(files[:3])}"
        try:
            shapes = {name: entry.shape for name, entry in read_header(folder / files[0]).tensors.items()}
            got += f" ({recognise(shapes).name})"
        except BadFile as bad:
            got += f" ({bad.what})"
    return Finding(
        "CKP201",
        "error",
        f"model.pretrained: {folder}",
        got,
        "a diffusers folder",
        _CONVERT,
        "Give the folder above the parts."
        if (folder / "config.json").is_file()
        else "Give the folder that holds them.",
    )
