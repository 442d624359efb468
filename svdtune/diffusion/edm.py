"""EDM for SVD: v-prediction with sigma_data = 1 (Karras et al. 2022, arXiv 2206.00364; sgm denoiser_scaling.py:51-59).

sigma is float32 and one number per clip, shape (b,). Nothing here divides by sigma, so both ends of the range are safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor


@dataclass(frozen=True)
class Scalings:
    """c_skip, c_out, c_in, c_noise, each shaped like sigma (Karras et al. 2022, table 1; c_out is negative for v)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def scalings(sigma: Tensor) -> Scalings:
    """sgm's VScalingWithEDMcNoise: D = c_skip * x + c_out * F(c_in * x, c_noise)."""
    variance = sigma**2 + 1
    return Scalings(
        c_skip=1 / variance, c_out=-sigma * variance.rsqrt(), c_in=variance.rsqrt(), c_noise=sigma.log() / 4
    )


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = x0 + sigma * n; sigma (b,) broadcasts over the axes of latents (b, ...)."""
    return latents + append_dims(sigma, latents) * noise


def denoised(model_output: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """D = c_skip * x + c_out * F, the clean latents that the network's answer F (b, ...) means."""
    c = scalings(append_dims(sigma, noisy))
    return c.c_skip * noisy + c.c_out * model_output


def v_target(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """v = (n - sigma * x0) / sqrt(1 + sigma^2): what F must be for D to equal x0."""
    s = append_dims(sigma, latents)
    return (noise - s * latents) * (s**2 + 1).rsqrt()


def v_loss(model_output: Tensor, target: Tensor) -> Tensor:
    """mean((F - v)^2) per clip, shape (b,). Equals sgm's (1 + s^2) / s^2 * (D - x0)^2 without dividing by s."""
    return reduce((model_output - target) ** 2, "b ... -> b", "mean")


def append_dims(values: Tensor, like: Tensor) -> Tensor:
    """values (b,) viewed as (b, 1, ..., 1) with the axes of `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def log_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """exp(mean + std * normal): sigma of a standard normal draw."""
    return torch.exp(mean + std * normal)
