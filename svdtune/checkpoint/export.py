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
    swap_in,
)
from svdtune.checkpoint.tensors import require_same, save_tensors, shapes_of
from svdtune.errors import CheckpointError
from svdtune.model.facts import FILES, STEMS, class_name
from svdtune.model.original import TEMPORAL_VAE
from svdtune.model.source import part_weights, read_configs

if TYPE_CHECKING:
    from torch import Tensor, nn

VISUAL = "visual_projection.weight"
BRIDGE = "image_bridge.weight"
"""What `conditioning.bridge` adds to the UNet (svdtune/model/bridge.py), (cross_attention_dim, width of the tower)."""

_CLASSES = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
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


def export_run(
    destination: Path,
    *,
    base: Base,
    unet: nn.Module,
    lora: bool,
    half: bool,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the trained `unet` to `destination`, replacing an earlier export in one step; safetensors only.

    Parameters that require grad are taken from `unet`, all others from the base's files: a frozen weight that the run
    held in bf16 would otherwise lose bits. With `half` floating weights are float16, else float32; the file names are
    the plain ones, so that `from_pretrained` needs no variant. `unet` is the bare module (no DDP), adapter "default".
    `beside` adds what else is to lie in the folder. Raises ModelError when the base cannot be read any more, CheckpointError
    when the disk is full or a value does not fit float16.
    """
    partial = partial_name(destination)
    restore(destination)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = torch.float16 if half else torch.float32
    write: Callable[..., None] = _write_adapter if lora else _write_pipeline
    try:
        write(partial, base, unet, dtype)
        beside(partial)
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


def pipeline_json(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The JSON files of a pipeline folder, by path in it, from that of the five parts."""
    from diffusers import __version__

    vae = ["diffusers", class_name(configs["vae"]) or TEMPORAL_VAE]
    index = {"_class_name": "StableVideoDiffusionPipeline", "_diffusers_version": __version__, **_CLASSES, "vae": vae}
    made = {FILES[part]: published(content) for part, content in configs.items()}
    # Without it transformers 5 opens the tower in the files' float16 and diffusers the rest in float32: no forward runs.
    tower = made[FILES["image_encoder"]]
    tower.pop("torch_dtype", None)
    tower["dtype"] = "float32"
    return {"model_index.json": index, **made}


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a part without the path that it was once loaded from."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def write_json_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each to its path below `folder`."""
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_pipeline(folder: Path, base: Base, unet: nn.Module, dtype: torch.dtype) -> None:
    configs = read_configs(base.source)
    tower, weights = _image_encoder(base, configs.image_encoder, unet)
    write_json_files(
        folder, pipeline_json({**{part: getattr(configs, part) for part in FILES}, "image_encoder": tower})
    )
    read: dict[str, Callable[[], dict[str, Tensor]]] = {
        "unet": lambda: _trained_over(_tensors(base, "unet"), unet, base),
        "vae": lambda: _tensors(base, "vae"),
        "image_encoder": lambda: weights,
    }
    for part, tensors in read.items():
        save_tensors(folder / part / f"{STEMS[part]}.safetensors", _cast(part, tensors(), dtype), {"format": "pt"})


def _write_adapter(folder: Path, base: Base, unet: nn.Module, dtype: torch.dtype) -> None:
    from peft import get_peft_model_state_dict

    configs: Any = unet.peft_config
    config = copy.deepcopy(configs["default"])
    config.base_model_name_or_path, config.inference_mode = base.name, True
    config.save_pretrained(folder)
    # Not unet.state_dict(): under FSDP2 it would take the parameters apart again.
    state = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    # save_embedding_layers: peft would otherwise ask the hub whether the vocabulary grew
    tensors = get_peft_model_state_dict(unet, state, save_embedding_layers=False)
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_tensors(folder / "adapter_model.safetensors", _cast("lora", named, dtype), {"format": "pt"})
    if _bridge(unet) is not None:
        configs = read_configs(base.source)
        tower, weights = _image_encoder(base, configs.image_encoder, unet)
        all_files = pipeline_json({**{part: getattr(configs, part) for part in FILES}, "image_encoder": tower})
        write_json_files(folder, {FILES["image_encoder"]: all_files[FILES["image_encoder"]]})
        path = folder / "image_encoder" / f"{STEMS['image_encoder']}.safetensors"
        save_tensors(path, _cast("image_encoder", weights, dtype), {"format": "pt"})


def _image_encoder(
    base: Base, content: Mapping[str, Any], unet: nn.Module
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """JSON and tensors of the base's CLIP tower, with the bridge of the UNet folded in where there is one."""
    tensors, weight = _tensors(base, "image_encoder"), _bridge(unet)
    if weight is not None:
        content, tensors[VISUAL] = fold_bridge(content, tensors[VISUAL], weight)
    return content, tensors


def _tensors(base: Base, part: str) -> dict[str, Tensor]:
    return dict(part_weights(base.source, part, base.variant).items())


def fold_bridge(tower: Mapping[str, Any], visual: Tensor, bridge: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Config of the CLIP tower and its last matrix (d, hidden), with the bridge (d_unet, d) behind it."""
    # Neither has a bias, so one matrix does exactly what the two did.
    folded = (bridge.detach().double().cpu() @ visual.double()).float()
    return {**tower, "projection_dim": bridge.shape[0]}, folded


def _bridge(unet: nn.Module) -> Tensor | None:
    return dict(unet.named_parameters()).get(BRIDGE)


def _trained_over(tensors: dict[str, Tensor], unet: nn.Module, base: Base) -> dict[str, Tensor]:
    """The base's tensors with the trained parameters in their places."""
    parameters = {name: p for name, p in unet.named_parameters() if name != BRIDGE}
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
                f"(largest magnitude {float(tensor.abs().max()):.3g}). Start from weights in float32, "
                "or sample from an earlier checkpoint if the run diverged."
            )
    return cast
