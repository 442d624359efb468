"""Which parameters learn. All methods are one path: they differ by which parameters require grad.

Trained parameters are float32, or bfloat16 for an optimizer that rounds by chance (to nearest, 1e-5 steps vanish there); frozen
ones take the compute dtype.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from svdtune.config.schema import Adapt
from svdtune.errors import ConfigError
from svdtune.model import bridge

# SVD's image context is one token, so the softmax over it is constant 1: these never get a gradient, and norm2 feeds only them.
DEAD = re.compile(r"transformer_blocks\.\d+\.(attn2\.to_[qk]|norm2)(\.|$)")
TEMPORAL = re.compile(r"(^|\.)(temporal_transformer_blocks|temporal_res_block|time_pos_embed)\.|\.mix_factor$")
TEMPORAL_ATTENTION = re.compile(r"(^|\.)temporal_transformer_blocks\.")
LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_v", "attn2.to_out.0")


def adapt(
    unet: nn.Module, config: Adapt, *, dtype: torch.dtype, seed: int, trained_dtype: torch.dtype = torch.float32
) -> dict[str, nn.Parameter]:
    """Make the UNet trainable as `adapt.method` says; returns the trained parameters by name.

    A bridge (`conditioning.bridge`) is trained with every method.
    Injects LoRA adapters in place (their initial values depend on `seed` alone; the adapted UNet starts equal to the
    base). Casts frozen parameters to `dtype` and trained ones to `trained_dtype`. Raises ConfigError when nothing would learn.
    """
    unet.requires_grad_(False)
    if config.method == "lora":
        _inject_lora(unet, config, seed)
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(_learns(name, config.method))
    matched = any(parameter.requires_grad for parameter in unet.parameters())
    for name, parameter in unet.named_parameters():
        # A bridge starts from nothing, so it learns with every method.
        parameter.requires_grad_(parameter.requires_grad or name == bridge.WEIGHT)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(trained_dtype if parameter.requires_grad else dtype)
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    if not matched:
        raise ConfigError(
            f"adapt.method={config.method} matches no parameter of this UNet, so nothing would be trained."
        )
    return trained


def lora_modules(unet: nn.Module, targets: list[str] | None) -> list[str]:
    """Full names of the linear and convolution layers that get an adapter, dead ones left out.

    Raises ConfigError naming each target that matches nothing, or only dead layers, with the nearest real ending.
    """
    kinds = nn.Linear | nn.Conv2d | nn.Conv3d
    layers = [name for name, module in unet.named_modules() if isinstance(module, kinds) and name != bridge.NAME]
    chosen: set[str] = set()
    for target in LORA_TARGETS if targets is None else targets:
        matched = [name for name in layers if name == target or name.endswith("." + target)]
        alive = [name for name in matched if not DEAD.search(name)]
        if not alive:
            raise ConfigError(_no_target(target, matched, layers))
        chosen.update(alive)
    return sorted(chosen)


def _inject_lora(unet: nn.Module, config: Adapt, seed: int) -> None:
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # pyright: ignore[reportArgumentType]
        use_dora=config.dora,
        target_modules=lora_modules(unet, config.targets),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, unet)


def _learns(name: str, method: str) -> bool:
    if DEAD.search(name):
        return False
    if method == "temporal":
        return bool(TEMPORAL.search(name))
    if method == "temporal_attention":
        return bool(TEMPORAL_ATTENTION.search(name))
    return method == "full" or not TEMPORAL.search(name)


def _no_target(target: str, matched: list[str], layers: list[str]) -> str:
    if matched:
        return (
            f"adapt.targets: {target!r} matches only dead layers ({matched[0]}, ...). SVD's image context is one token, so "
            "attn2.to_q and attn2.to_k never affect the output and an adapter there trains nothing; use attn2.to_v."
        )
    endings = sorted({".".join(name.split(".")[-n:]) for name in layers for n in (1, 2, 3)})
    near = get_close_matches(target, [e for e in endings if not e.isdigit()], n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"adapt.targets: {target!r} is the ending of no linear or convolution layer of this UNet.{hint}"
