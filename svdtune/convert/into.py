"""`--into base.safetensors`: the base's file with the trained UNet weights in their places, and every other byte as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdtune.convert.sources import Whole
from svdtune.errors import ModelError
from svdtune.model.facts import FILES
from svdtune.model.original import PREFIXES, rename, rules
from svdtune.model.single_file import read_single_file
from svdtune.model.source import PARTS, part_weights
from svdtune.model.weights import Weights, cast_each, stored


@dataclass(frozen=True)
class Into:
    """What is to be written."""

    weights: Weights
    """All tensors of the base's file, in its order and dtypes."""
    replaced: frozenset[str]
    """Names in the file of those that are not the base's."""
    metadata: Mapping[str, str]
    """That of the base's file."""
    notes: Mapping[str, Any]
    whole: Whole
    """The model that the new file must be."""


def into_base(path: Path, whole: Whole) -> Into:
    """Plan the new file. Raises ModelError when `path` is no whole SVD file, of another shape, or not the base of the training."""
    file = read_single_file(path)
    own = {part: part_weights(path, part, None) for part in PARTS}
    ours = whole.parts["unet"]
    _require_same_shapes(path, own["unet"], ours)
    _require_same_tower(path, own["image_encoder"], whole.parts["image_encoder"])
    changed = frozenset(name for name in ours.forms if not _is_same(own["unet"].read(name), ours.read(name)))
    if whole.trained is not None and (strange := sorted(changed - whole.trained)):
        raise ModelError(
            f"--into: {path} is not the base of this training: {len(strange)} UNet weights that were not trained differ "
            f"({', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}). Trained weights act only on their own base: give that one."
        )
    new = _replaced(own["unet"], ours, changed if whole.trained is None else whole.trained)
    table = rules("unet", file.configs.unet)
    back = {f"{PREFIXES['unet']}{rename(table, name, 'original')}": name for name in new.forms}
    base = stored([file.header])
    order = sorted(base.forms, key=lambda name: file.header.tensors[name].extent)
    weights = Weights(
        {name: base.forms[name] for name in order},
        lambda name: new.read(back[name]) if name in back else base.read(name),
    )
    # Frames and sampling defaults are guessed from a file's name where no notes say them: the new file has another name.
    configs = {part: dict(getattr(file.configs, part)) for part in FILES}
    unet = Weights(own["unet"].forms, lambda name: new.read(name) if name in new.forms else own["unet"].read(name))
    return Into(
        weights,
        frozenset(back),
        file.header.metadata,
        {**whole.notes, "configs": configs},
        replace(whole, configs=file.configs, parts={**own, "unet": unet}),
    )


def _replaced(base: Weights, ours: Weights, names: frozenset[str]) -> Weights:
    """Ours under `names`, each in the dtype that the base has it in."""
    made = cast_each(ours, {name: base.forms[name].dtype for name in names})
    return Weights({name: made.forms[name] for name in names}, made.read)


def _is_same(base: Tensor, ours: Tensor) -> bool:
    """Equal, or one is the other rounded: the fp16 release of a UNet is its fp32 release in fp16."""
    return torch.equal(base.to(ours.dtype), ours) or torch.equal(base, ours.to(base.dtype))


def _require_same_shapes(path: Path, base: Weights, ours: Weights) -> None:
    differ = _unlike_shapes(base, ours)
    if differ:
        raise ModelError(
            f"--into: {path} has another UNet: {len(differ)} weights have no counterpart of the same shape ({', '.join(differ[:3])}"
            f"{', ...' if len(differ) > 3 else ''}). Give the base that was trained on, or leave --into out."
        )


def _require_same_tower(path: Path, base: Weights, ours: Weights) -> None:
    """The UNet was trained on the embeddings of its own tower, and that of the base stays in the file."""
    differ = _unlike_shapes(base, ours) or [
        name for name in base.forms if not _is_same(base.read(name), ours.read(name))
    ]
    if differ:
        raise ModelError(
            f"--into: {path} has another image encoder than this model: {len(differ)} weights differ ({', '.join(differ[:3])}"
            f"{', ...' if len(differ) > 3 else ''}). It would stay in the file, and the UNet was trained on the other's embeddings. "
            "Leave --into out: the new file then holds all parts of this model."
        )


def _unlike_shapes(base: Weights, ours: Weights) -> list[str]:
    """Names that only one of both has, or in another shape."""
    return sorted(
        name
        for name in base.forms.keys() | ours.forms.keys()
        if name not in base.forms or name not in ours.forms or base.forms[name].shape != ours.forms[name].shape
    )
