"""Diffusers parts from a folder, a single file, a hub id or `tiny`; strict, classes by name, safetensors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from svdtune.config.schema import Model
from svdtune.contracts import ModelFacts
from svdtune.errors import ModelError
from svdtune.model.bridge import add_bridge
from svdtune.model.facts import (
    HARMLESS,
    IMAGE_DECODER,
    SHIPPED,
    ModelConfigs,
    class_name,
    model_facts,
    require_useful_bridge,
)
from svdtune.model.single_file import read_single_file
from svdtune.model.source import first_line, local_source, model_source, part_weights, read_configs, weight_files
from svdtune.model.weights import Weights
from svdtune.model.widen import Widening, apply_widening, plan_widening


@dataclass(frozen=True)
class ModelParts:
    """An SVD model in memory: three networks in float32 and eval mode on the CPU (or fake), and its JSON."""

    unet: UNetSpatioTemporalConditionModel
    vae: AutoencoderKLTemporalDecoder
    """In an `image_decoder` model an AutoencoderKL, which decodes each frame for itself."""
    image_encoder: CLIPVisionModelWithProjection
    configs: ModelConfigs
    facts: ModelFacts
    widening: Widening | None = None
    """What `model.on_mismatch: adapt` did to the UNet's weights."""


def load_model(
    model: Model, *, bridge: bool = False, seed: int = 0, only: Sequence[str] = ("unet", "vae", "image_encoder")
) -> ModelParts:
    """All parts of `model.pretrained`. Raises ModelError naming the part, the file and the keys that are wrong.

    Parts that are not in `only` are on the meta device, without weights: whoever uses one is told by torch.

    With `bridge` (conditioning.bridge) the UNet gets a projection for a CLIP tower of another width; ConfigError when the
    widths are equal. `seed` (run.seed) is for what no file holds: the bridge, and layers that `model.on_mismatch` adds.
    """
    configs = read_configs(model_source(model))
    facts = model_facts(configs, bridge=bridge)
    unet, widening = load_unet(model, configs, seed) if "unet" in only else (_without_weights(configs, "unet"), None)
    vae, image_encoder = (
        load_part(configs, part, model.variant) if part in only else _without_weights(configs, part)
        for part in ("vae", "image_encoder")
    )
    parts = ModelParts(
        unet=unet,
        vae=vae,
        image_encoder=image_encoder,
        configs=configs,
        facts=facts,
        widening=widening,
    )
    return _bridged(parts, seed) if bridge and "unet" in only else parts


def _without_weights(configs: ModelConfigs, part: str) -> Any:
    with torch.device("meta"):
        return build_part(part, getattr(configs, part)).to("meta").requires_grad_(False).eval()


def known_configs(model: Model) -> ModelConfigs:
    """The JSON of the model without its weights: from its folder or file, or from the package for a known hub id."""
    source = local_source(model.pretrained)
    if source is None:
        source = SHIPPED.get(model.pretrained) or model_source(model)
    return read_configs(source)


def fake_model(configs: ModelConfigs, *, bridge: bool = False) -> ModelParts:
    """The architecture on the meta device, with a bridge as in `load_model`: shapes without weights or memory.

    `.to("meta")` afterwards: 38 UNet and 14 VAE `mix_factor` parameters ignore the device context.
    """
    unet, vae, image_encoder = (_without_weights(configs, part) for part in ("unet", "vae", "image_encoder"))
    parts = ModelParts(unet, vae, image_encoder, configs, model_facts(configs, bridge=bridge))
    return _bridged(parts, seed=0) if bridge else parts


def build_part(part: str, config: Mapping[str, Any]) -> Any:
    """The network of one part with random weights, on the default device, as its own class makes it from the JSON."""
    if part == "image_encoder":
        return CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(config)))
    return _class(part, config).from_config(dict(config))


def load_part(configs: ModelConfigs, part: str, variant: str | None) -> Any:
    """One network in float32 on the CPU, frozen and in eval mode; strict. Raises ModelError."""
    if configs.source.is_file():
        file = read_single_file(configs.source)
        weights, where = part_weights(configs.source, part, None), f"{configs.source}: {part}"
        return network_of(part, getattr(configs, part), weights, where, file.plan(part).unknown)
    return _load(_class(part, getattr(configs, part)), configs.source, part, variant)


def _class(part: str, config: Mapping[str, Any]) -> Any:
    if part == "vae":
        return AutoencoderKL if class_name(config) == IMAGE_DECODER else AutoencoderKLTemporalDecoder
    return {"unet": UNetSpatioTemporalConditionModel, "image_encoder": CLIPVisionModelWithProjection}[part]


def _bridged(parts: ModelParts, seed: int) -> ModelParts:
    require_useful_bridge(parts.configs)
    add_bridge(parts.unet, parts.facts.d, parts.configs.unet["cross_attention_dim"], seed=seed)
    return parts


def load_unet(model: Model, configs: ModelConfigs, seed: int) -> tuple[Any, Widening | None]:
    """The UNet of `model`, widened where its files need it and `model.on_mismatch` allows it. Raises ModelError."""
    if model.on_mismatch == "error" or configs.source.is_file():
        try:
            return load_part(configs, "unet", model.variant), None
        except ModelError as error:
            if configs.source.is_file() or _plan(configs, model.variant) is None:
                raise
            raise ModelError(f"{error} {_CAN_WIDEN}") from error
    widening = _plan(configs, model.variant)
    if widening is None:
        return load_part(configs, "unet", model.variant), None
    tensors = dict(part_weights(configs.source, "unet", model.variant).items())
    with torch.device("meta"):
        unet = build_part("unet", configs.unet)
    unet.load_state_dict(apply_widening(widening, tensors, seed=seed), strict=True, assign=True)
    return unet.requires_grad_(False).eval(), widening


_CAN_WIDEN = (
    "These differences are ones that svdtune can fill in without changing what the weights compute: set model.on_mismatch=adapt, "
    "and adapt.method=full to train what it adds."
)


def _plan(configs: ModelConfigs, variant: str | None) -> Widening | None:
    """From the files' headers; None where nothing needs to be widened, or nothing safe is known."""
    with torch.device("meta"):
        unet = build_part("unet", configs.unet)
    try:
        weights = part_weights(configs.source, "unet", variant)
    except ModelError:
        return None  # strict loading says what is wrong with the files
    got = {name: form.shape for name, form in weights.forms.items()}
    return plan_widening({name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}, got)


def network_of(part: str, config: Mapping[str, Any], weights: Weights, where: str, unknown: Sequence[str] = ()) -> Any:
    """The network of one part with `weights` in float32, frozen, in eval mode; strict. `where` is for the ModelError.

    Tensor by tensor into a network without memory: the weights are never there twice.
    """
    try:
        with init_empty_weights(include_buffers=False):
            network = build_part(part, config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{where}: no network can be built from its config: {first_line(error)}.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    _strict(
        where,
        {
            "missing_keys": expected.keys() - weights.forms.keys(),
            "unexpected_keys": [*(weights.forms.keys() - expected.keys()), *unknown],
            "mismatched_keys": [
                name for name, form in weights.forms.items() if name in expected and expected[name] != form.shape
            ],
        },
    )
    network.load_state_dict({name: weights.read(name).float() for name in expected}, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def _load(cls: Any, folder: Path, part: str, variant: str | None) -> Any:
    weight_files(folder, part, variant)
    transformers_logging.disable_progress_bar()
    try:
        network, info = cls.from_pretrained(
            folder / part, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True,
            torch_dtype=torch.float32,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder / part}: {first_line(error)}. The weights do not fit the config beside them."
        ) from error
    _strict(folder / part, info)
    return network.requires_grad_(False).eval()


def _strict(where: Path | str, info: Mapping[str, Any]) -> None:
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
