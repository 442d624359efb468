"""MANIFEST.json: the list of a checkpoint's files with their sha256, and what a reader must know about the run. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from svdtune import __version__
from svdtune.checkpoint.files import MANIFEST, USE_ANOTHER, load_json, reading, save_json
from svdtune.errors import CheckpointError

FORMAT = 1
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


@dataclass(frozen=True)
class FileFacts:
    """What one file must be."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal digest of the content."""


@dataclass(frozen=True)
class Manifest:
    """Written last: a folder without it was never finished."""

    step: int
    """Optimizer steps done."""
    config_hash: str
    """Digest of the configuration of the run, made by the trainer."""
    conventions: Mapping[str, Any]
    """What a sampler must share: fps id rule, order of the time ids, p_mean and p_std, dropout, frames, base weights."""
    versions: Mapping[str, str]
    """Version of svdtune and of the packages that wrote the checkpoint."""
    files: Mapping[str, FileFacts]
    """Facts by file name."""
    format: int = FORMAT

    @property
    def trained_file(self) -> str:
        """Name of the trained weights that are sampled and exported: their averages where the run keeps them."""
        return next(name for name in ("ema.safetensors", "lora.safetensors", "unet.safetensors") if name in self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(facts.size for facts in self.files.values())


def build_manifest(folder: Path, *, step: int, config_hash: str, conventions: Mapping[str, Any]) -> Manifest:
    """Describe the files that lie in `folder` now."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing and reading release the GIL
        facts = dict(zip((path.name for path in paths), pool.map(file_facts, paths), strict=True))
    return Manifest(step, config_hash, dict(conventions), _versions(), facts)


def file_facts(path: Path) -> FileFacts:
    """Size and sha256 of one file, read once."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileFacts(file.tell(), digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json durably."""
    save_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read MANIFEST.json without looking at the files it lists. Raises CheckpointError when it is no manifest of ours."""
    with reading(folder / MANIFEST):
        return _read(folder, folder / MANIFEST)


def _read(folder: Path, path: Path) -> Manifest:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a checkpoint folder, got {'a file' if folder.exists() else 'nothing'}."
        )
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected the list of the checkpoint's files, got none: "
            f"the folder is unfinished or was not written by svdtune. {USE_ANOTHER}"
        )
    raw = load_json(path)
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(f"{path}: got format {found}, this svdtune reads up to {FORMAT}: update svdtune.")
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: got a manifest with missing or wrong fields ({error!r}). {USE_ANOTHER}"
        ) from None


def _parse(raw: dict[str, Any]) -> Manifest:
    files = {str(name): FileFacts(int(facts["size"]), str(facts["sha256"])) for name, facts in raw["files"].items()}
    if strange := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{strange[0]!r} is no plain file name")
    step, config_hash = int(raw["step"]), str(raw["config_hash"])
    return Manifest(step, config_hash, dict(raw["conventions"]), dict(raw["versions"]), files, int(raw["format"]))


def _versions() -> dict[str, str]:
    found = {"svdtune": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
