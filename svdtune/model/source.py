"""Where a model comes from: a diffusers folder, an original single file or a hub id. Configs without torch, tensors one by one."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from svdtune.config.schema import Model
from svdtune.errors import ModelError
from svdtune.model.facts import FILES, TINY, ModelConfigs, read_folder_configs
from svdtune.model.files import PICKLES, WeightFiles, find_weights
from svdtune.model.headers import Entry, read_header
from svdtune.model.original import PREFIXES, Take
from svdtune.model.single_file import read_single_file

if TYPE_CHECKING:
    from svdtune.model.weights import Weights

PARTS = ("unet", "vae", "image_encoder")
_CHUNK = 2**22


def local_source(pretrained: str) -> Path | None:
    """The folder or single file that `model.pretrained` names on this machine, or None when it is a hub id."""
    if pretrained == "tiny":
        return TINY
    path = Path(pretrained)
    if path.exists():
        return path
    if len(path.parts) != 2 or pretrained.startswith((".", "/", "~")) or path.suffix in (".safetensors", *PICKLES):
        raise ModelError(
            f"model.pretrained: no such folder or file: {path}. Give a diffusers folder or a single .safetensors file that exists, "
            "a hub id (owner/name) or 'tiny'."
        )
    return None


def model_source(model: Model) -> Path:
    """The folder or file of the model on this machine; a hub id is downloaded (or found in the cache) first."""
    return local_source(model.pretrained) or _download(model)


def read_configs(source: Path) -> ModelConfigs:
    """The JSON of all five parts: of a diffusers folder, or what follows from the header of a single file. Raises ModelError."""
    return read_single_file(source).configs if source.is_file() else read_folder_configs(source)


def part_weights(source: Path, part: str, variant: str | None) -> Weights:
    """The tensors of one part under their diffusers names, read one at a time. Raises ModelError."""
    from svdtune.model.weights import stored, taken

    if source.is_file():
        file = read_single_file(source)
        prefix = PREFIXES[part]
        takes = {
            name: Take(tuple(prefix + own for own in take.sources), take.move)
            for name, take in file.plan(part).takes.items()
        }
        return taken(stored([file.header]), takes)
    return stored([read_header(path) for path in weight_files(source, part, variant)])


def weights_hash(source: Path, part: str, variant: str | None) -> str:
    """sha256 over names, dtypes, shapes and bytes of one part: what a checkpoint knows its base by.

    It is the same for a folder and for a single file that hold the same UNet. Raises ModelError.
    """
    digest = hashlib.sha256()
    stored = _stored(source, part, variant)
    with ExitStack() as files:
        opened = {path: files.enter_context(path.open("rb")) for path in {path for path, _ in stored.values()}}
        for name in sorted(stored):
            path, entry = stored[name]
            digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            opened[path].seek(entry.extent[0])
            left = entry.extent[1] - entry.extent[0]
            while left > 0:
                chunk = opened[path].read(min(left, _CHUNK))
                digest.update(chunk)
                left -= len(chunk) or left  # the header was checked against the file's size
    return digest.hexdigest()


def fp16_hash(source: Path, part: str, variant: str | None) -> str:
    """`weights_hash` of the part in float16: the releases of one UNet in fp32 and in fp16 have it in common."""
    import torch

    weights = part_weights(source, part, variant)
    digest = hashlib.sha256()
    for name in sorted(weights.forms):
        tensor = weights.read(name).half()
        digest.update(f"{name} F16 {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored(source: Path, part: str, variant: str | None) -> dict[str, tuple[Path, Entry]]:
    """Where each tensor of a part lies, by diffusers name; of a single file those that are stored as diffusers has them."""
    if source.is_file():
        file = read_single_file(source)
        takes = file.plan(part).takes.items()
        tensors = file.header.tensors
        return {
            name: (source, tensors[PREFIXES[part] + take.sources[0]]) for name, take in takes if take.move == "same"
        }
    files = weight_files(source, part, variant)
    return {name: (path, entry) for path in files for name, entry in read_header(path).tensors.items()}


def weight_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors of a part, shards included. Raises ModelError naming what lies there instead."""
    found = find_weights(folder / part, part, variant)
    if not found.files:
        raise ModelError(
            f"{folder / part}: no *{_suffix(variant)} with model.variant={variant or 'null'}; "
            f"there: {', '.join(found.there) or 'no weights'}. {_variant_hint(found)}"
        )
    return list(found.files)


def first_line(error: BaseException) -> str:
    """What a library said, without its advice below."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _download(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    suffix = _suffix(model.variant)
    weights = [f"{part}/*{end}" for part in PARTS for end in (suffix, ".index*.json")]
    try:
        return Path(
            snapshot_download(
                model.pretrained,
                revision=model.revision,
                allow_patterns=["model_index.json", *FILES.values(), *weights],
                # Plain names only: *.safetensors would also bring every variant.
                ignore_patterns=None if model.variant else ["*.*.safetensors"],
            )
        )
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.pretrained: there is no folder {model.pretrained} here, and the hub has no such model, or it is gated "
            "and no token is set. "
            "Check the name; for a gated model accept its licence on its page and run `hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.pretrained: there is no folder {model.pretrained} here, and it could not be got from the hub (revision "
            f"{model.revision or 'main'}): {first_line(error)}. Without a "
            "network, download the folder elsewhere and give its path; 'tiny' ships with svdtune and needs no download."
        ) from error


def _suffix(variant: str | None) -> str:
    return f".{variant}.safetensors" if variant else ".safetensors"


def _variant_hint(found: WeightFiles) -> str:
    if found.variants:
        return f"Set model.variant={found.variants[0]}."
    if found.plain:
        return "Set model.variant=null."
    return "svdtune reads safetensors only; a .bin or .pt file can run code when opened."
