"""LoRA files: peft's adapter folder, ComfyUI's names (the original's, with up, down and alpha), and onto a UNet.

ComfyUI: comfy/lora.py, `model_lora_keys_unet`: `diffusion_model.<module>.lora_up.weight` reaches every layer of the model, the
temporal ones too, which its map of diffusers names does not know.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdtune.checkpoint.notes import notes_in_file, notes_in_folder
from svdtune.errors import ModelError
from svdtune.model.headers import read_header
from svdtune.model.original import rename, rules
from svdtune.model.weights import cast, in_memory, stored

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

    Names may be the original's or diffusers', with dots or (kohya) underscores. Raises ModelError when the file cannot be read, a
    name is none of this UNet's, a matrix does not fit its layer, or half of a pair is missing.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors = dict(stored([read_header(file)]).items())
    settings = _settings(path / "adapter_config.json") if path.is_dir() else {}
    notes = notes_in_folder(path) if path.is_dir() else notes_in_file(path)
    return Lora(path, layers_of(path, tensors, unet, settings), notes)


def layers_of(
    path: Path, tensors: Mapping[str, Tensor], unet: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Adapted]:
    """The adapted layers of named LoRA tensors. peft's `settings` (lora_alpha, ...) are for layers without an alpha of their own."""
    shapes = _layer_shapes(unet)
    spellings = _spellings(shapes, unet)
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
    layers = {layer: _adapted(path, layer, parts, alpha) for layer, parts in sorted(found.items())}
    plain = [name for name, layer in layers.items() if layer.magnitude is None]
    if 0 < len(plain) < len(layers):
        raise ModelError(
            f"{path}: {len(plain)} of its {len(layers)} layers are plain LoRA ({plain[0]}, ...), the others DoRA. No program reads the "
            "mixture; take the file again."
        )
    for name, layer in layers.items():
        _require_fits(path, name, layer, shapes[name])
    return layers


def put_lora(unet: nn.Module, lora: Lora, *, scale: float = 1.0) -> None:
    """Give `unet`, of the config that the LoRA was read for, the LoRA as peft's adapter "default", in float32, times `scale`."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {name: layer.rank for name, layer in lora.layers.items()}
    alphas = {name: layer.alpha for name, layer in lora.layers.items()}
    config = LoraConfig(
        r=_most(ranks), lora_alpha=_most(alphas), rank_pattern=_others(ranks), alpha_pattern=_others(alphas),
        target_modules=list(ranks), use_dora=lora.is_dora,
    )  # fmt: skip
    inject_adapter_in_model(config, unet)
    modules: dict[str, Any] = dict(unet.named_modules())
    for name, layer in lora.layers.items():
        module = modules[name]
        for own, made in ((module.lora_A["default"], layer.down), (module.lora_B["default"], layer.up)):
            own.weight.data = made.float().reshape(own.weight.shape)  # some write matrices as 1x1 convolutions
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
        made[f"{original}.lora_up.weight"] = layer.up
        made[f"{original}.lora_down.weight"] = layer.down
    made = dict(cast(in_memory(made), dtype).items())
    for name, layer in lora.layers.items():
        alpha = torch.tensor(layer.alpha, dtype=torch.float64)
        made[f"{COMFY}{rename(table, name, 'original')}.alpha"] = alpha.float() if alpha.float() == alpha else alpha
    return made


def peft_files(lora: Lora, base: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and adapter_config.json of peft's folder."""
    from peft import LoraConfig

    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up
        if layer.magnitude is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude
    ranks = {name: layer.rank for name, layer in lora.layers.items()}
    alphas = {name: layer.alpha for name, layer in lora.layers.items()}
    config = LoraConfig(
        r=_most(ranks), lora_alpha=_most(alphas), rank_pattern=_others(ranks), alpha_pattern=_others(alphas),
        target_modules=list(ranks), use_dora=lora.is_dora, base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return dict(cast(in_memory(tensors), dtype).items()), plain


def _bare(name: str) -> str:
    for before in _BEFORE:
        name = name.removeprefix(before)
    return name


def _alpha_of(settings: Mapping[str, Any]) -> Alpha:
    """peft's scaling of each layer as an alpha; without settings a layer that names none acts as trained (alpha = rank)."""
    patterns, whole = settings.get("alpha_pattern") or {}, settings.get("lora_alpha")

    def alpha(layer: str, rank: int) -> float:
        # As peft: the first that is, as a regular expression, the layer's name or its ending.
        hit = next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
        value = whole if hit is None else patterns[hit]
        if value is None:
            return float(rank)
        return value * sqrt(rank) if settings.get("use_rslora") else float(value)

    return alpha


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(
            f"{path}: expected the JSON object of peft's settings, got something else. Take the folder again."
        )
    return found


def _adapted(path: Path, layer: str, parts: Mapping[str, Tensor], alpha: Alpha) -> Adapted:
    down, up = tuple(parts["down"].shape), tuple(parts["up"].shape)
    if min(len(down), len(up)) < 2 or down[0] != up[1]:
        raise ModelError(
            f"{path}: {layer} has lora_down {list(down)} and lora_up {list(up)}, expected (rank, in, ...) and (out, rank, ...). "
            "Take the file again."
        )
    rank = down[0]
    own = float(parts["alpha"]) if "alpha" in parts else alpha(layer, rank)
    return Adapted(parts["down"], parts["up"], own, parts.get("magnitude"))


def _require_fits(path: Path, name: str, layer: Adapted, own: tuple[int, ...]) -> None:
    takes, gives = layer.down.shape[1], layer.up.shape[0]
    if (own[1], own[0]) != (takes, gives):
        raise ModelError(
            f"{path}: {name} takes {takes} and gives {gives} numbers, the UNet's layer takes {own[1]} and gives {own[0]}. The LoRA "
            "is for another model: give the base that it was trained on."
        )
    if layer.down.numel() != layer.rank * prod(own[1:]) or layer.up.numel() != layer.rank * own[0]:
        raise ModelError(
            f"{path}: {name} has matrices {list(layer.down.shape)} and {list(layer.up.shape)}, the UNet's layer has weights "
            f"{list(own)}. The LoRA is for another model, or of a kind that is not plain LoRA."
        )


def _layer_shapes(unet: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of every layer that an adapter can be put on."""
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        network: Any = UNetSpatioTemporalConditionModel.from_config(dict(unet))
    kinds = torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d
    return {name: tuple(module.weight.shape) for name, module in network.named_modules() if isinstance(module, kinds)}


def _spellings(names: Iterable[str], unet: Mapping[str, Any]) -> dict[str, str]:
    """Every way to write a layer of this UNet, to its diffusers name."""
    table = rules("unet", unet)
    made = {}
    for name in names:
        for spelled in (name, rename(table, name, "original") or name):
            made |= {spelled: name, spelled.replace(".", "_"): name}
    return made


def _lora_layers(unet: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def _most(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _others(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not as most: peft tries each as a regular expression on each layer."""
    most = _most(values)
    return {name: value for name, value in values.items() if value != most}
