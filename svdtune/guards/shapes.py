"""The real `train_step`, forward and backward, at the user's sizes, on fake tensors: no weights, no GPU, seconds."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from svdtune.config.schema import Config
from svdtune.contracts import Axes, Draws, VideoBatch, specs
from svdtune.model.adapt import adapt
from svdtune.model.fake import fake_tensors
from svdtune.model.load import ModelParts, fake_model, known_configs
from svdtune.trainer.build import DTYPES, clip_pixels
from svdtune.trainer.step import Parts, train_step

Record = TypeVar("Record")


def fake_step(config: Config) -> None:
    """Build, adapt and step exactly as training does. Raises what training would raise."""
    dtype = DTYPES[config.train.precision]
    model = fake_model(known_configs(config.model))
    adapt(model.unet, config.adapt, dtype=dtype, seed=config.run.seed)
    model.unet.train()
    model.unet.enable_gradient_checkpointing()
    model.image_encoder.to(dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    data = config.data
    axes = model.facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)
    with fake_tensors(model.unet, model.vae, model.image_encoder):
        result = train_step(_parts(model, config, dtype), fake_record(VideoBatch, axes), fake_record(Draws, axes))
        result.loss.backward()


def fake_record(record: type[Record], axes: Axes) -> Record:
    """A record with tensors of the right shapes and dtypes; what is in them does not matter under fake tensors."""
    made: dict[str, Any] = {
        name: torch.empty(spec.shape(axes), dtype=getattr(torch, spec.dtype, torch.float32))
        for name, spec in specs(record).items()
    }
    return record(**made)


def _parts(model: ModelParts, config: Config, dtype: torch.dtype) -> Parts:
    # Fake pictures take no memory: few large chunks, or a large batch would encode for minutes.
    chunk = max(config.memory.vae_chunk, config.train.batch_size * config.data.num_frames // 4)
    return Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, dtype, chunk)
