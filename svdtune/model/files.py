"""Which weight files a part's folder holds, and which of them a variant names. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from svdtune.config.schema import Model
from svdtune.model.facts import STEMS

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of weights that are never read: a pickle can run code when it is opened."""
_NAME = r"(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<old>\w+))?\.safetensors"
"""What follows the stem; diffusers once wrote the variant behind the number of the shard."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one part: `files` that its loader reads, by what lies there."""

    files: tuple[Path, ...]
    plain: bool
    """Files without a variant in their name are there."""
    variants: tuple[str, ...]
    others: tuple[str, ...]
    """Names of weights that svdtune does not read."""
    index: Path | None = None
    """The list of the shards, where the weights are cut into several files."""

    @property
    def there(self) -> list[str]:
        """What lies in the folder, in words."""
        plain = ["plain weights"] if self.plain else []
        return [*plain, *(f"{variant} weights" for variant in self.variants), *self.others]


def find_weights(folder: Path, part: str, variant: str | None) -> WeightFiles:
    """The safetensors that `variant` (None: plain names) selects in `folder`, that of one part."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    found = {name: match for name in names if (match := re.fullmatch(STEMS[part] + _NAME, name))}
    by_variant: dict[str, list[str]] = {}
    for name, match in found.items():
        by_variant.setdefault(match["variant"] or match["old"] or "", []).append(name)
    ending = f".{variant}" if variant else ""
    chosen, index = by_variant.get(variant or "", []), f"{STEMS[part]}.safetensors.index{ending}.json"
    whole = f"{STEMS[part]}{ending}.safetensors"
    if index not in names and whole in chosen:
        chosen = [whole]
    others = [name for name in names if name.endswith((*PICKLES, ".safetensors")) and name not in found]
    return WeightFiles(
        files=tuple(folder / name for name in chosen),
        plain="" in by_variant,
        variants=tuple(sorted(set(by_variant) - {""})),
        others=tuple(others),
        index=folder / index if index in names else None,
    )


def cached_folder(model: Model) -> Path | None:
    """The folder of a hub id in the hub's cache, when the weights of all parts are there."""
    from huggingface_hub import try_to_load_from_cache

    ending = f".{model.variant}.safetensors" if model.variant else ".safetensors"
    names = [f"{part}/{stem}{ending}" for part, stem in STEMS.items()]
    hits = [try_to_load_from_cache(model.pretrained, name, revision=model.revision) for name in names]
    found = [Path(hit) for hit in hits if isinstance(hit, str)]
    return found[0].parent.parent if len(found) == len(names) else None
