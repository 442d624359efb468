"""Optimizer by name, learning rate schedule, EMA: other people's code, chosen here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from svdtune.config.schema import Train
from svdtune.errors import ConfigError

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
FUSED = ("cuda", "cpu", "mps", "xpu")


@dataclass(frozen=True)
class Learning:
    """What moves the trained parameters."""

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    ema: EMAModel | None


def make_learning(config: Train, trained: Mapping[str, nn.Parameter], device: torch.device) -> Learning:
    """Optimizer, schedule and moving average over exactly `trained`, the parameters by name. Raises as `make_optimizer` does."""
    optimizer = make_optimizer(config, trained.values(), device)
    return Learning(optimizer, make_schedule(config, optimizer), make_ema(config, trained.values()))


def make_optimizer(config: Train, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over exactly these parameters. Raises ConfigError when its package is not installed."""
    trained = list(parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=device.type in FUSED
        )
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            trained, lr=config.lr, weight_decay=config.weight_decay, relative_step=False, scale_parameter=False
        )
    return _adamw8bit(config, trained, device)


def make_schedule(config: Train, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Linear warm-up, then constant, cosine or linear to zero at `train.steps`; one tick per optimizer step."""
    return get_scheduler(
        SCHEDULES[config.schedule], optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
    )


def make_ema(config: Train, parameters: Iterable[nn.Parameter]) -> EMAModel | None:
    """Moving average of the trained parameters: decay min(train.ema_decay, (1 + step) / (10 + step)), or None."""
    return EMAModel(parameters, decay=config.ema_decay) if config.ema else None


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
