"""Diffusers parts from a folder, a hub id or `tiny`; strict, classes by name, safetensors only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from svdtune.config.schema import Model
from svdtune.contracts import ModelFacts
from svdtune.errors import ModelError
from svdtune.model.bridge import add_bridge
from svdtune.model.facts import (
    FILES,
    HARMLESS,
    SHIPPED,
    ModelConfigs,
    local_folder,
    model_facts,
    read_configs,
    require_useful_bridge,
)
from svdtune.model.files import WeightFiles, find_weights
from svdtune.model.widen import Widening, apply_widening, plan_widening

PARTS = ("unet", "vae", "image_encoder")


@dataclass(frozen=True)
class ModelParts:
    """An SVD model in memory: three networks in float32 and eval mode on the CPU (or fake), and its JSON."""

    unet: UNetSpatioTemporalConditionModel
    vae: AutoencoderKLTemporalDecoder
    image_encoder: CLIPVisionModelWithProjection
    configs: ModelConfigs
    facts: ModelFacts
    widening: Widening | None = None
    """What `model.on_mismatch: adapt` did to the UNet's weights."""


def load_model(model: Model, *, bridge: bool = False, seed: int = 0) -> ModelParts:
    """All parts of `model.pretrained`. Raises ModelError naming the part, the file and the keys that are wrong.

    With `bridge` (conditioning.bridge) the UNet gets a projection for a CLIP tower of another width; ConfigError when the
    widths are equal. `seed` (run.seed) is for what no file holds: the bridge, and layers that `model.on_mismatch` adds.
    """
    folder = model_folder(model)
    configs = read_configs(folder)
    facts = model_facts(configs, bridge=bridge)
    unet, widening = _load_unet(model, configs, seed)
    parts = ModelParts(
        unet=unet,
        vae=_load(AutoencoderKLTemporalDecoder, folder, "vae", model.variant),
        image_encoder=_load(CLIPVisionModelWithProjection, folder, "image_encoder", model.variant),
        configs=configs,
        facts=facts,
        widening=widening,
    )
    return _bridged(parts, seed) if bridge else parts


def known_configs(model: Model) -> ModelConfigs:
    """The JSON of the model without its weights: from its folder, or from the package for a known hub id."""
    folder = local_folder(model.pretrained)
    if folder is None:
        folder = SHIPPED.get(model.pretrained) or model_folder(model)
    return read_configs(folder)


def fake_model(configs: ModelConfigs, *, bridge: bool = False) -> ModelParts:
    """The architecture on the meta device, with a bridge as in `load_model`: shapes without weights or memory.

    `.to("meta")` afterwards: 38 UNet and 14 VAE `mix_factor` parameters ignore the device context.
    """
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(dict(configs.unet))
        vae = AutoencoderKLTemporalDecoder.from_config(dict(configs.vae))
        image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(configs.image_encoder)))
    networks: list[Any] = [unet, vae, image_encoder]
    unet, vae, image_encoder = (network.to("meta").requires_grad_(False).eval() for network in networks)
    parts = ModelParts(unet, vae, image_encoder, configs, model_facts(configs, bridge=bridge))
    return _bridged(parts, seed=0) if bridge else parts


def model_folder(model: Model) -> Path:
    """The folder of the model on this machine; a hub id is downloaded (or found in the cache) first."""
    return local_folder(model.pretrained) or _download(model)


def weights_hash(folder: Path, part: str, variant: str | None) -> str:
    """sha256 over the weight files of one part: what a checkpoint remembers its base by."""
    digest = hashlib.sha256()
    for file in _weight_files(folder, part, variant):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


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
            f"{model.revision or 'main'}): {_first_line(error)}. Without a "
            "network, download the folder elsewhere and give its path; 'tiny' ships with svdtune and needs no download."
        ) from error


def _bridged(parts: ModelParts, seed: int) -> ModelParts:
    require_useful_bridge(parts.configs)
    add_bridge(parts.unet, parts.facts.d, parts.configs.unet["cross_attention_dim"], seed=seed)
    return parts


def _load_unet(model: Model, configs: ModelConfigs, seed: int) -> tuple[Any, Widening | None]:
    """The UNet from its files, widened where they need it and `model.on_mismatch` allows it."""
    if model.on_mismatch == "error":
        try:
            return _load(UNetSpatioTemporalConditionModel, configs.folder, "unet", model.variant), None
        except ModelError as error:
            if _plan(configs, model.variant) is None:
                raise
            raise ModelError(f"{error} {_CAN_WIDEN}") from error
    widening = _plan(configs, model.variant)
    if widening is None:
        return _load(UNetSpatioTemporalConditionModel, configs.folder, "unet", model.variant), None
    paths = _weight_files(configs.folder, "unet", model.variant)
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    with torch.device("meta"):
        unet: Any = UNetSpatioTemporalConditionModel.from_config(dict(configs.unet))
    unet.load_state_dict(apply_widening(widening, tensors, seed=seed), strict=True, assign=True)
    return unet.requires_grad_(False).eval(), widening


_CAN_WIDEN = (
    "These differences are ones that svdtune can fill in without changing what the weights compute: set model.on_mismatch=adapt, "
    "and adapt.method=full to train what it adds."
)


def _plan(configs: ModelConfigs, variant: str | None) -> Widening | None:
    """From the files' headers; None where nothing needs to be widened, or nothing safe is known."""
    with torch.device("meta"):
        unet: Any = UNetSpatioTemporalConditionModel.from_config(dict(configs.unet))
    got: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(configs.folder, "unet", variant):
        try:
            with safe_open(path, framework="pt") as file:
                got |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None  # strict loading says what is wrong with the file
    return plan_widening({name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}, got)


def _load(cls: Any, folder: Path, part: str, variant: str | None) -> Any:
    _weight_files(folder, part, variant)
    transformers_logging.disable_progress_bar()
    try:
        network, info = cls.from_pretrained(
            folder / part, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True,
            torch_dtype=torch.float32,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder / part}: {_first_line(error)}. The weights do not fit the config beside them."
        ) from error
    _strict(folder / part, info)
    return network.requires_grad_(False).eval()


def _weight_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors of a part, shards included. Raises ModelError naming what lies there instead."""
    found = find_weights(folder / part, part, variant)
    if not found.files:
        raise ModelError(
            f"{folder / part}: no *{_suffix(variant)} with model.variant={variant or 'null'}; "
            f"there: {', '.join(found.there) or 'no weights'}. {_variant_hint(found)}"
        )
    return list(found.files)


def _suffix(variant: str | None) -> str:
    return f".{variant}.safetensors" if variant else ".safetensors"


def _variant_hint(found: WeightFiles) -> str:
    if found.variants:
        return f"Set model.variant={found.variants[0]}."
    if found.plain:
        return "Set model.variant=null."
    return "svdtune reads safetensors only; a .bin or .pt file can run code when opened."


def _strict(where: Path, info: Mapping[str, Any]) -> None:
    problems = {
        "missing": sorted(set(info["missing_keys"])),
        "unexpected": sorted(set(info["unexpected_keys"]) - HARMLESS),
        "misshapen": sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]),
    }
    told = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if told:
        raise ModelError(
            f"{where}: the weights are not the network of config.json: {'; '.join(told)}. Missing weights would train from "
            "random values. Take weights and config from one release."
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
