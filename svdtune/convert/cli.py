"""`svdtune convert SRC DST`: what to write is said by SRC and by how DST ends; nothing takes the name DST before it was read back."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from svdtune.checkpoint.beside import write_beside
from svdtune.checkpoint.card import Kind
from svdtune.checkpoint.export import pipeline_json, published, write_json_files
from svdtune.checkpoint.files import fsync_file, fsync_folder, is_disk_full, partial_name
from svdtune.checkpoint.lora import comfy_tensors, peft_files
from svdtune.checkpoint.notes import as_metadata, write_notes
from svdtune.checkpoint.stream import by_width, num_bytes, write_weights
from svdtune.convert import verify
from svdtune.convert.into import into_base
from svdtune.convert.progress import Progress
from svdtune.convert.sources import Adapter, Whole, merged, open_source
from svdtune.errors import CheckpointError, ModelError, UsageError
from svdtune.model.facts import FILES, STEMS
from svdtune.model.headers import read_header
from svdtune.model.original import PREFIXES
from svdtune.model.weights import Weights, cast, cast_each, in_memory, original_weights

Precision = Literal["fp16", "bf16", "fp32"]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, None: None}
_ENDING = ".safetensors"


def convert(
    source: str,
    destination: Path,
    *,
    into: Path | None = None,
    merge: bool = False,
    base: str | None = None,
    dtype: Precision | None = None,
    checkpoint: str | None = None,
) -> list[str]:
    """Write `destination` and return lines that say what it is. See `svdtune convert --help` for what follows from what.

    Raises UsageError, ModelError, CheckpointError; then there is no `destination`.
    """
    as_file = destination.suffix.lower() == _ENDING
    _require_free(destination, as_file=as_file)
    if into is not None and not as_file:
        raise UsageError(f"--into: {destination} is to be a folder, expected a name that ends in {_ENDING}.")
    if into is not None and into.is_dir():
        raise UsageError(f"--into: {into} is a folder, expected the base's single file (svd_xt{_ENDING}).")
    if into is not None and dtype is not None:
        raise UsageError(f"--dtype: got {dtype}, but --into keeps every dtype of {into}.")
    opened = open_source(source, base=base, checkpoint=checkpoint, into=into)
    if isinstance(opened, Whole) and merge:
        raise UsageError(f"--merge: {source} is a whole model, not a LoRA: there is nothing to merge.")
    if isinstance(opened, Adapter) and not merge and into is None:
        return _write_adapter(opened, destination, _DTYPES[dtype], as_file=as_file)
    whole = merged(opened) if isinstance(opened, Adapter) else opened
    if not as_file:
        return _write_folder(_cast(whole, dtype), source, destination)
    if into is not None:
        return _write_into(whole, into, destination)
    return _write_file(_cast(whole, dtype), source, destination)


def _write_file(whole: Whole, source: str, destination: Path) -> list[str]:
    weights = by_width(original_weights(_jsons(whole), whole.parts))
    notes = {**whole.notes, "configs": _jsons(whole)}
    with _new_file(destination) as partial, _progress(destination, [weights]) as progress:
        forward = verify.forward(whole, source)
        write_weights(partial, weights, as_metadata(notes), progress.told)
        progress.say("reading it back")
        verify.same_tensors(partial, weights, progress.told)
        verify.same_forward(forward, partial)
    return [f"{destination}: {_described(weights)}, original names, read back equal, forward equal{_left_out(whole)}"]


def _write_into(whole: Whole, base: Path, destination: Path) -> list[str]:
    found = into_base(base, whole)
    with _new_file(destination) as partial, _progress(destination, [found.weights]) as progress:
        forward = verify.forward(found.whole, str(base))
        write_weights(partial, found.weights, {**found.metadata, **as_metadata(found.notes)}, progress.told)
        progress.say("reading it back")
        verify.same_tensors(partial, found.weights, progress.told)
        verify.same_forward(forward, partial)
    total = len(found.weights.forms)
    return [
        f"{destination}: {len(found.replaced)} of {total} tensors of {base} replaced, {total - len(found.replaced)} copied byte for "
        "byte, read back equal, forward equal"
    ]


def _write_folder(whole: Whole, source: str, destination: Path) -> list[str]:
    with _new_folder(destination) as partial, _progress(destination, list(whole.parts.values())) as progress:
        forward = verify.forward(whole, source)
        write_json_files(partial, pipeline_json(_jsons(whole)))
        for part, weights in whole.parts.items():
            write_weights(
                partial / part / f"{STEMS[part]}{_ENDING}", by_width(weights), {"format": "pt"}, progress.told
            )
        _write_beside(partial, destination, whole.notes, whole.checkpoint, whole.base, "pipeline")
        progress.say("reading it back")
        for part, weights in whole.parts.items():
            verify.same_tensors(partial / part / f"{STEMS[part]}{_ENDING}", weights, progress.told)
        verify.same_forward(forward, partial)
    counts = sum(len(weights.forms) for weights in whole.parts.values())
    return [f"{destination}: diffusers folder, {counts} tensors, read back equal, forward equal{_left_out(whole)}"]


def _write_adapter(adapter: Adapter, destination: Path, dtype: torch.dtype | None, *, as_file: bool) -> list[str]:
    lora = adapter.lora
    if adapter.bridge is not None:
        assert adapter.checkpoint is not None, "only a run's bridge is known"
        raise ModelError(
            f"{adapter.checkpoint}: it has a bridge (conditioning.bridge), which no LoRA can hold. Add --merge to write the whole "
            f"model, or use {adapter.checkpoint.parents[1] / 'export'}, which has the adapter and an image encoder with the bridge in it."
        )
    kept = dtype or next(iter(lora.layers.values())).up.dtype
    if as_file:
        weights = in_memory(comfy_tensors(lora, adapter.unet, kept))
        with _new_file(destination) as partial:
            write_weights(partial, weights, as_metadata(lora.notes))
            verify.same_adapter(adapter, partial, kept)
        return [f"{destination}: LoRA of {len(lora.layers)} layers, ComfyUI's names, read back equal"]
    name = lora.notes.get("conventions", {}).get("base", {}).get("pretrained", "")
    tensors, settings = peft_files(lora, name, kept)
    with _new_folder(destination) as partial:
        write_weights(partial / "adapter_model.safetensors", in_memory(tensors), {"format": "pt"})
        write_json_files(partial, {"adapter_config.json": settings})
        source = adapter.base.source if adapter.base else None
        _write_beside(partial, destination, lora.notes, adapter.checkpoint, source, "lora")
        verify.same_adapter(adapter, partial, kept)
    return [f"{destination}: peft adapter of {len(lora.layers)} layers, read back equal"]


def _write_beside(
    partial: Path, destination: Path, notes: Mapping[str, Any], checkpoint: Path | None, base: Path | None, kind: Kind
) -> None:
    """A card where the run is known, else the notes that came along."""
    if checkpoint is not None and base is not None:
        write_beside(partial, checkpoint=checkpoint, source=base, kind=kind, name=destination.name)
    elif notes:
        write_notes(partial, notes)


def _cast(whole: Whole, dtype: Precision | None) -> Whole:
    """In `dtype`; without one, each tensor in that of the source, and what a training made in that of its base."""
    wanted = _DTYPES[dtype]
    if wanted is not None:
        return replace(whole, parts={part: cast(weights, wanted) for part, weights in whole.parts.items()})
    made = {part: cast_each(weights, _dtypes(whole, part)) for part, weights in whole.parts.items()}
    return replace(whole, parts=made)


def _dtypes(whole: Whole, part: str) -> dict[str, torch.dtype]:
    """Of a base's tensors; a widened UNet has others too, which get the dtype of its first."""
    known = dict(whole.dtypes.get(part, {}))
    first = next(iter(known.values()), None)
    return known if first is None else {name: known.get(name, first) for name in whole.parts[part].forms}


def _jsons(whole: Whole) -> dict[str, dict[str, Any]]:
    """Results are published: where somebody's disk had a part is left out."""
    return {part: published(getattr(whole.configs, part)) for part in FILES}


def _left_out(whole: Whole) -> str:
    """What a release's file holds beside the three networks: the original's code reads its second encoder."""
    if not whole.configs.source.is_file():
        return ""
    beside = [
        name for name in read_header(whole.configs.source).tensors if not name.startswith(tuple(PREFIXES.values()))
    ]
    if not beside:
        return ""
    return f"; left out: {len(beside)} tensors beside the model ({beside[0]}, ...), which --into keeps"


def _described(weights: Weights) -> str:
    total = sum(map(num_bytes, weights.forms.values()))
    dtypes = sorted({str(form.dtype).removeprefix("torch.") for form in weights.forms.values()})
    return f"{len(weights.forms)} tensors, {total / 2**30:.2f} GiB, {' and '.join(dtypes)}"


def _require_free(destination: Path, *, as_file: bool) -> None:
    """Raise UsageError where something would be overwritten, or DST looks like a file of another kind."""
    _require_absent(destination)
    if not as_file and destination.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".gguf"):
        raise UsageError(f"{destination}: svdtune writes {_ENDING} files and folders, no {destination.suffix}.")
    if not destination.parent.is_dir():
        raise UsageError(f"{destination}: there is no folder {destination.parent}. Make it first.")


def _require_absent(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise UsageError(
            f"{destination}: it is there already, and convert overwrites nothing. Give another name, or remove it."
        )


@contextmanager
def _new_file(destination: Path) -> Iterator[Path]:
    partial = partial_name(destination)
    try:
        with _failures_told(destination):
            partial.write_bytes(b"")  # a place that takes no files is told before the work
            yield partial
            fsync_file(partial)
        _require_absent(destination)
        os.replace(partial, destination)
        fsync_folder(destination.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    partial = partial_name(destination)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _failures_told(destination):
            partial.mkdir()
            yield partial
            for path in sorted(partial.rglob("*")):
                (fsync_folder if path.is_dir() else fsync_file)(path)
        _require_absent(destination)
        os.replace(partial, destination)
        fsync_folder(destination.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _failures_told(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        own = error.filename is not None and partial_name(destination).name in str(error.filename)
        if not is_disk_full(error) and not own:
            raise
        if not is_disk_full(error):
            raise UsageError(
                f"{destination}: it cannot be written: {error.strerror or error}. Give another place."
            ) from error
        free = shutil.disk_usage(destination.parent).free / 2**30
        raise CheckpointError(
            f"{destination}: the disk is full, available are {free:.2f} GiB. Nothing was left there: free space and try again."
        ) from error


def _progress(destination: Path, weights: list[Weights]) -> Progress:
    total = sum(num_bytes(form) for item in weights for form in item.forms.values())
    return Progress(f"writing {destination.name}", 2 * total, sys.stderr)
