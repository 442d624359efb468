"""Mistakes of value, not of shape: no tensor changes its axes or dtype. For the checks of meaning; not counted among the rest."""

from __future__ import annotations

from tests.mutations.code_cases import CLIP, EMBEDS, IDS, IMAGE, INPUT, POSTERIOR, TARGET, _code
from tests.mutations.sandbox import Mutation

SEM = ("SEM", "NUM")


def _value(name: str, failure: str, target: str, *changes: tuple[str, str]) -> Mutation:
    return _code(name, "silent", failure, target, *changes, topic=SEM)


VALUE_MUTATIONS = [
    _value("fps itself instead of fps - 1", "M06", IDS, ("batch.fps - 1", "batch.fps")),
    _value("motion bucket before fps", "F31", IDS, ("batch.fps - 1, batch.motion_bucket", "batch.motion_bucket, batch.fps - 1")),
    _value("noise id zero while the frame is noised", "M11", IDS, ("draws.noise_aug_strength]", "draws.noise_aug_strength * 0]")),
    _value("ln of the noise strength as the id", "M11", IDS, ("draws.noise_aug_strength]", "draws.noise_aug_strength.log()]")),
    _value("conditioning latent scaled", "M10", IMAGE, ("return posterior(vae, noisy, chunk)[0]", "return 0.18215 * posterior(vae, noisy, chunk)[0]")),
    _value("conditioning latent is the deviation", "own", IMAGE, ("return posterior(vae, noisy, chunk)[0]", "return posterior(vae, noisy, chunk)[1]")),
    _value("conditioning frame not noised", "M11", IMAGE, ("return posterior(vae, noisy, chunk)[0]", "return posterior(vae, first_frame, chunk)[0]")),
    _value("noise strength of the first clip for all", "M11", IMAGE, ("draws.noise_aug_strength)", "draws.noise_aug_strength[:1])")),
    _value("target latents not scaled", "M10", TARGET, ("return scaling_factor * ", "return ")),
    _value("target latents divided by the factor", "M10", TARGET, ("return scaling_factor * ", "return 1 / scaling_factor * ")),
    _value("mean of the posterior for its sample", "own", TARGET, ("mean + std * ", "mean + 0 * std * ")),
    _value("clips and frames of the pixels mixed", "M21", TARGET, ('"b t c h w -> (b t) c h w"', '"b t c h w -> (t b) c h w"')),
    _value("clips and frames of the latents mixed", "M21", TARGET,
           ('rearrange(sample, "(b t) z h w -> b t z h w", b=b)', 'rearrange(sample, "(t b) z h w -> b t z h w", b=b)')),
    _value("blue and red swapped for the VAE", "F38", POSTERIOR, ("part.float()", "part.float().flip(1)")),
    _value("pixels in [0, 1] for the VAE", "F36", POSTERIOR, ("part.float()", "part.float() / 2 + 0.5")),
    _value("pixels in [-1, 1] for CLIP's statistics", "F38", CLIP, ("+ 1) / 2", "+ 0) / 1")),
    _value("CLIP statistics left out", "F36 F38", CLIP, ("return (resized - mean) / std", "return resized + 0 * mean * std")),
    _value("CLIP fed a resize without blur", "own", CLIP,
           ("resize_with_antialiasing(first_frame.float(), clip.size)", "nn.functional.interpolate(first_frame.float(), size=(clip.size, clip.size))")),
    _value("CLIP embedding of unit length", "own", EMBEDS,
           (".image_embeds.float()", ".image_embeds.float().renorm(2, 0, 1.0)")),
    _value("last frame as the condition", "own", "step.encode", ("batch.pixels[:, 0]", "batch.pixels[:, -1]")),
    _value("conditioning latent before the noisy latent", "own", INPUT,
           ("dim=2\n        )", "dim=2\n        ).roll(noisy.shape[2], dims=2)")),
    _value("c_in left out", "own", INPUT, ("append_dims(c.c_in, noisy) * noisy", "noisy")),
    _value("c_in on the conditioning latent too", "own", INPUT,
           ('repeat(condition, "b z h w -> b t z h w", t=noisy.shape[1])', 'append_dims(c.c_in, noisy) * repeat(condition, "b z h w -> b t z h w", t=noisy.shape[1])')),
    _value("sigma itself as the timestep", "F01", INPUT, ("timestep=c.c_noise", "timestep=draws.sigma")),
    _value("token and latent always dropped together", "own", INPUT,
           ("append_dims(draws.keep_image_latents,", "append_dims(draws.keep_image_embeds,")),
    _value("dropout turned round", "own", INPUT,
           ("append_dims(draws.keep_image_embeds, encoded.image_embeds)", "append_dims(1 - draws.keep_image_embeds, encoded.image_embeds)")),
    _value("ln sigma not divided by four", "F01", "edm.scalings", ("sigma.log() / 4", "sigma.log()")),
    _value("c_in of a variance without 1", "own", "edm.scalings", ("variance = sigma**2 + 1", "variance = sigma**2")),
    _value("v with the wrong sign", "own", "edm.v_target", ("noise - s * latents", "s * latents - noise")),
    _value("noise for the target", "F03", "edm.v_target", ("return (noise - s * latents) * (s**2 + 1).rsqrt()", "return noise + 0 * s")),
    _value("latents noised in place", "own", "edm.add_noise",
           ("return latents + append_dims(sigma, latents) * noise", "return latents.add_(append_dims(sigma, latents) * noise)")),
    _value("loss summed over clips", "own", "step.denoise", ("loss_per_clip.mean()", "loss_per_clip.sum()")),
    _value("latents of the clips in another order", "M21", "step.encode", ("    require(encoded, axes)", "    encoded.latents.copy_(encoded.latents.flip(0).clone())\n    require(encoded, axes)")),
    _value("one noise level for the whole batch", "M20", "edm.v_target", ("append_dims(sigma, latents)", "append_dims(sigma, latents)[:1]")),
]  # fmt: skip
