"""FSDP2: every rank holds a part of each parameter, and a block is whole only while it computes.

torch's own `fully_shard`, with the numbers of DDP: parameters, gradients and their average stay in the parameters' dtype, and
autocast chooses what is computed in. `Session.trained` names the shards, which is what the optimizer and the averages move.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from svdtune.config.schema import Config
from svdtune.engine import BLOCKS, Sharding
from svdtune.errors import ConfigError


def require_shardable(config: Config) -> None:
    """Raise ConfigError for what does not act number by number, so that a part would move otherwise than the whole."""
    if config.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer: {config.train.optimizer} looks at whole parameters, and under FSDP2 each process holds a part of "
            "them. Use train.optimizer=adamw: its state is divided by the number of processes."
        )
    if config.train.precision == "fp16":
        raise ConfigError(
            "train.precision: fp16 needs one loss scale for all shards, which svdtune does not do under FSDP2. Use "
            "train.precision=bf16, or configs/accelerate/multi_gpu.yaml."
        )
    if config.memory.ema_on_cpu:
        raise ConfigError(
            "memory.ema_on_cpu: under FSDP2 each process holds a part of the averages, beside its part of the parameters, and "
            "torch keeps both on one device. Use memory.ema_on_cpu=false."
        )


def shard(
    unet: nn.Module, trained: Mapping[str, nn.Parameter], sharding: Sharding, device: torch.device
) -> dict[str, nn.Parameter]:
    """Divide every parameter of `unet` over the ranks, on `device`; returns the trained ones anew, in the same order."""
    # diffusers' blocks end in a reshape; nothing is written into it afterwards.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in list(unet.modules()):
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    # The root is needed again at once by the backward pass.
    fully_shard(unet, mesh=mesh, reshard_after_forward=False)
    parameters = dict(unet.named_parameters())
    return {name: parameters[name] for name in trained}


@contextmanager
def accumulating(unet: nn.Module) -> Iterator[None]:
    """Backward passes inside add to whole gradients on this rank, and average nothing."""
    root: Any = unet
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


@contextmanager
def gathered(unet: nn.Module, sharding: Sharding | None) -> Iterator[None]:
    """All parameters whole on every rank, which inside need not run the same: nothing is sent. Entered by every rank.

    Gradients made inside stay in the whole parameters; who makes them removes them. Nothing happens without sharding.
    """
    if sharding is None:
        yield
        return
    root: Any = unet
    parts: list[Any] = [module for module in unet.modules() if isinstance(module, FSDPModule)]
    root.set_reshard_after_forward(False)
    root.set_reshard_after_backward(False)
    for part in parts:
        part.unshard()
    try:
        with accumulating(unet):
            yield
    finally:
        for part in parts:
            part.reshard()
        root.set_reshard_after_backward(True)
        root.set_reshard_after_forward(sharding.reshard_after_forward)
        root.set_reshard_after_forward(False, recurse=False)
