"""One training step as pure tensor code: what the GPU runs, what preflight runs under fake tensors, what tests run.

No `.item()`, no I/O, no random numbers, no accelerate: everything random arrives in `Draws`, values are read afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from svdtune.contracts import (
    Batch,
    Draws,
    Encoded,
    LatentBatch,
    ModelFacts,
    Prediction,
    StepResult,
    UNetInput,
    require,
)
from svdtune.diffusion import conditioning, edm


@dataclass(frozen=True)
class Parts:
    """The networks of a step. `unet` is the wrapped model that training must call (DDP averages gradients in it)."""

    unet: Any
    vae: Any
    image_encoder: Any
    clip: conditioning.ClipPixels
    facts: ModelFacts
    dtype: torch.dtype
    """Compute dtype of the UNet; float32 means no autocast."""
    vae_chunk: int


def train_step(parts: Parts, batch: Batch, draws: Draws) -> StepResult:
    """Loss of the clips in `batch` at the noise levels in `draws`, with the records it came from.

    Raises ContractError when a record is not what `contracts/svd.py` says.
    """
    return denoise(parts, encode(parts, batch, draws), batch, draws)


def encode(parts: Parts, batch: Batch, draws: Draws) -> Encoded:
    """Run the frozen networks: target latents, conditioning latents and CLIP embedding. No gradients.

    Of a `LatentBatch` only the noised first frame is left to encode; the CLIP tower is not asked.
    """
    axes = batch.axes(parts.facts)
    require(batch, axes)
    require(draws, axes)
    with torch.no_grad():
        if isinstance(batch, LatentBatch):
            encoded = _of_cached(parts, batch, draws)
        else:
            first_frame = batch.pixels[:, 0]
            encoded = Encoded(
                conditioning.target_latents(
                    parts.vae, batch, draws, scaling_factor=parts.facts.scaling_factor, chunk=parts.vae_chunk
                ),
                conditioning.image_latents(parts.vae, first_frame, draws, chunk=parts.vae_chunk),
                conditioning.image_embeds(parts.image_encoder, first_frame, parts.clip),
            )
    require(encoded, axes)
    return encoded


def _of_cached(parts: Parts, batch: LatentBatch, draws: Draws) -> Encoded:
    first_frame = conditioning.unpacked(batch.first_frame)
    return Encoded(
        conditioning.cached_latents(batch, draws, scaling_factor=parts.facts.scaling_factor),
        conditioning.image_latents(parts.vae, first_frame, draws, chunk=parts.vae_chunk),
        batch.image_embeds,
    )


def denoise(parts: Parts, encoded: Encoded, batch: Batch, draws: Draws) -> StepResult:
    """Ask the UNet, and compare with v in float32."""
    axes = batch.axes(parts.facts)
    unet_input = conditioning.unet_input(encoded, batch, draws)
    require(unet_input, axes)
    target = edm.v_target(encoded.latents, draws.noise, draws.sigma)
    prediction = Prediction(predict(parts, unet_input), target)
    require(prediction, axes)
    loss_per_clip = edm.v_loss(prediction.model_output, prediction.target)
    result = StepResult(encoded, unet_input, prediction, loss_per_clip.mean(), loss_per_clip)
    require(result, axes)
    return result


def predict(parts: Parts, unet_input: UNetInput) -> torch.Tensor:
    """F (b, t, z, h/f, w/f) in float32, computed in `parts.dtype`."""
    with torch.autocast(unet_input.sample.device.type, dtype=parts.dtype, enabled=parts.dtype != torch.float32):
        output = parts.unet(
            unet_input.sample.to(parts.dtype),
            unet_input.timestep,
            encoder_hidden_states=unet_input.encoder_hidden_states.to(parts.dtype),
            added_time_ids=unet_input.added_time_ids,
            return_dict=False,
        )[0]
    return output.float()
