"""The result of a run as other programs open it: a diffusers pipeline folder, or a peft adapter folder.

StableVideoDiffusionPipeline.from_pretrained(export, torch_dtype=torch.float16)     # full, temporal, spatial
PeftModel.from_pretrained(base_unet, export)                                        # lora

With conditioning.bridge the trained projection is folded into the CLIP tower's last matrix, so nothing is left of it but the
width. The pipeline folder holds that tower; beside an adapter it lies in `image_encoder/` and takes the place of the base's:
CLIPVisionModelWithProjection.from_pretrained(export, subfolder="image_encoder")    # lora with a bridge
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdtune.checkpoint.files import (
    fsync_file,
    fsync_folder,
    is_disk_full,
    partial_name,
    restore,
    save_json,
    swap_in,
)
from svdtune.checkpoint.tensors import require_same, save_tensors, shapes_of
from svdtune.errors import CheckpointError
from svdtune.model.original import TEMPORAL_VAE
from svdtune.model.source import part_tensors, read_configs

if TYPE_CHECKING:
    from torch import Tensor, nn

_VISUAL = "visual_projection.weight"
_BRIDGE = "image_bridge.weight"
"""What `conditioning.bridge` adds to the UNet (svdtune/model/bridge.py), (cross_attention_dim, width of the tower)."""

_CLASSES = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", TEMPORAL_VAE],
}
_JSON = {
    "feature_extractor": "preprocessor_config.json",
    "image_encoder": "config.json",
    "scheduler": "scheduler_config.json",
    "unet": "config.json",
    "vae": "config.json",
}
_WEIGHTS = {
    "image_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@dataclass(frozen=True)
class Base:
    """The model a run started from."""

    name: str
    """Hub id, folder or file as in `model.pretrained`; written into an adapter."""
    source: Path
    """Its diffusers folder or single file on this machine."""
    variant: str | None
    """Which weight files of a folder were used: `fp16` reads `*.fp16.safetensors`, None the plain names."""
    widened: bool = False
    """Whether `model.on_mismatch: adapt` made the UNet from weights of other names or shapes."""


def export_run(destination: Path, *, base: Base, unet: nn.Module, lora: bool, half: bool) -> None:
    """Write the trained `unet` to `destination`, replacing an earlier export in one step; safetensors only.

    Parameters that require grad are taken from `unet`, all others from the base's files: a frozen weight that the run
    held in bf16 would otherwise lose bits. With `half` floating weights are float16, else float32; the file names are
    the plain ones, so that `from_pretrained` needs no variant. `unet` is the bare module (no DDP), adapter "default".
    Raises ModelError when the base cannot be read any more, CheckpointError when the disk is full or a value does not fit float16.
    """
    partial = partial_name(destination)
    restore(destination)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = torch.float16 if half else torch.float32
    write: Callable[..., None] = _write_adapter if lora else _write_pipeline
    try:
        write(partial, base, unet, dtype)
        for path in sorted(partial.rglob("*")):
            (fsync_folder if path.is_dir() else fsync_file)(path)
        swap_in(partial, destination)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            free = shutil.disk_usage(destination.parent).free / 2**30
            raise CheckpointError(
                f"{destination}: the disk is full, available are {free:.2f} GiB. The checkpoints of the run are "
                "untouched: free space and run the same command again."
            ) from error
        raise


def _write_pipeline(folder: Path, base: Base, unet: nn.Module, dtype: torch.dtype) -> None:
    from diffusers import __version__

    configs = read_configs(base.source)
    for part, name in _JSON.items():
        if part != "image_encoder":
            (folder / part).mkdir()
            _write_json(folder / part / name, getattr(configs, part))
    for part, name in _WEIGHTS.items():
        if part != "image_encoder":
            tensors = dict(part_tensors(base.source, part, base.variant))
            tensors = _trained_over(tensors, unet, base) if part == "unet" else tensors
            save_tensors(folder / part / name, _cast(part, tensors, dtype), {"format": "pt"})
    _write_image_encoder(folder, base, unet, dtype)
    index = {"_class_name": "StableVideoDiffusionPipeline", "_diffusers_version": __version__, **_CLASSES}
    index["vae"] = ["diffusers", configs.vae.get("_class_name", TEMPORAL_VAE)]
    save_json(folder / "model_index.json", index)


def _write_adapter(folder: Path, base: Base, unet: nn.Module, dtype: torch.dtype) -> None:
    from peft import get_peft_model_state_dict

    configs: Any = unet.peft_config
    config = copy.deepcopy(configs["default"])
    config.base_model_name_or_path, config.inference_mode = base.name, True
    config.save_pretrained(folder)
    # save_embedding_layers: peft would otherwise ask the hub whether the vocabulary grew
    tensors = get_peft_model_state_dict(unet, save_embedding_layers=False)
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_tensors(folder / "adapter_model.safetensors", _cast("lora", named, dtype), {"format": "pt"})
    if _bridge(unet) is not None:
        _write_image_encoder(folder, base, unet, dtype)


def _write_image_encoder(folder: Path, base: Base, unet: nn.Module, dtype: torch.dtype) -> None:
    """The base's CLIP tower, with the bridge of the UNet folded in where there is one."""
    part = "image_encoder"
    content = dict(read_configs(base.source).image_encoder)
    tensors = dict(part_tensors(base.source, part, base.variant))
    # Without it transformers 5 opens the tower in the files' float16 and diffusers the rest in float32: no forward runs.
    content.pop("torch_dtype", None)
    content["dtype"] = "float32"
    weight = _bridge(unet)
    if weight is not None:
        # Neither has a bias, so one matrix does exactly what the two did.
        tensors[_VISUAL] = (weight.detach().double().cpu() @ tensors[_VISUAL].double()).float()
        content["projection_dim"] = weight.shape[0]
    (folder / part).mkdir()
    _write_json(folder / part / _JSON[part], content)
    save_tensors(folder / part / _WEIGHTS[part], _cast(part, tensors, dtype), {"format": "pt"})


def _bridge(unet: nn.Module) -> Tensor | None:
    return dict(unet.named_parameters()).get(_BRIDGE)


def _write_json(target: Path, content: Mapping[str, Any]) -> None:
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _trained_over(tensors: dict[str, Tensor], unet: nn.Module, base: Base) -> dict[str, Tensor]:
    """The base's tensors with the trained parameters in their places."""
    parameters = {name: p for name, p in unet.named_parameters() if name != _BRIDGE}
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise ValueError("export: no parameter of the unet requires grad, so nothing was trained")
    if base.widened:
        frozen = {name: p.detach() for name, p in parameters.items() if not p.requires_grad}
        kept = {name: tensor for name, tensor in tensors.items() if shapes_of(frozen).get(name) == tuple(tensor.shape)}
        tensors = {**trained, **frozen, **kept}
    in_base = {name: shape for name, shape in shapes_of(tensors).items() if name in trained}
    require_same(base.source / "unet", in_base, shapes_of(trained))
    return {**tensors, **trained}


def _cast(part: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in `dtype` on the CPU, others as they are. Raises CheckpointError for what becomes non-finite."""
    cast: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        cast[name] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.to("cpu")
        if not bool(cast[name].isfinite().all()):
            raise CheckpointError(
                f"export of {part}: {name} has values that {str(dtype).removeprefix('torch.')} cannot hold "
                f"(largest magnitude {float(tensor.abs().max()):.3g}). Export in float32 (model.variant=null), "
                "or sample from an earlier checkpoint if the run diverged."
            )
    return cast
