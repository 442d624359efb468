"""Whether a latent cache is what the configuration would encode now: said before anything is loaded, never mended in silence."""

from __future__ import annotations

from pathlib import Path

from svdtune.config.schema import Config
from svdtune.data.cached import changed_files, missing_entries
from svdtune.data.catalog import Catalog, scan
from svdtune.data.latents import NETWORKS, RUN, Index, differences, read_index
from svdtune.errors import DataError
from svdtune.model.source import model_source, weights_hash


def require_cache(config: Config, *, hashes: bool = True) -> tuple[Index, Catalog | None]:
    """The index of `data.latents`, and the videos below data.root; None where that folder is not on this machine.

    Raises DataError saying all that differs: settings, networks (with `hashes`, which reads their weights), files, entries.
    """
    index = read_index(config)
    catalog = scan(config.data) if Path(config.data.root).is_dir() else None
    told = other_networks(config, index) if hashes else []
    told += stale(config, index, catalog)
    if told:
        raise DataError(f"data.latents: the cache {config.data.latents} does not fit ({'; '.join(told)}). {RUN}")
    return index, catalog


def stale(config: Config, index: Index, catalog: Catalog | None) -> list[str]:
    """What differs in the files and entries, one line each."""
    changed = changed_files(config.data, index, catalog) if catalog else []
    return [*changed, *missing_entries(config.data, index)]


def other_networks(config: Config, index: Index) -> list[str]:
    """Frozen networks whose weights are not those that encoded, one line each."""
    source = model_source(config.model)
    now = {part: weights_hash(source, part, config.model.variant) for part in NETWORKS}
    return [f"sha256 of the weights: {line}" for line in differences(index.settings, now)]
