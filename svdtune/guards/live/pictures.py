"""From pixels to latents and the CLIP token, written down a second time, against what the frozen networks were really given.

Sources: sgm 0ad7de9 (VAE unscaled for the condition, mode; scaled sample for the target), diffusers' pipeline (resize for CLIP).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from torch import Tensor

from svdtune.contracts import Batch, Draws, Encoded, LatentBatch
from svdtune.guards.live.observe import Observed
from svdtune.guards.live.relations import OFF_NETWORK, Relation, like
from svdtune.model.load import ModelParts
from svdtune.trainer.step import Parts, encode


@dataclass(frozen=True)
class Numbers:
    """What the model's own JSON says, read here and not taken from the step."""

    scaling_factor: float
    clip_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def numbers(model: ModelParts) -> Numbers:
    """From vae, image_encoder and feature_extractor."""
    configs = model.configs
    extractor = configs.feature_extractor
    size = int(configs.image_encoder["image_size"])
    return Numbers(
        float(configs.vae["scaling_factor"]), size, tuple(extractor["image_mean"]), tuple(extractor["image_std"])
    )


def of_networks(seen: Observed, own: Numbers) -> Iterator[Relation]:
    """What the VAE and the CLIP tower were given, and what was made of their answers."""
    if isinstance(seen.batch, LatentBatch):
        yield from _of_cached(seen, seen.batch, own)
        return
    pixels, draws, heard = seen.batch.pixels, seen.draws, seen.heard
    b, t = pixels.shape[:2]
    given, moments = _all(heard.vae_pixels, pixels), _all(heard.vae_moments, pixels)
    first = pixels[:, 0]
    noisy = first + like(draws.noise_aug_strength, first) * draws.pixel_noise
    yield _target_pixels(given[: b * t], pixels)
    yield _condition_pixels(given[b * t :], pixels, noisy, draws)
    if len(moments) == b * (t + 1):
        yield from _latents(seen.result.encoded, moments, draws, own)
    yield from _tower(seen, seen.batch.pixels, own, noisy)


def _of_cached(seen: Observed, batch: LatentBatch, own: Numbers) -> Iterator[Relation]:
    """With cached clips the VAE is given the noised first frame alone, and the CLIP tower nothing."""
    draws, heard, encoded = seen.draws, seen.heard, seen.result.encoded
    first = batch.first_frame.float()[:, None] / 32767
    noisy = first[:, 0] + like(draws.noise_aug_strength, first[:, 0]) * draws.pixel_noise
    yield _condition_pixels(_all(heard.vae_pixels, first), first, noisy, draws)
    pairs = zip(batch.latents_mean.float().flatten(0, 1), batch.latents_std.float().flatten(0, 1), strict=True)
    cached = [torch.cat([mean, 2 * std.clamp_min(1e-8).log()]) for mean, std in pairs]
    yield from _latents(encoded, torch.cat([torch.stack(cached), _all(heard.vae_moments, first)]), draws, own)
    yield Relation("SEM512", "Encoded.image_embeds", encoded.image_embeds, batch.image_embeds, "the cached embedding of each clip",
                   "SVD's cross-attention was trained on the embedding of the clip's own first frame.",
                   lambda: [("of the clips in another order", batch.image_embeds.flip(0))])  # fmt: skip


def of_encoding(parts: Parts, batch: Batch, draws: Draws, own: Numbers) -> Iterator[Relation]:
    """The real `encode` on the first two frames, without noise: the slope of target on condition, and what it must not depend on."""
    two = of_frames(batch, 2)
    quiet = replace(
        draws, noise_aug_strength=draws.noise_aug_strength * 0, posterior_noise=draws.posterior_noise[:, :2] * 0, noise=draws.noise[:, :2]
    )  # fmt: skip
    encoded = encode(parts, two, quiet)
    target, latent = encoded.latents[:, 0], encoded.image_latents
    slope = (target * latent).flatten(1).sum(1) / (latent**2).flatten(1).sum(1).clamp_min(1e-12)
    yield Relation(
        "SEM517", "slope of Encoded.latents[:, 0] on Encoded.image_latents", slope, torch.full_like(slope, own.scaling_factor),
        f"{own.scaling_factor:g}, the VAE's scaling_factor: the target is scaled, the condition is not, and both are the first frame",
        "Measured on your clips without noise, through the real encoding.",
        lambda: [(f"slope {', '.join(f'{value:.4g}' for value in slope.tolist())}", slope)], OFF_NETWORK,
    )  # fmt: skip
    zeros = {"keep_image_embeds": draws.keep_image_embeds * 0, "keep_image_latents": draws.keep_image_latents * 0}
    dropped = encode(parts, two, replace(quiet, **zeros))
    why = "What is dropped is dropped after the encoders: the embedding of an empty picture is not zero."
    for code, name in (("SEM512", "image_embeds"), ("SEM510", "image_latents")):
        kept, empty = getattr(encoded, name), getattr(dropped, name)
        yield Relation(
            code, f"Encoded.{name} where it is dropped", empty, kept, "as where it is kept", why, off=OFF_NETWORK
        )
    if isinstance(two, LatentBatch):
        return  # the embedding is the cached one
    mirrored = encode(parts, replace(two, pixels=two.pixels.flip(-1) * 0.5), quiet)
    same = torch.tensor([float(torch.equal(encoded.image_embeds, mirrored.image_embeds))])
    yield Relation("SEM512", "Encoded.image_embeds of another picture", same, same * 0, "another embedding", "Each clip has its own token.",
                   lambda: [("the same as of the first picture", same)])  # fmt: skip


def of_frames(batch: Batch, count: int) -> Batch:
    """The first frames of each clip."""
    if isinstance(batch, LatentBatch):
        return replace(
            batch, **{name: getattr(batch, name)[:, :count].contiguous() for name in ("latents_mean", "latents_std")}
        )
    return replace(batch, pixels=batch.pixels[:, :count].contiguous())


def _all(parts: list[Tensor], pixels: Tensor) -> Tensor:
    return torch.cat(parts).float() if parts else pixels.new_zeros(0)


def _target_pixels(given: Tensor, pixels: Tensor) -> Relation:
    frames = pixels.flatten(0, 1)
    return Relation(
        "SEM508", "VAE (target)", given, frames, "all frames of the batch, clip after clip, RGB in [-1, 1]",
        "The latents would be those of other pictures.",
        lambda: [("blue and red swapped", frames.flip(1)), ("pixels in [0, 1]", frames / 2 + 0.5),
                 ("frames of different clips taken for one clip", pixels.transpose(0, 1).flatten(0, 1)),
                 ("frames in reverse order", pixels.flip(1).flatten(0, 1)), ("bytes from 0 to 255", (frames + 1) * 127.5)],
    )  # fmt: skip


def _condition_pixels(given: Tensor, pixels: Tensor, noisy: Tensor, draws: Draws) -> Relation:
    first, last = pixels[:, 0], pixels[:, -1]
    return Relation(
        "SEM508", "VAE (condition)", given, noisy, "the first frame of each clip + noise_aug_strength * pixel_noise",
        "The conditioning latent would be that of another picture, or say less or more noise than the third time id.",
        lambda: [("the clean first frame", first), ("the last frame", last), ("the last frame, noised", last + noisy - first),
                 ("blue and red swapped", noisy.flip(1)), ("pixels in [0, 1]", noisy / 2 + 0.5), ("the noise alone", noisy - first),
                 ("the strength of the first clip for all", first + draws.noise_aug_strength[0] * draws.pixel_noise)],
    )  # fmt: skip


def _latents(encoded: Encoded, moments: Tensor, draws: Draws, own: Numbers) -> Iterator[Relation]:
    b, t = encoded.latents.shape[:2]
    mean, log_variance = moments.chunk(2, dim=1)
    std, factor = (0.5 * log_variance.clamp(-30, 20)).exp(), own.scaling_factor
    x = mean[: b * t].reshape(encoded.latents.shape)
    sample = x + std[: b * t].reshape(x.shape) * draws.posterior_noise
    yield Relation(
        "SEM509", "Encoded.latents", encoded.latents, factor * sample,
        f"scaling_factor ({factor:g}) * (mean + deviation * posterior_noise)", "The noise levels are made for latents of about unit size.",
        lambda: [("not multiplied by scaling_factor", sample), ("divided by scaling_factor", sample / factor),
                 ("the mean, not a sample", factor * x), ("of the clips in another order", factor * sample.flip(0)),
                 ("noised already", factor * sample + like(draws.sigma, sample) * draws.noise)],
    )  # fmt: skip
    mode = mean[b * t :]
    yield Relation(
        "SEM510", "Encoded.image_latents", encoded.image_latents, mode, "the mean of the posterior, not multiplied by scaling_factor",
        "SVD takes the conditioning latent unscaled, unlike the target: scaled, the model hardly sees its first frame.",
        lambda: [("multiplied by scaling_factor", factor * mode), ("divided by scaling_factor", mode / factor),
                 ("the deviation, not the mean", std[b * t :])],
    )  # fmt: skip


def _tower(seen: Observed, pixels: Tensor, own: Numbers, noisy: Tensor) -> Iterator[Relation]:
    """What the CLIP tower sees, by the pipeline's own resize."""
    heard = seen.heard
    mean, std = (pixels.new_tensor(values).reshape(1, -1, 1, 1) for values in (own.mean, own.std))

    def unit(picture: Tensor) -> Tensor:
        return (_resize_with_antialiasing(picture.float(), (own.clip_size, own.clip_size)) + 1) / 2

    clean = unit(pixels[:, 0])
    given = torch.cat(heard.clip_pixels) if heard.clip_pixels else pixels.new_zeros(0)
    yield Relation(
        "SEM511", "CLIP tower", given.float(), (clean - mean) / std,
        "the clean first frame, resized as diffusers' pipeline does, by CLIP's mean and deviation",
        "The tower was trained on such pictures; its token of others means something else.",
        lambda: [("not normalised by CLIP's mean and deviation", clean),
                 ("normalised from [-1, 1], not from [0, 1]", (2 * clean - 1 - mean) / std),
                 ("blue and red swapped", (clean.flip(1) - mean) / std), ("mean and deviation exchanged", (clean - std) / mean),
                 ("the noised first frame", (unit(noisy) - mean) / std), ("the last frame", (unit(pixels[:, -1]) - mean) / std)],
        max(OFF_NETWORK, 4 * torch.finfo(given.dtype).eps),
    )  # fmt: skip
    embeds = _all(heard.image_embeds, pixels)
    yield Relation(
        "SEM512", "Encoded.image_embeds", seen.result.encoded.image_embeds, embeds, "image_embeds, the tower's projection, as it is",
        "SVD's cross-attention was trained on the projected embedding, neither normalised nor taken from a layer before.",
        lambda: [("scaled to unit length", embeds.renorm(2, 0, 1.0))] if embeds.dim() == 2 else [],
    )  # fmt: skip
