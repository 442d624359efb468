"""Whether the live stages can run on this machine; imports nothing heavy to say that they cannot."""

from __future__ import annotations

from contextlib import suppress

import torch

from svdtune.config.schema import Config
from svdtune.errors import SvdtuneError
from svdtune.model.files import cached_folder
from svdtune.model.source import local_source

LIGHT_GIB = 2.0
"""A run that needs no more is built on a CPU too; a larger one would take many minutes there."""


def objection(config: Config, peak_gib: float | None) -> str:
    """Why the run is not built here, or nothing."""
    if not _weights_are_here(config):
        return "the weights are not on this machine"
    if torch.cuda.is_available():
        return ""
    if peak_gib is None or peak_gib > LIGHT_GIB:
        return (
            "no GPU is visible; where there is one, this and `svdtune train` run the real step before the first update"
        )
    return ""


def _weights_are_here(config: Config) -> bool:
    if local_source(config.model.pretrained) is not None:
        return True
    with suppress(SvdtuneError, ValueError):
        return cached_folder(config.model) is not None
    return False
