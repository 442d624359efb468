"""Optimizer by name, learning rate schedule, EMA: chosen here, made elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from svdtune.config.schema import Config, Train
from svdtune.errors import ConfigError
from svdtune.trainer.adamw import GROUP, RoundingAdamW, RoundingAdamW8bit
from svdtune.trainer.averages import HostAverages

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
FUSED = ("cuda", "cpu", "mps", "xpu")


@dataclass(frozen=True)
class Learning:
    """What moves the trained parameters."""

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    ema: EMAModel | None


def make_learning(config: Config, trained: Mapping[str, nn.Parameter], device: torch.device) -> Learning:
    """Optimizer, schedule and moving average over exactly `trained`, the parameters by name. Raises as `make_optimizer` does."""
    optimizer = make_optimizer(config, trained.values(), device)
    ema = make_ema(config.train, trained.values(), on_cpu=config.memory.ema_on_cpu)
    return Learning(optimizer, make_schedule(config.train, optimizer), ema)


def make_optimizer(config: Config, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over exactly these parameters. Raises ConfigError when its package is not installed."""
    trained, train = list(parameters), config.train
    if config.memory.parameters == "bf16":
        kind = RoundingAdamW8bit if train.optimizer == "adamw8bit" else RoundingAdamW
        return kind(
            trained, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, seed=config.run.seed,
            compiled=train.compile and device.type == "cuda",
        )  # fmt: skip
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            trained, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=device.type in FUSED
        )
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            trained, lr=train.lr, weight_decay=train.weight_decay, relative_step=False, scale_parameter=False
        )
    return _adamw8bit(train, trained, device)


def state_bytes(config: Config) -> float:
    """Bytes of optimizer state per trained number, on the device.

    The number itself takes 4 bytes and its gradient 4, with memory.parameters=bf16 2 and 2; its average (train.ema) is float32 always.
    adafactor keeps a row and a column of each matrix, next to nothing.
    """
    if config.memory.parameters == "bf16":
        return 2 * (1 + 2 / GROUP) if config.train.optimizer == "adamw8bit" else 4.0
    return {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 0.0}[config.train.optimizer]


def make_schedule(config: Train, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Linear warm-up, then constant, cosine or linear to zero at `train.steps`; one tick per optimizer step."""
    return get_scheduler(
        SCHEDULES[config.schedule], optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
    )


def make_ema(config: Train, parameters: Iterable[nn.Parameter], *, on_cpu: bool = False) -> EMAModel | None:
    """Moving average of the trained parameters: decay min(train.ema_decay, (1 + step) / (10 + step)), or None.

    In float32 whatever they are in: a bfloat16 average moves by no ten-thousandth.
    """
    if not config.ema:
        return None
    ema = HostAverages(parameters, config.ema_decay) if on_cpu else EMAModel(parameters, decay=config.ema_decay)
    ema.to(dtype=torch.float32)
    return ema


def _adamw8bit(config: Train, trained: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    if device.type != "cuda":
        raise ConfigError(
            f"train.optimizer: adamw8bit needs an NVIDIA GPU, this process runs on {device.type}. Use train.optimizer=adamw."
        )
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "train.optimizer: adamw8bit needs bitsandbytes, which is not installed. "
            "Run `pip install 'svdtune[bitsandbytes]'`, or use train.optimizer=adamw."
        ) from error
    return AdamW8bit(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
