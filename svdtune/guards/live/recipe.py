"""The recipe of SVD from latents to the loss, written down a second time, against the records of the real step.

Sources: Karras et al. 2022 (arXiv 2206.00364) table 1 with sigma_data = 1, sgm 0ad7de9, diffusers' StableVideoDiffusionPipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from svdtune.config.schema import Config
from svdtune.contracts import Draws, StepResult
from svdtune.guards.live.observe import NAMES, Observed, condition
from svdtune.guards.live.relations import Relation, like
from svdtune.trainer.step import Parts

_ENDS = (0.002, 700.0)
"""The sampler's first and last noise level: two drawn ones hardly ever come near."""


def of_records(seen: Observed, parts: Parts, config: Config) -> Iterator[Relation]:
    """The records of one observed step."""
    yield from _told(seen, config)
    yield from _of_draws(seen, seen.draws, seen.result, parts)
    yield from _loss(seen)
    yield from _called(seen)


def of_other_draws(seen: Observed, parts: Parts) -> Iterator[Relation]:
    """The same clips with token and latent kept and dropped in all four ways, and at both ends of the noise levels."""
    ways = [
        {"keep_image_embeds": token, "keep_image_latents": latent} for token, latent in product((1.0, 0.0), repeat=2)
    ]
    for values in [*ways, *({"sigma": sigma} for sigma in _ENDS)]:
        changed = {name: torch.full_like(getattr(seen.draws, name), value) for name, value in values.items()}
        draws = replace(seen.draws, **changed)
        yield from _of_draws(seen, draws, condition(parts, seen.result.encoded, seen.batch, draws), parts)


def _told(seen: Observed, config: Config) -> Iterator[Relation]:
    """What the loader says of the clips."""
    why = "It is what the UNet is told of the clip."
    for name, option in (("fps", config.data.fps), ("motion_bucket", config.data.motion_bucket)):
        values: Tensor = getattr(seen.batch, name)
        expected = torch.full_like(values, float(option))
        yield Relation("SEM502", f"VideoBatch.{name}", values, expected, f"{option:g}, as in the configuration", why)


def _of_draws(seen: Observed, draws: Draws, result: StepResult, parts: Parts) -> Iterator[Relation]:
    """Everything that follows from the draws and the encoded clips alone."""
    sigma, record = draws.sigma, result.unet_input
    log = sigma.log()
    yield Relation(
        "SEM501", "UNetInput.timestep", record.timestep, log / 4, "ln(sigma) / 4",
        "The UNet was trained to read the noise level so: with another number it denoises for a level that is not there.",
        lambda: [("sigma itself", sigma), ("ln(sigma), not divided by 4", log), ("that of another clip", log.flip(0) / 4)],
    )  # fmt: skip
    yield from _ids(seen, draws, record.added_time_ids, parts)
    yield from _sample(draws, result)
    yield _token(draws, result)
    yield _target(draws, result)


def _ids(seen: Observed, draws: Draws, ids: Tensor, parts: Parts) -> Iterator[Relation]:
    fps, strength = seen.batch.fps, draws.noise_aug_strength
    columns = {"fps - 1": fps - 1, "motion_bucket_id": seen.batch.motion_bucket, "noise_aug_strength": strength}
    if parts.facts.m != len(columns):
        return
    others = {**columns, "fps itself": fps, "zero": fps * 0, "ln(noise_aug_strength)": strength.log(),
              "the strength of the first clip for all": strength[:1].expand_as(fps)}  # fmt: skip
    for number, (name, values) in enumerate(columns.items()):
        yield Relation(
            "SEM502", f"UNetInput.added_time_ids[:, {number}]", ids[:, number].float(), values, name,
            "Every id goes through the same embedding, so nothing fails when they are swapped or shifted: the model is told another speed, "
            "another motion or another noise than it sees. They are never dropped.",
            lambda name=name: [(text, value) for text, value in others.items() if text != name],
        )  # fmt: skip


def _sample(draws: Draws, result: StepResult) -> Iterator[Relation]:
    """Both halves of the UNet's sample."""
    encoded, sample, sigma = result.encoded, result.unet_input.sample, draws.sigma
    z = encoded.latents.shape[2]
    c_in = like((sigma**2 + 1).rsqrt(), sample)
    noisy = encoded.latents + like(sigma, sample) * draws.noise
    repeated = encoded.image_latents[:, None].expand(-1, sample.shape[1], -1, -1, -1)
    kept = like(draws.keep_image_latents, sample) * repeated
    yield Relation(
        "SEM504", "UNetInput.sample[:, :, :z]", sample[:, :, :z], c_in * noisy,
        "c_in * (latents + sigma * noise), c_in = 1 / sqrt(sigma^2 + 1)",
        "The UNet was trained on inputs of about unit size, noised once.",
        lambda: [("not multiplied by c_in", noisy), ("the conditioning latents: the halves are swapped", kept),
                 ("the latents without noise", encoded.latents), ("divided by sigma, not by sqrt(sigma^2 + 1)", noisy / like(sigma, noisy)),
                 ("noised by the level of the first clip", c_in * (encoded.latents + sigma[0] * draws.noise))],
    )  # fmt: skip
    yield Relation(
        "SEM505", "UNetInput.sample[:, :, z:]", sample[:, :, z:], kept,
        "the conditioning latent of each clip, repeated over its frames, zero where keep_image_latents is 0",
        "It is what the first frame of the video is taken from; at guidance the model is asked without it, so it must have learned both.",
        lambda: [("dropped by keep_image_embeds, the flag of the CLIP token", like(draws.keep_image_embeds, sample) * repeated),
                 ("never dropped", repeated), ("multiplied by c_in", c_in * kept), ("dropped where it should be kept", repeated - kept),
                 ("the noisy latents: the halves are swapped", c_in * noisy)],
    )  # fmt: skip


def _token(draws: Draws, result: StepResult) -> Relation:
    embeds, flag = result.encoded.image_embeds[:, None], draws.keep_image_embeds[:, None, None]
    return Relation(
        "SEM506", "UNetInput.encoder_hidden_states", result.unet_input.encoder_hidden_states, flag * embeds,
        "the CLIP embedding of each clip, zero where keep_image_embeds is 0",
        "At guidance the model is asked without it, so it must have learned both.",
        lambda: [("never dropped", embeds), ("dropped where it should be kept", (1 - flag) * embeds),
                 ("dropped by keep_image_latents, the flag of the conditioning latent", draws.keep_image_latents[:, None, None] * embeds)],
    )  # fmt: skip


def _target(draws: Draws, result: StepResult) -> Relation:
    x0, noise, sigma = result.encoded.latents, draws.noise, draws.sigma
    s = like(sigma, x0)
    v = (noise - s * x0) * (s**2 + 1).rsqrt()
    return Relation(
        "SEM503", "Prediction.target", result.prediction.target, v, "v = (noise - sigma * latents) / sqrt(1 + sigma^2)",
        "SVD predicts v. Towards another target the loss falls as nicely, and the videos fall apart.",
        lambda: [("v with the wrong sign", -v), ("the noise (epsilon)", noise), ("the clean latents", x0),
                 ("not divided by sqrt(1 + sigma^2)", noise - s * x0),
                 ("v at the level of the first clip", (noise - sigma[0] * x0) * (sigma[0] ** 2 + 1).rsqrt())],
    )  # fmt: skip


def _loss(seen: Observed) -> Iterator[Relation]:
    result, where = seen.result, "StepResult.loss"
    error = result.prediction.model_output.detach() - result.prediction.target
    each = error.square().flatten(1).mean(1, dtype=torch.float64).float()
    whole = each.mean()[None]
    yield Relation(
        "SEM507", f"{where}_per_clip", result.loss_per_clip.detach(), each, "the mean of (F - v)^2 of each clip",
        "The weight of noise levels against each other is in it.", lambda: [("the sum, not the mean", each * error[0].numel())],
    )  # fmt: skip
    yield Relation(
        "SEM507", where, result.loss.detach()[None], whole, "the mean over clips", "The learning rate is chosen for the mean.",
        lambda: [("the sum over clips", whole * len(each))],
    )  # fmt: skip
    yield Relation(
        "SEM507", f"{where} (its gradient)", seen.slope_of_loss, 2 * error / error.numel(), "d loss / dF = 2 (F - v) / n",
        "The loss is right and the gradient is not: the model would be pulled elsewhere, or nowhere.",
        lambda: [("zero: the answer is detached", error * 0)],
    )  # fmt: skip


def _called(seen: Observed) -> Iterator[Relation]:
    """The UNet gets what the record says."""
    why = "The record is right, and the network is called with something else."
    for name in NAMES:
        wanted: Tensor = getattr(seen.result.unet_input, name)
        actual = seen.heard.unet[0].get(name) if seen.heard.unet else None
        actual = wanted.new_zeros(0) if actual is None else actual
        expected = wanted.to(actual.dtype).float()
        turned = [("in another order", wanted.flip(-1).float())]
        yield Relation(
            "SEM513", f"UNet's argument {name}", actual.float(), expected, f"UNetInput.{name}", why, lambda t=turned: t
        )
