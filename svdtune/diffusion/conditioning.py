"""From a clip to the four tensors the UNet takes. Networks are passed in; nothing here draws random numbers.

Sources: NUMERICS of SVD in sgm (Stability-AI/generative-models 0ad7de9) and diffusers' StableVideoDiffusionPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _gaussian_blur2d
from einops import rearrange, repeat
from torch import Tensor, nn

from svdtune.contracts import Batch, Draws, Encoded, LatentBatch, UNetInput, VideoBatch
from svdtune.diffusion.edm import add_noise, append_dims, scalings

_WHOLE = 32767


@dataclass(frozen=True)
class ClipPixels:
    """How the CLIP tower wants its picture: side in pixels, and mean and standard deviation per rgb channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def posterior(vae: Any, pixels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, z, h/f, w/f) of the VAE posterior of pixels (n, c, h, w) in [-1, 1].

    Float32 whatever surrounds it (sgm disables autocast there; under bf16 autocast the latents are off by 0.013), and
    `chunk` pictures at a time, since one chunk's activations are the memory peak.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        parts = [vae.encode(part.float()).latent_dist for part in pixels.split(chunk)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def target_latents(vae: Any, batch: VideoBatch, draws: Draws, *, scaling_factor: float, chunk: int) -> Tensor:
    """x0 (b, t, z, h/f, w/f) = scaling_factor * a sample of the posterior of every frame."""
    b = batch.pixels.shape[0]
    mean, std = posterior(vae, rearrange(batch.pixels, "b t c h w -> (b t) c h w"), chunk)
    sample = mean + std * rearrange(draws.posterior_noise, "b t z h w -> (b t) z h w")
    return scaling_factor * rearrange(sample, "(b t) z h w -> b t z h w", b=b)


def cached_latents(batch: LatentBatch, draws: Draws, *, scaling_factor: float) -> Tensor:
    """`target_latents` of clips whose posterior is known: the same numbers are drawn from it."""
    return scaling_factor * (batch.latents_mean.float() + batch.latents_std.float() * draws.posterior_noise)


def packed(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as int16: as small as half precision, and sixteen times as exact near 1."""
    return (_WHOLE * pixels).round().to(torch.int16)


def unpacked(first_frame: Tensor) -> Tensor:
    """The float32 pixels in [-1, 1] that `packed` was given, to 2e-5."""
    return first_frame.float() / _WHOLE


def image_latents(vae: Any, first_frame: Tensor, draws: Draws, *, chunk: int) -> Tensor:
    """Conditioning latents (b, z, h/f, w/f): posterior mode of first_frame (b, c, h, w) plus pixel noise, NOT scaled."""
    noisy = add_noise(first_frame, draws.pixel_noise, draws.noise_aug_strength)
    return posterior(vae, noisy, chunk)[0]


def image_embeds(image_encoder: nn.Module, first_frame: Tensor, clip: ClipPixels) -> Tensor:
    """CLIP embedding (b, d) of the clean first_frame (b, c, h, w) in [-1, 1]."""
    pixels = clip_pixels(first_frame, clip)
    with torch.autocast(pixels.device.type, enabled=False):
        return image_encoder(pixels.to(next(image_encoder.parameters()).dtype)).image_embeds.float()


def clip_pixels(first_frame: Tensor, clip: ClipPixels) -> Tensor:
    """(b, c, h, w) in [-1, 1] to (b, c, size, size), normalised, by the resize that diffusers' SVD pipeline uses.

    torch's antialiased bicubic differs from it by up to 0.3. The order (resize in [-1, 1], then shift) is the pipeline's.
    """
    resized = (resize_with_antialiasing(first_frame.float(), clip.size) + 1) / 2
    mean, std = (_on_device(values, resized).reshape(1, -1, 1, 1) for values in (clip.mean, clip.std))
    return (resized - mean) / std


def resize_with_antialiasing(images: Tensor, size: int) -> Tensor:
    """(b, c, h, w) to (b, c, size, size) as diffusers' `_resize_with_antialiasing` does, to the bit.

    Written out because theirs makes its kernel on the CPU: the copy to a GPU would wait for the GPU in every step.
    """
    sigmas = [max((side / size - 1) / 2, 0.001) for side in images.shape[-2:]]
    # Two standard deviations to each side, an odd number of taps, at least 3.
    taps = [int(max(4 * sigma, 3)) // 2 * 2 + 1 for sigma in sigmas]
    blurred = _gaussian_blur2d(images, taps, _on_device(sigmas, images)[None])
    return nn.functional.interpolate(blurred, size=(size, size), mode="bicubic", align_corners=True)


def _on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """(n,) float32 numbers filled in on the device of `like`, without a copy from the host."""
    return torch.stack([torch.full((), value, device=like.device) for value in values])


def added_time_ids(batch: Batch, draws: Draws) -> Tensor:
    """(b, 3) = [fps - 1, motion_bucket_id, noise_aug_strength], in that order (sgm svd.yaml; pipeline line 505)."""
    return torch.stack([batch.fps - 1, batch.motion_bucket, draws.noise_aug_strength], dim=1)


def unet_input(encoded: Encoded, batch: Batch, draws: Draws) -> UNetInput:
    """The UNet's arguments for a clip at the drawn noise level.

    CLIP token and conditioning latent are dropped independently, after their encoders; the time ids never are.
    """
    c = scalings(draws.sigma)
    noisy = add_noise(encoded.latents, draws.noise, draws.sigma)
    condition = encoded.image_latents * append_dims(draws.keep_image_latents, encoded.image_latents)
    token = encoded.image_embeds * append_dims(draws.keep_image_embeds, encoded.image_embeds)
    return UNetInput(
        sample=torch.cat(
            [append_dims(c.c_in, noisy) * noisy, repeat(condition, "b z h w -> b t z h w", t=noisy.shape[1])], dim=2
        ),
        timestep=c.c_noise,
        encoder_hidden_states=rearrange(token, "b d -> b 1 d"),
        added_time_ids=added_time_ids(batch, draws),
    )
