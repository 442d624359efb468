"""The loop that most people fine-tune SVD with, in our words: one script, everything encoded live, nothing compiled.

Written from what such scripts do, not copied: frozen VAE and CLIP in half precision encode each clip as it comes, all its frames at
once; the UNet is float32 under autocast with diffusers' own checkpointing flag; AdamW is torch's default, unfused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from updates import random_model, record

from svdtune.config.schema import Config
from svdtune.contracts import Draws, VideoBatch
from svdtune.diffusion import edm
from svdtune.diffusion.conditioning import clip_pixels as clip_view
from svdtune.model.adapt import adapt
from svdtune.trainer.build import clip_pixels


def usual_update(config: Config, where: torch.device) -> Callable[[], None]:
    """One update of the trained set that `config.adapt` names, on one random clip for each of `train.batch_size`."""
    model: Any = random_model(config, where)
    half = torch.float16 if where.type == "cuda" else torch.float32
    vae, tower, unet = model.vae.to(half), model.image_encoder.to(half), model.unet
    trained = list(adapt(unet, config.adapt, dtype=half, seed=0).values())
    unet.to(where).train()
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=config.train.lr)
    data, facts, view = config.data, model.facts, clip_pixels(model)
    axes = facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)
    batch, draws = record(VideoBatch, axes, where), record(Draws, axes, where)
    autocast = torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == "cuda")

    def encode(frames: torch.Tensor) -> Any:
        return vae.encode(frames.to(half)).latent_dist

    def update() -> None:
        pixels = batch.pixels
        clips, frames = pixels.shape[:2]
        with torch.no_grad():
            latents = encode(pixels.flatten(0, 1)).sample().float() * facts.scaling_factor
            latents = latents.unflatten(0, (clips, frames))
            noisy_frame = edm.add_noise(pixels[:, 0], draws.pixel_noise, draws.noise_aug_strength)
            condition = encode(noisy_frame).mode().float()
            token = tower(clip_view(pixels[:, 0], view).to(half)).image_embeds[:, None]
        noisy = edm.add_noise(latents, draws.noise, draws.sigma)
        c = edm.scalings(edm.append_dims(draws.sigma, noisy))
        ids = torch.stack([batch.fps - 1, batch.motion_bucket, draws.noise_aug_strength], dim=1)
        with autocast:
            sample = torch.cat([c.c_in * noisy, condition[:, None].expand(-1, frames, -1, -1, -1)], dim=2)
            output = unet(sample, draws.sigma.log() / 4, encoder_hidden_states=token.float(), added_time_ids=ids)[0]
        clean = edm.denoised(output.float(), noisy, draws.sigma)
        weight = (1 + draws.sigma**2) / draws.sigma**2
        loss = (edm.append_dims(weight, clean) * (clean - latents) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update
