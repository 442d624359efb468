"""`conditioning.bridge: linear`: a trained projection from a CLIP tower of another width to the UNet's cross-attention.

It is a submodule of the UNet that acts on `encoder_hidden_states` before the UNet's own forward, so whatever holds for a
trained parameter (DDP, EMA, optimizer, checkpoints, sampling) holds for it, and the contract of the UNet's input is the tower's.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import nn

NAME = "image_bridge"
WEIGHT = f"{NAME}.weight"


def add_bridge(unet: nn.Module, d_clip: int, d_unet: int, *, seed: int) -> None:
    """Give `unet` a projection of (b, 1, d_clip) tokens to (b, 1, d_unet), float32, on the UNet's device.

    No bias: a dropped token, which is zero, must stay zero. The start values depend on `seed` alone.
    """
    bridge = nn.Linear(d_clip, d_unet, bias=False, device="meta")
    generator = torch.Generator().manual_seed(seed)
    # Keeps the size of the embedding's entries, which the frozen attn2.to_v was made for.
    weight = torch.randn(d_unet, d_clip, generator=generator) / sqrt(d_clip)
    bridge.weight = nn.Parameter(weight.to(next(unet.parameters()).device), requires_grad=False)
    unet.add_module(NAME, bridge)
    unet.register_forward_pre_hook(_project, with_kwargs=True)


def _project(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bridge: Any = unet.get_submodule(NAME)
    tokens = kwargs["encoder_hidden_states"]
    return args, {**kwargs, "encoder_hidden_states": bridge(tokens.to(bridge.weight.dtype))}
