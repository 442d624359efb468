"""The errors a person can cause. Each message names what, expected, got, why and the fix; each class fixes the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SvdtuneError(Exception):
    """Base of every error whose message is written for the person running svdtune (shown without a traceback)."""

    exit_code = 1


class UsageError(SvdtuneError):
    """The command line, the launcher or the run folder is not as it must be."""

    exit_code = 2


class ConfigError(SvdtuneError):
    """The YAML or an override is wrong."""

    exit_code = 2

    def __init__(self, message: str, patch: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.patch = tuple(patch)
        """Overrides (`section.key=value`) that would make it right, where that is certain."""


class DataError(SvdtuneError):
    """The clips cannot be used."""

    exit_code = 3


class ModelError(SvdtuneError):
    """The model folder, hub id or weights cannot be used."""

    exit_code = 3


class CheckpointError(SvdtuneError):
    """A checkpoint is missing, damaged, of another kind of run, or cannot be written."""

    exit_code = 3


class ContractError(SvdtuneError):
    """A tensor that crosses a seam is not what the table in `contracts/svd.py` says."""

    exit_code = 3

    def __init__(self, message: str, mismatches: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.mismatches = tuple(mismatches)
        """The `contracts.Mismatch`es behind the message."""


class PreflightError(SvdtuneError):
    """Preflight found errors; the message holds the table of findings."""

    exit_code = 3


class Refused(PreflightError):
    """What watches a running training ended it, on every rank; the checkpoint is saved."""


class Diverged(SvdtuneError):
    """Loss or gradient became non-finite; no update was made from it."""

    exit_code = 4


class Stopped(SvdtuneError):
    """A signal arrived; what can be saved is saved."""

    exit_code = 143

    def __init__(self, message: str, signal: str | None = None) -> None:
        super().__init__(message)
        self.signal = signal
        """Its name."""
