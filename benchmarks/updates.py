"""Updates with random weights, at any size: what the benchmarks of time and memory run. Nothing is read from the disk.

Networks are made on the device with random numbers, batch and draws too: fine for time and memory, the loss means nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from svdtune.config.schema import Config
from svdtune.contracts import Draws, LatentBatch, VideoBatch, specs
from svdtune.model.load import ModelParts, fake_model, known_configs
from svdtune.trainer.build import DTYPES, clip_pixels, for_samples_alone, prepare_networks
from svdtune.trainer.optimizer import make_learning
from svdtune.trainer.step import Parts, train_step

GIB = 2**30
WARM_UP = 2
"""Updates that are not timed: the allocator's, the kernels' and the optimizer state's first times."""


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def versions() -> dict[str, str]:
    """Where a result was made."""
    import diffusers

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"device": where, "torch": torch.__version__, "diffusers": diffusers.__version__}


def timed(make: Callable[[], Callable[[], None]], steps: int) -> dict[str, Any]:
    """Median seconds of the update that `make` makes, and on a GPU the GiB allocated and reserved at the peak; out of memory is told."""
    _reset()
    seconds = []
    try:
        update = make()
        for _ in range(steps + WARM_UP):
            _synchronize()
            began = time.perf_counter()
            update()
            _synchronize()
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0], **memory()}
    return {"seconds": round(median(seconds[WARM_UP:]), 4), "first_seconds": round(seconds[0], 2), **memory()}


def memory() -> dict[str, float]:
    """The peaks since `_reset`; {} on a CPU, where the allocator counts nothing."""
    if not torch.cuda.is_available():
        return {}
    peaks = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: round(size / GIB, 2) for name, size in peaks.items()}


def our_update(config: Config, where: torch.device) -> Callable[[], None]:
    """svdtune's update of one micro-step as `config` says: train_step, backward, clipping, the optimizer's step, averages."""
    model: Any = random_model(config, where)
    for part in for_samples_alone(model, config):
        part.to("meta")  # as in training, not on the device
    trained = prepare_networks(model, config, on_accelerator=where.type != "cpu", compiled=config.train.compile)
    model.unet.to(where)
    learning = make_learning(config, trained, where)
    parts = Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, DTYPES[config.train.precision],
                  config.memory.vae_chunk)  # fmt: skip
    data = config.data
    axes = model.facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)
    batch: Any = record(LatentBatch if data.latents else VideoBatch, axes, where)
    draws = record(Draws, axes, where)

    def update() -> None:
        train_step(parts, batch, draws).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.train.clip_norm or float("inf"))
        learning.optimizer.step()
        if learning.ema is not None:
            learning.ema.step(trained.values())
        learning.optimizer.zero_grad(set_to_none=True)

    return update


def random_model(config: Config, where: torch.device) -> ModelParts:
    """The networks of `config.model` in float32 with small random weights on the device."""
    torch.manual_seed(0)
    model = fake_model(known_configs(config.model))
    for network in (model.unet, model.vae, model.image_encoder):
        network.to_empty(device=where)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(0, 0.02)
            else:
                tensor.zero_()
    return model


def record(kind: Any, axes: Any, where: torch.device) -> Any:
    """A batch or its draws: noise where there are many numbers, ones where there is one for each clip."""

    def tensor(spec: Any) -> torch.Tensor:
        shape, dtype = spec.shape(axes), getattr(torch, spec.dtype)
        return (
            torch.randn(shape, device=where).to(dtype)
            if len(shape) > 1
            else torch.ones(shape, device=where, dtype=dtype)
        )

    return kind(**{name: tensor(spec) for name, spec in specs(kind).items()})


@contextmanager
def unfolded() -> Iterator[None]:
    """The UNet with its whole one-key cross-attention, as diffusers computes it."""
    with patch("svdtune.trainer.build.fold", lambda _unet: None):
        yield


def _reset() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
