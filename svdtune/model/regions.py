"""`train.compile`: the UNet's repeated blocks are compiled, one graph for each kind of block and shape, without a break inside.

Where they train only: samples and held-out losses have other sizes, and would pay minutes of compiling for seconds of computing.
diffusers' own `compile_repeated_blocks` raises on SVD, whose UNet names no blocks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import nn

from svdtune.errors import ConfigError

BLOCKS = (BasicTransformerBlock, TemporalBasicTransformerBlock, ResnetBlock2D, TemporalResnetBlock)
_GRAPHS = 128
"""Graphs that one kind of block may have. SVD's ResNets have 14 combinations of channels and size, torch's own limit is 8."""


class Compiled:
    """A block's forward, compiled for the passes that make gradients."""

    def __init__(self, forward: Callable[..., Any], backend: str) -> None:
        self.forward = forward
        self.compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if self.on and torch.is_grad_enabled() else self.forward)(*args, **kwargs)


def compile_blocks(unet: nn.Module, backend: str = "inductor") -> None:
    """Compile the repeated blocks of `unet` in place, before `recompute`; names of parameters and modules stay.

    Nothing is compiled yet: each graph is made when its shape first comes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for module in unet.modules():
        if isinstance(module, BLOCKS):
            module.forward = Compiled(module.forward, backend)


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where the compiler makes no code for `device`."""
    missing = "no NVIDIA GPU is visible" if device.type != "cuda" else "Triton is not installed"
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"train.compile: {missing}, and the compiler's kernels are for NVIDIA GPUs. Use train.compile=false.",
            ("train.compile=false",),
        )


@contextmanager
def uncompiled(unet: nn.Module) -> Iterator[None]:
    """Blocks compute as written inside: hooks on what is in them are called."""
    compiled = [forward for module in unet.modules() if (forward := _compiled(module.forward))]
    for forward in compiled:
        forward.on = False
    try:
        yield
    finally:
        for forward in compiled:
            forward.on = True


def _compiled(forward: Any) -> Compiled | None:
    """Also where it is the forward that is computed again in the backward pass."""
    inner = getattr(forward, "forward", None)
    return next((each for each in (forward, inner) if isinstance(each, Compiled)), None)
