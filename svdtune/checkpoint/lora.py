"""LoRA files: peft's adapter folder, ComfyUI's names (the original's, with up, down and alpha), and onto a UNet.

ComfyUI: comfy/lora.py, `model_lora_keys_unet`: `diffusion_model.<module>.lora_up.weight` reaches every layer of the model, the
temporal ones too, which its map of diffusers names does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdtune.checkpoint.files import load_json
from svdtune.checkpoint.notes import notes_in_file, notes_in_folder
from svdtune.checkpoint.tensors import load_tensors
from svdtune.errors import ModelError
from svdtune.model.original import rename, rules

if TYPE_CHECKING:
    from torch import Tensor, nn

Alpha = Callable[[str, int], float]
"""Of a layer's name and rank."""
COMFY = "diffusion_model."
_ENDINGS = {
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora.down.weight": "down", ".lora_A.default.weight": "down",
    ".lora_up.weight": "up", ".lora_B.weight": "up", ".lora.up.weight": "up", ".lora_B.default.weight": "up",
    ".alpha": "alpha", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.default.weight": "magnitude",
}  # fmt: skip
"""How writers end the names of one adapted layer: kohya and ComfyUI, peft, diffusers, a checkpoint of ours."""
_BEFORE = ("model.diffusion_model.", COMFY, "base_model.model.", "unet.", "lora_unet_")


@dataclass(frozen=True)
class Adapted:
    """What a LoRA adds to one layer: `alpha / r * up @ down`."""

    down: Tensor
    """(r, in, ...)"""
    up: Tensor
    """(out, r, ...)"""
    alpha: float
    magnitude: Tensor | None = None
    """DoRA's length of each output's weights."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory."""

    path: Path
    layers: Mapping[str, Adapted]
    """By the diffusers name of the layer."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What svdtune wrote beside it (`conventions`, with the base's hash); empty for other writers."""

    @property
    def is_dora(self) -> bool:
        return any(layer.magnitude is not None for layer in self.layers.values())


def read_lora(path: Path, unet: Mapping[str, Any]) -> Lora:
    """A LoRA file or peft's adapter folder, for a UNet with the config `unet`.

    Names may be the original's or diffusers', with dots or (kohya) underscores. Raises ModelError when a name is none of this
    UNet's, or half of a pair is missing; CheckpointError when the file cannot be read.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors = load_tensors(file)
    settings = load_json(path / "adapter_config.json") if path.is_dir() else {}
    notes = notes_in_folder(path) if path.is_dir() else notes_in_file(path)
    return Lora(path, layers_of(path, tensors, unet, settings), notes)


def layers_of(
    path: Path, tensors: Mapping[str, Tensor], unet: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Adapted]:
    """The adapted layers of named LoRA tensors. peft's `settings` (lora_alpha, ...) are for layers without an alpha of their own."""
    spellings = _spellings(unet)
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        ending = next((end for end in _ENDINGS if name.endswith(end)), None)
        layer = spellings.get(_bare(name.removesuffix(ending))) if ending else None
        if ending is None or layer is None:
            strange.append(name)
        else:
            found.setdefault(layer, {})[_ENDINGS[ending]] = tensor
    if strange:
        raise ModelError(
            f"{path}: {len(strange)} of {len(tensors)} weights belong to no layer of this UNet ({', '.join(sorted(strange)[:3])}"
            f"{', ...' if len(strange) > 3 else ''}). The LoRA is for another model, or of a kind that is not plain LoRA."
        )
    halves = sorted(layer for layer, parts in found.items() if not {"down", "up"} <= parts.keys())
    if halves or not found:
        what = (
            f"{len(halves)} layers have only one of up and down ({', '.join(halves[:3])})" if halves else "it has none"
        )
        raise ModelError(f"{path}: expected pairs of LoRA matrices, got: {what}. Take the file again.")
    alpha = _alpha_of(settings)
    return {layer: _adapted(layer, parts, alpha) for layer, parts in sorted(found.items())}


def put_lora(unet: nn.Module, lora: Lora, *, scale: float = 1.0) -> None:
    """Give `unet` the LoRA as peft's adapter "default", its matrices in float32, times `scale`.

    Raises ModelError when a matrix does not fit its layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    modules: dict[str, Any] = dict(unet.named_modules())
    for name, layer in lora.layers.items():
        own, takes, gives = modules[name].weight.shape, layer.down.shape[1], layer.up.shape[0]
        if (own[1], own[0]) != (takes, gives):
            raise ModelError(
                f"{lora.path}: {name} takes {takes} and gives {gives} numbers, the UNet's layer takes {own[1]} and gives "
                f"{own[0]}. The LoRA is for another model: give the base that it was trained on."
            )
    ranks = {name: layer.rank for name, layer in lora.layers.items()}
    alphas = {name: layer.alpha for name, layer in lora.layers.items()}
    config = LoraConfig(
        r=_most(ranks), lora_alpha=_most(alphas), rank_pattern=ranks, alpha_pattern=alphas, target_modules=list(ranks),
        use_dora=lora.is_dora,
    )  # fmt: skip
    inject_adapter_in_model(config, unet)
    modules = dict(unet.named_modules())
    for name, layer in lora.layers.items():
        module = modules[name]
        module.lora_A["default"].weight.data = layer.down.float()
        module.lora_B["default"].weight.data = layer.up.float()
        if layer.magnitude is not None:
            module.lora_magnitude_vector["default"].weight.data = layer.magnitude.float()
    scale_lora(unet, scale)


def scale_lora(unet: nn.Module, scale: float) -> None:
    """Let the adapter "default" act `scale` times as much as it was trained to."""
    for layer in _lora_layers(unet).values():
        layer.set_scale("default", scale)


def merge_lora(unet: nn.Module) -> set[str]:
    """Add the adapter "default" to the weights of its layers, in their dtype, and take it off. Returns the changed weights' names.

    peft's own merge, so DoRA and convolutions too. Raises ValueError (peft) when a merged weight is not finite.
    """
    changed = set()
    for name, layer in _lora_layers(unet).items():
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(unet.get_submodule(parent), own, layer.get_base_layer())
        changed.add(f"{name}.weight")
    return changed


def comfy_tensors(lora: Lora, unet: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Under ComfyUI's names. Raises ModelError for a DoRA, whose ComfyUI formula is another than peft's."""
    if lora.is_dora:
        raise ModelError(
            f"{lora.path}: it is a DoRA, which ComfyUI normalises in another way than peft, so it would look different there. Add "
            "--merge to write the whole model with the DoRA in its weights."
        )
    table = rules("unet", unet)
    made = {}
    for name, layer in lora.layers.items():
        original = f"{COMFY}{rename(table, name, 'original')}"
        made[f"{original}.lora_up.weight"] = layer.up.to(dtype)
        made[f"{original}.lora_down.weight"] = layer.down.to(dtype)
        made[f"{original}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return made


def peft_files(lora: Lora, base: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and adapter_config.json of peft's folder."""
    from peft import LoraConfig

    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.to(dtype)
        if layer.magnitude is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude.to(dtype)
    ranks = {name: layer.rank for name, layer in lora.layers.items()}
    alphas = {name: layer.alpha for name, layer in lora.layers.items()}
    config = LoraConfig(
        r=_most(ranks), lora_alpha=_most(alphas), target_modules=list(ranks), use_dora=lora.is_dora,
        rank_pattern={} if len(set(ranks.values())) == 1 else ranks,
        alpha_pattern={} if len(set(alphas.values())) == 1 else alphas,
        base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return tensors, plain


def _bare(name: str) -> str:
    for before in _BEFORE:
        name = name.removeprefix(before)
    return name


def _alpha_of(settings: Mapping[str, Any]) -> Alpha:
    """peft's scaling of each layer as an alpha; without settings a layer that names none acts as trained (alpha = rank)."""
    patterns, whole = settings.get("alpha_pattern") or {}, settings.get("lora_alpha")

    def alpha(layer: str, rank: int) -> float:
        value = patterns.get(layer, whole)
        if value is None:
            return float(rank)
        return value * sqrt(rank) if settings.get("use_rslora") else float(value)

    return alpha


def _adapted(layer: str, parts: Mapping[str, Tensor], alpha: Alpha) -> Adapted:
    rank = parts["down"].shape[0]
    own = float(parts["alpha"]) if "alpha" in parts else alpha(layer, rank)
    return Adapted(parts["down"], parts["up"], own, parts.get("magnitude"))


def _spellings(unet: Mapping[str, Any]) -> dict[str, str]:
    """Every way to write a layer of this UNet, to its diffusers name."""
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        network: Any = UNetSpatioTemporalConditionModel.from_config(dict(unet))
    table = rules("unet", unet)
    made = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            for spelled in (name, rename(table, name, "original") or name):
                made |= {spelled: name, spelled.replace(".", "_"): name}
    return made


def _lora_layers(unet: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def _most(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
