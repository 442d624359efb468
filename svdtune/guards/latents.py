"""The latent cache against the configuration: what would be encoded otherwise now is said before anything is trained on."""

from __future__ import annotations

from pathlib import Path

from svdtune.config.schema import Config
from svdtune.data.catalog import scan
from svdtune.data.latents import RUN, read_index
from svdtune.errors import DataError, SvdtuneError
from svdtune.guards.findings import Finding
from svdtune.model.source import local_source

_WHY = "Training reads the encoded clips and would not notice: it would learn other clips, or other latents, than configured."
_FIX = "Run `svdtune cache` with this configuration: what fits is kept, the rest is encoded. data.latents=null encodes in training."


def check_latents(config: Config) -> list[Finding]:
    """DAT360, one for each kind of difference. Weights that are not on this machine are compared when training starts."""
    from svdtune.trainer.staleness import other_networks, stale

    try:
        index = read_index(config)
    except DataError as error:
        return [_finding("data.latents", str(error).removeprefix("data.latents: ").removesuffix(f". {RUN}"))]
    found = [_finding("data.latents", line) for line in stale(config, index, _catalog(config))]
    if _is_here(config):
        found += [_finding("model.pretrained", line) for line in other_networks(config, index)]
    return found


def _catalog(config: Config):
    try:
        return scan(config.data) if Path(config.data.root).is_dir() else None
    except DataError:
        return None  # said by the checks of the files


def _is_here(config: Config) -> bool:
    try:
        return local_source(config.model.pretrained) is not None
    except SvdtuneError:
        return False  # said by the stage checkpoint


def _finding(where: str, got: str) -> Finding:
    return Finding("DAT360", "error", where, got, "a cache of this configuration's clips", _WHY, _FIX)
