"""`memory.checkpointing`: which parts of the UNet keep their inputs alone and are computed again in the backward pass.

diffusers' own flag covers the spatial blocks and leaves every temporal block with all its activations
(`TransformerSpatioTemporalModel.forward` calls `temporal_block` plainly, the middle block its first ResNet too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from svdtune.model.offload import Offload

Policy = Literal["none", "level0", "units", "nested", "diffusers"]

_UNITS = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)
_INSIDE = (BasicTransformerBlock, TemporalBasicTransformerBlock, FeedForward)


class Recomputed:
    """A module's forward that keeps only its inputs for the backward pass, which computes it again."""

    def __init__(self, forward: Callable[..., Any], offload: Offload | None = None) -> None:
        self.forward = forward
        self.offload = offload
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.on or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        with self.offload.around_a_unit() if self.offload else nullcontext():
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def recompute(unet: UNetSpatioTemporalConditionModel, policy: Policy, *, offload: bool = False) -> None:
    """Apply `policy` to the UNet in place; names of parameters and modules stay. `offload`: see svdtune/model/offload.py.

    level0: ResNets and transformers of the highest resolution, where most activations are. units: of all levels.
    nested: those, and inside them each transformer block and feed-forward again, so that one unit's backward needs less.
    """
    if policy == "diffusers":
        unet.enable_gradient_checkpointing()
    shared = Offload() if offload else None
    for module in _chosen(unet, policy):
        # What is inside a unit is recomputed with it: its inputs are not there between the passes.
        module.forward = Recomputed(module.forward, shared if isinstance(module, _UNITS) else None)


@contextmanager
def kept(unet: nn.Module) -> Iterator[None]:
    """Nothing is computed again inside: what backward needs is kept."""
    ours = [module.forward for module in unet.modules() if isinstance(module.forward, Recomputed)]
    theirs: list[Any] = [module for module in unet.modules() if getattr(module, "gradient_checkpointing", False)]
    _switch(ours, theirs, on=False)
    try:
        yield
    finally:
        _switch(ours, theirs, on=True)


def recomputes(unet: nn.Module) -> bool:
    """Whether any part of the network is computed again in the backward pass."""
    return any(isinstance(m.forward, Recomputed) or getattr(m, "gradient_checkpointing", False) for m in unet.modules())


def _switch(ours: list[Any], theirs: list[Any], *, on: bool) -> None:
    for forward in ours:
        forward.on = on
    for block in theirs:
        block.gradient_checkpointing = on


def _chosen(unet: UNetSpatioTemporalConditionModel, policy: Policy) -> list[nn.Module]:
    if policy in ("none", "diffusers"):
        return []
    kinds = (*_UNITS, *_INSIDE) if policy == "nested" else _UNITS
    where = [unet.down_blocks[0], unet.up_blocks[-1]] if policy == "level0" else [unet]
    return [module for part in where for module in part.modules() if isinstance(module, kinds)]
