"""Named tensors in safetensors files, and the comparison of what a file holds with what this run trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from svdtune.checkpoint.files import USE_ANOTHER
from svdtune.errors import CheckpointError

NamedParameters = Mapping[str, Parameter] | Iterable[tuple[str, Parameter]]
"""The trained parameters by name, as `[(n, p) for n, p in unet.named_parameters() if p.requires_grad]`."""
NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]


def is_shard(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it (FSDP2). By what it has: torch's module of its class takes half a second to import."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """All of a tensor, detached; of a shard on the CPU. Called on every rank in the same order, with `keep` where it is wanted."""
    shard: Any = tensor.detach()
    if not is_shard(tensor):
        return shard
    gathered = shard.full_tensor()
    return gathered.cpu() if keep else gathered.new_empty(0)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, detached, in the same memory."""
    shard: Any = tensor.detach()
    return shard.to_local() if is_shard(tensor) else shard


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, on the device of `like` and divided as it is. Nothing is sent."""
    if not is_shard(like):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    shard: Any = like
    return distribute_tensor(tensor.to(like.device), shard.device_mesh, shard.placements, src_data_rank=None)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as they are (dtype and bits); shared or strided storage is copied first, on the CPU."""
    detached = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in detached.items():
        if not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() in seen:
            detached[name] = tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
    save_file(detached, path, metadata=dict(metadata) if metadata else None)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors into fresh CPU memory. Raises CheckpointError when the file is missing or is no safetensors file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a safetensors file, got none. {USE_ANOTHER}")
    try:
        with safe_open(path, framework="pt") as file:
            # clone: a tensor that maps the file would keep its alignment, and its disk space after the file is deleted
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, got something else ({error}). {USE_ANOTHER}"
        ) from None


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require_same(path: Path, saved: Shapes, current: Shapes) -> None:
    """Raise CheckpointError unless the file was written for exactly the parameters that this run trains."""
    missing = sorted(current.keys() - saved.keys())
    unexpected = sorted(saved.keys() - current.keys())
    reshaped = sorted(name for name in current.keys() & saved.keys() if current[name] != saved[name])
    if not (missing or unexpected or reshaped):
        return
    lines = [
        f"{path}: the run was made with {describe(saved)}; this config trains {describe(current)}. "
        "Resume needs the same model and adapt section: restore them, or start a new run with another run.name."
    ]
    lines += [f"  missing in the checkpoint: {_some(missing)}"] if missing else []
    lines += [f"  unexpected in the checkpoint: {_some(unexpected)}"] if unexpected else []
    lines += [f"  {name}: saved {saved[name]}, expected {current[name]}" for name in reshaped[:3]]
    raise CheckpointError("\n".join(lines))


def describe(shapes: Shapes) -> str:
    """A set of trained parameters in the words of the config: `adapt.method=lora rank 16 (256 tensors)`."""
    ranks = sorted({shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape})
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    total = f"{len(shapes)} parameters, {numbers:,} numbers"
    if ranks:
        return f"adapt.method=lora rank {'/'.join(map(str, ranks))} ({total})"
    return f"weights of the model itself, no lora ({total})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
