"""What the numbers of a step must have to do with each other, written down a second time from the papers and the pipeline.

Sources: Karras et al. 2022 (arXiv 2206.00364) table 1 with sigma_data = 1, sgm 0ad7de9, diffusers' StableVideoDiffusionPipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from torch import Tensor

from svdtune.config.schema import Config
from svdtune.contracts import Draws, StepResult, VideoBatch
from svdtune.guards.findings import Finding
from svdtune.guards.live.observe import NAMES, Observed, condition
from svdtune.trainer.step import Parts, encode

_OFF, _OFF_NETWORK = 1e-4, 1e-2
"""Of the largest value: rounding in float32 is a hundred times smaller, every known mistake much larger. A convolution may use TF32, and
other kernels for other sizes."""
_SMALL = 1e-3
"""Values below are as good as zero: nothing is divided by them."""


@dataclass(frozen=True)
class Relation:
    """`actual` should be `expected`; both (rows, ...), compared row by row."""

    code: str
    where: str
    actual: Tensor
    expected: Tensor
    words: str
    """What is expected."""
    why: str
    mistakes: Sequence[tuple[str, Tensor]] = ()
    """What it would be under a known mistake, to name it."""
    off: float = _OFF


def broken(relations: Iterator[Relation]) -> Iterator[Finding]:
    """A finding for each relation that does not hold."""
    for r in relations:
        if r.actual.shape != r.expected.shape:
            got = f"shape {list(r.actual.shape)}, expected {list(r.expected.shape)}"
        elif not bool(r.actual.isfinite().all()):
            got = "values that are not finite"
        elif (off := distance(r.actual, r.expected)) > r.off:
            named = [text for text, value in r.mistakes
                     if value.shape == r.actual.shape and distance(r.actual, value) <= r.off]  # fmt: skip
            got = named[0] if named else f"values off by up to {off:.2g} of the largest"
        else:
            continue
        yield Finding(
            r.code,
            "error",
            r.where,
            got,
            r.words,
            r.why,
            "Mend the line that makes it: this is the real step of training.",
        )


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference in units of the largest value, of the worst row; 0 for rows that are the same."""
    one, other = one.double().reshape(len(one), -1), other.double().reshape(len(other), -1)
    size = other.abs().amax(1).clamp_min(_SMALL)
    return float(((one - other).abs().amax(1) / size).max().nan_to_num(torch.inf))


def of_step(seen: Observed, parts: Parts, config: Config) -> Iterator[Relation]:
    """All relations of one observed step."""
    yield from _embeddings(seen, parts, config)
    yield from of_condition(seen, seen.result)
    yield from _objective(seen)
    yield from _encoded(seen, parts)
    yield from _called(seen)


def of_dropout(seen: Observed, parts: Parts) -> Iterator[Relation]:
    """Token and latent of the same clips, kept and dropped in all four ways."""
    for token, latent in product((1.0, 0.0), repeat=2):
        flags = {"keep_image_embeds": token, "keep_image_latents": latent}
        draws = _with(seen, **flags)
        result = condition(parts, seen.result.encoded, seen.batch, draws)
        said = ", ".join(f"{name}={value:g}" for name, value in flags.items())
        yield from of_condition(
            Observed(seen.batch, draws, result, seen.heard, seen.slope_of_loss, seen.dtypes), result, f" ({said})"
        )


def _with(seen: Observed, **values: float):
    return replace(
        seen.draws, **{name: torch.full_like(getattr(seen.draws, name), value) for name, value in values.items()}
    )


def _embeddings(seen: Observed, parts: Parts, config: Config) -> Iterator[Relation]:
    sigma, given, record = seen.draws.sigma, seen.batch, seen.result.unet_input
    yield Relation(
        "SEM501", "UNetInput.timestep", record.timestep, sigma.log() / 4, "ln(sigma) / 4",
        "The UNet was trained to read the noise level so: with another number it denoises for a level that is not there.",
        [("sigma itself", sigma), ("ln(sigma), not divided by 4", sigma.log()), ("ln(sigma) / 4 of the clips in another order",
        (sigma.log() / 4).flip(0))],
    )  # fmt: skip
    made = {
        "VideoBatch.fps": (given.fps, config.data.fps),
        "VideoBatch.motion_bucket": (given.motion_bucket, config.data.motion_bucket),
    }
    for where, (values, option) in made.items():
        yield Relation("SEM502", where, values, torch.full_like(values, float(option)), f"{option:g}, as in the configuration",
                       "It is what the UNet is told of the clip.")  # fmt: skip
    columns = {
        "fps - 1": given.fps - 1,
        "motion_bucket_id": given.motion_bucket,
        "noise_aug_strength": seen.draws.noise_aug_strength,
    }
    others = {**columns, "fps itself": given.fps, "ln of the strength": seen.draws.noise_aug_strength.log(), "zero": given.fps * 0,
              "the strength of the first clip for all": seen.draws.noise_aug_strength[:1].expand_as(given.fps)}  # fmt: skip
    if parts.facts.m != len(columns):
        return
    for number, (name, values) in enumerate(columns.items()):
        yield Relation(
            "SEM502", f"UNetInput.added_time_ids[:, {number}]", record.added_time_ids[:, number].float(), values, name,
            "Every id goes through the same embedding, so nothing fails when they are swapped or shifted: the model is told another speed, "
            "another motion or another noise than it sees.",
            [(text, value.float()) for text, value in others.items() if text != name],
        )  # fmt: skip


def of_condition(seen: Observed, result: StepResult, when: str = "") -> Iterator[Relation]:
    """Both halves of the UNet's sample, and the token."""
    draws, encoded, sample = seen.draws, result.encoded, result.unet_input.sample
    z = encoded.latents.shape[2]
    noisy, c_in = (
        encoded.latents + _like(draws.sigma, encoded.latents) * draws.noise,
        _like((draws.sigma**2 + 1).rsqrt(), sample),
    )
    repeated = encoded.image_latents[:, None].expand(-1, sample.shape[1], -1, -1, -1)
    kept = _like(draws.keep_image_latents, sample) * repeated
    yield Relation(
        "SEM504", f"UNetInput.sample[:, :, :z]{when}", sample[:, :, :z], c_in * noisy,
        "c_in * (latents + sigma * noise), c_in = 1 / sqrt(sigma^2 + 1)",
        "The UNet was trained on inputs of about unit size, noised once.",
        [("not multiplied by c_in", noisy), ("the conditioning latents: the halves are swapped", kept), ("the latents without noise",
        encoded.latents),
         ("divided by sigma, not by sqrt(sigma^2 + 1)", noisy / _like(draws.sigma, noisy)),
         ("noised by the level of the first clip", c_in * (encoded.latents + draws.sigma[0] * draws.noise))],
    )  # fmt: skip
    yield Relation(
        "SEM505", f"UNetInput.sample[:, :, z:]{when}", sample[:, :, z:], kept,
        "the conditioning latent of each clip, repeated over its frames, zero where keep_image_latents is 0",
        "It is what the first frame of the video is taken from; at guidance the model is asked without it, so it must have learned both.",
        [("dropped by keep_image_embeds, the flag of the CLIP token", _like(draws.keep_image_embeds, sample) * repeated),
        ("never dropped", repeated),
         ("multiplied by c_in", c_in * kept), ("the noisy latents: the halves are swapped", c_in * noisy),
         ("dropped where it should be kept", repeated - kept)],
    )  # fmt: skip
    embeds, flag = encoded.image_embeds[:, None], draws.keep_image_embeds[:, None, None]
    yield Relation(
        "SEM506", f"UNetInput.encoder_hidden_states{when}", result.unet_input.encoder_hidden_states, flag * embeds,
        "the CLIP embedding of each clip, zero where keep_image_embeds is 0",
        "At guidance the model is asked without it, so it must have learned both.",
        [("never dropped", embeds), ("dropped where it should be kept", (1 - flag) * embeds),
         ("dropped by keep_image_latents, the flag of the conditioning latent", draws.keep_image_latents[:, None, None] * embeds)],
    )  # fmt: skip


def _objective(seen: Observed) -> Iterator[Relation]:
    sigma, result, noise = seen.draws.sigma, seen.result, seen.draws.noise
    x0, output, target = result.encoded.latents, result.prediction.model_output.detach(), result.prediction.target
    s = _like(sigma, x0)
    v = (noise - s * x0) * (s**2 + 1).rsqrt()
    yield Relation(
        "SEM503", "Prediction.target", target, v, "v = (noise - sigma * latents) / sqrt(1 + sigma^2)",
        "SVD predicts v. Towards another target the loss falls as nicely, and the videos fall apart.",
        [("v with the wrong sign", -v), ("the noise (epsilon)", noise), ("the clean latents", x0), ("not divided by sqrt(1 + sigma^2)",
        noise - s * x0),
         ("v at the level of the first clip", (noise - sigma[0] * x0) * (sigma[0] ** 2 + 1).rsqrt())],
    )  # fmt: skip
    error = output - target
    per_clip = error.double().pow(2).flatten(1).mean(1)
    yield Relation(
        "SEM507", "StepResult.loss_per_clip", result.loss_per_clip.detach(), per_clip.float(), "the mean of (F - v)^2 of each clip",
        "The weight of noise levels against each other is in it.", [("the sum, not the mean", per_clip.float() * error[0].numel())],
    )  # fmt: skip
    yield Relation(
        "SEM507", "StepResult.loss", result.loss.detach()[None], per_clip.mean().float()[None], "the mean over clips",
        "The learning rate is chosen for the mean.", [("the sum over clips", per_clip.sum().float()[None])],
    )  # fmt: skip
    yield Relation(
        "SEM507", "StepResult.loss (its gradient)", seen.slope_of_loss, 2 * error / error.numel(), "d loss / dF = 2 (F - v) / n",
        "The loss is right and the gradient is not: the model would be pulled elsewhere, or nowhere.", [("zero: the answer is detached",
        error * 0)],
    )  # fmt: skip


def _encoded(seen: Observed, parts: Parts) -> Iterator[Relation]:
    pixels, draws, encoded, heard = seen.batch.pixels, seen.draws, seen.result.encoded, seen.heard
    b, t = pixels.shape[:2]
    given = torch.cat(heard.vae_pixels).float() if heard.vae_pixels else pixels.new_zeros(0)
    moments = torch.cat(heard.vae_moments).float() if heard.vae_moments else pixels.new_zeros(0)
    first, count = pixels[:, 0], b * (t + 1)
    noisy = first + _like(draws.noise_aug_strength, first) * draws.pixel_noise
    frames = pixels.flatten(0, 1)
    yield Relation(
        "SEM508", "VAE (target)", given[: b * t], frames, "all frames of the batch, clip after clip, RGB in [-1, 1]",
        "The latents would be those of other pictures.",
        [("blue and red swapped", frames.flip(1)), ("pixels in [0, 1]", frames / 2 + 0.5), ("frames of different clips taken for one clip",
          pixels.transpose(0, 1).flatten(0, 1)), ("frames in reverse order", pixels.flip(1).flatten(0, 1)), ("bytes from 0 to 255",
          (frames + 1) * 127.5)],
    )  # fmt: skip
    yield Relation(
        "SEM508", "VAE (condition)", given[b * t : count], noisy, "the first frame of each clip + noise_aug_strength * pixel_noise",
        "The conditioning latent would be that of another picture, or say less or more noise than the third time id.",
        [("the clean first frame", first), ("the last frame", pixels[:, -1]), ("blue and red swapped", noisy.flip(1)),
        ("pixels in [0, 1]", noisy / 2 + 0.5),
         ("the strength of the first clip for all", first + draws.noise_aug_strength[0] * draws.pixel_noise), ("the noise alone",
         noisy - first),
         ("the last frame, noised", pixels[:, -1] + noisy - first)],
    )  # fmt: skip
    if len(moments) != count:
        return  # said by the two above
    mean, log_variance = moments.chunk(2, dim=1)
    std = (0.5 * log_variance.clamp(-30, 20)).exp()
    wide = encoded.latents.shape
    x_mean, sample = (
        mean[: b * t].reshape(wide),
        (mean + 0)[: b * t].reshape(wide) + std[: b * t].reshape(wide) * draws.posterior_noise,
    )
    factor = parts.facts.scaling_factor
    yield Relation(
        "SEM509", "Encoded.latents", encoded.latents, factor * sample,
        f"scaling_factor ({factor:g}) * (mean + deviation * posterior_noise)",
        "The noise levels are made for latents of about unit size.",
        [("not multiplied by scaling_factor", sample), ("divided by scaling_factor", sample / factor), ("the mean, not a sample",
        factor * x_mean),
         ("of the clips in another order", factor * sample.flip(0)), ("noised already", factor * sample + _like(draws.sigma,
         sample) * draws.noise)],
    )  # fmt: skip
    mode = mean[b * t :]
    yield Relation(
        "SEM510", "Encoded.image_latents", encoded.image_latents, mode, "the mean of the posterior, not multiplied by scaling_factor",
        "SVD takes the conditioning latent unscaled, unlike the target: scaled, the model hardly sees its first frame.",
        [("multiplied by scaling_factor", factor * mode), ("divided by scaling_factor", mode / factor), ("the deviation, not the mean",
        std[b * t :])],
    )  # fmt: skip
    yield from _tower(seen, parts)


def _tower(seen: Observed, parts: Parts) -> Iterator[Relation]:
    """What the CLIP tower sees, by the pipeline's own resize."""
    clip, heard, first = parts.clip, seen.heard, seen.batch.pixels[:, 0]
    mean, std = (first.new_tensor(values).reshape(1, -1, 1, 1) for values in (clip.mean, clip.std))
    resized = (_resize_with_antialiasing(first.float(), (clip.size, clip.size)) + 1) / 2
    given = torch.cat(heard.clip_pixels) if heard.clip_pixels else first.new_zeros(0)
    coarse = torch.finfo(given.dtype).eps * 4
    noisy = first + _like(seen.draws.noise_aug_strength, first) * seen.draws.pixel_noise
    other = {"the noised first frame": noisy, "the last frame": seen.batch.pixels[:, -1]}
    pictures = {
        text: ((_resize_with_antialiasing(p.float(), (clip.size, clip.size)) + 1) / 2 - mean) / std
        for text, p in other.items()
    }
    wanted = (resized - mean) / std
    yield Relation(
        "SEM511", "CLIP tower", given.float(), wanted,
        "the clean first frame, resized as diffusers' pipeline does, by CLIP's mean and deviation",
        "The tower was trained on such pictures; its token of others means something else.",
        [("not normalised by CLIP's mean and deviation", resized), ("normalised from [-1, 1], not from [0, 1]",
        (2 * resized - 1 - mean) / std),
         ("blue and red swapped", (resized.flip(1) - mean) / std), *pictures.items()], max(_OFF_NETWORK, coarse),
    )  # fmt: skip
    embeds = torch.cat(heard.image_embeds).float() if heard.image_embeds else first.new_zeros(0)
    yield Relation("SEM512", "Encoded.image_embeds", seen.result.encoded.image_embeds, embeds,
        "image_embeds, the tower's projection, as it is",
                   "SVD's cross-attention was trained on the projected embedding, neither normalised nor taken from a layer before.",
                   [("scaled to unit length", embeds.renorm(2, 0, 1.0))] if embeds.dim() == 2 else [])  # fmt: skip


def _called(seen: Observed) -> Iterator[Relation]:
    """SEM513: the UNet gets what the record says."""
    record = seen.result.unet_input
    for name in NAMES:
        wanted = getattr(record, name)
        for arguments in seen.heard.unet[:1]:
            actual = arguments.get(name)
            actual = wanted.new_zeros(0) if actual is None else actual
            yield Relation("SEM513", f"UNet's argument {name}", actual.float(), wanted.to(actual.dtype).float(), f"UNetInput.{name}",
                           "The record is right, and the network is called with something else.",
                           [("in another order", wanted.flip(-1).float())])  # fmt: skip


def _like(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def check_slope(parts: Parts, batch: VideoBatch, draws: Draws) -> Iterator[Finding]:
    """SEM517: without any noise the first target frame is scaling_factor times the conditioning latent, through the real `encode`."""
    two = replace(batch, pixels=batch.pixels[:, :2].contiguous())
    quiet = {
        "noise_aug_strength": draws.noise_aug_strength * 0,
        "posterior_noise": draws.posterior_noise[:, :2] * 0,
        "noise": draws.noise[:, :2],
    }
    encoded = encode(parts, two, replace(draws, **quiet))
    target, condition_ = encoded.latents[:, 0].double().flatten(1), encoded.image_latents.double().flatten(1)
    slope = (target * condition_).sum(1) / (condition_**2).sum(1).clamp_min(1e-12)
    factor, off = parts.facts.scaling_factor, distance(target, parts.facts.scaling_factor * condition_)
    if off > _OFF_NETWORK:
        yield Finding(
            "SEM517", "error", "Encoded.latents[:, 0] against Encoded.image_latents",
            f"slope {', '.join(f'{value:.4g}' for value in slope.tolist())}",
            f"{factor:g}, the VAE's scaling_factor: the target is scaled, the condition is not, and both are the first frame",
            "It is measured on your clips without noise, through the real encoding.", "Mend svdtune/diffusion/conditioning.py.",
        )  # fmt: skip
