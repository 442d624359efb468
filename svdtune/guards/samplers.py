"""What the draws are like over thousands of samples: seen on the sampler, never on a batch, where chance is large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import erf, sqrt

import torch
from torch import Tensor

from svdtune.config.schema import Config
from svdtune.contracts import Draws, ModelFacts
from svdtune.diffusion.draws import make_draws
from svdtune.guards.findings import Finding

COUNT = 8000
_CLIPS, _FRAMES, _LATENTS = 48, 4, 4
"""Samples, frames, and latents a side, in which neighbours are compared."""
_AXES = ("frames", "channels", "height", "width")
_SURE = 6.0
"""Standard deviations: sound draws pass it once in 500 million, and the same seed gives the same draws."""
_CHANCE = 40
"""Pairs of equal float32 numbers that come by chance."""
_TAIL = 2.5
"""A truncated normal is seen in its tails: 0.6 % of the draws lie beyond each, 50 of 8,000."""


@dataclass(frozen=True)
class _Normal:
    where: str
    values: Tensor
    mean: float
    std: float
    keys: str


def check_samplers(config: Config, facts: ModelFacts) -> list[Finding]:
    """SEM514 to SEM516, from 8,000 samples of this seed at the smallest size."""
    axes = facts.axes(b=1, t=1, h=facts.f, w=facts.f)
    drawn = make_draws(
        range(COUNT), axes, seed=config.run.seed, objective=config.objective, conditioning=config.conditioning
    )
    noise_aug = config.conditioning.noise_aug
    normals = (
        _Normal(
            "Draws.sigma",
            drawn.sigma.log(),
            config.objective.p_mean,
            config.objective.p_std,
            "objective.p_mean, objective.p_std",
        ),
        _Normal("Draws.noise_aug_strength", drawn.noise_aug_strength.log(), *noise_aug, "conditioning.noise_aug"),
    )
    told = [*(f for normal in normals for f in _normal(normal)), *_dropout(config, drawn), *_noise(drawn)]
    return [*told, *_structure(config, facts)]


def _normal(n: _Normal) -> Iterator[Finding]:
    """SEM515: ln(values) ~ N(mean, std^2): middle, width and both tails."""
    why = "Noise levels that are never drawn are never learned, and the sampler starts from them (sigma 700): videos stay noise or grey."
    expected = f"ln ~ N({n.mean:g}, {n.std:g}^2), from {n.keys}"
    if n.std == 0:
        off = float((n.values - n.mean).abs().max())
        if off > 1e-3:
            yield Finding(
                "SEM515", "error", n.where, f"ln differs from {n.mean:g} by up to {off:.2g}", expected, why, _DRAW
            )
        return
    scaled = (n.values.double() - n.mean) / n.std
    mean, std = float(scaled.mean()), float(scaled.std())
    beyond = (1 - erf(_TAIL / sqrt(2))) / 2 * COUNT
    tails = int((scaled < -_TAIL).sum()), int((scaled > _TAIL).sum())
    told = []
    if abs(mean) > _SURE / sqrt(COUNT) or abs(std - 1) > _SURE / sqrt(2 * COUNT):
        told.append(f"ln ~ N({n.mean + mean * n.std:.3g}, {std * n.std:.3g}^2)")
    if any(abs(count - beyond) > _SURE * sqrt(beyond) for count in tails):
        low, high = float(n.values.min()), float(n.values.max())
        told.append(f"ln ends at {low:.3g} and {high:.3g}: {tails[0]} and {tails[1]} of {COUNT} lie {_TAIL:g} deviations out, "
                    f"{beyond:.0f} each are due; it is truncated or of another shape")  # fmt: skip
    if told:
        yield Finding("SEM515", "error", n.where, "; ".join(told), expected, why, _DRAW)


_DRAW = "Draw it in svdtune/diffusion/draws.py as exp(mean + std * normal), nothing clamped."


def _dropout(config: Config, drawn: Draws) -> Iterator[Finding]:
    """SEM516: each dropped with its probability, both together with its square."""
    p = config.conditioning.dropout
    for name in ("keep_image_embeds", "keep_image_latents"):
        strange = sorted(set(getattr(drawn, name).tolist()) - {0.0, 1.0})
        if strange:
            why = "It multiplies token or latent: the model would be trained on other values than it is asked with."
            yield Finding(
                "SEM516", "error", f"Draws.{name}", f"the value {strange[0]:g}", "1 (kept) or 0 (dropped)", why
            )
    token, latent = drawn.keep_image_embeds == 0, drawn.keep_image_latents == 0
    cases = {
        "CLIP token dropped": (token, p),
        "conditioning latent dropped": (latent, p),
        "both dropped": (token & latent, p * p),
    }
    for name, (happened, due) in cases.items():
        count, spread = int(happened.sum()), sqrt(COUNT * due * (1 - due))
        if abs(count - COUNT * due) > max(_SURE * spread, 0.5):
            yield Finding(
                "SEM516", "error", f"Draws: {name}", f"{count} of {COUNT} draws ({count / COUNT:.2%})",
                f"{due:.2%}, from conditioning.dropout={p:g}",
                "Guidance asks the model without token and latent at once; a branch that is never trained answers noise, one that is "
                "always "
                "trained forgets its picture.", "Draw both flags independently of each other (svdtune/diffusion/draws.py).",
            )  # fmt: skip


def _noise(drawn: Draws) -> Iterator[Finding]:
    """SEM514: standard normal, and independent of each other and of the sample before."""
    noises = {
        name: getattr(drawn, name).flatten(1)[:, 0].double() for name in ("noise", "posterior_noise", "pixel_noise")
    }
    noises |= {"ln(sigma)": _unit(drawn.sigma.log()), "ln(noise_aug_strength)": _unit(drawn.noise_aug_strength.log())}
    names = list(noises)
    if (different := len(torch.unique(drawn.noise.flatten(1)[:, 0]))) < COUNT - _CHANCE:
        yield _dependent(
            "Draws.noise", f"{different} different first numbers in {COUNT} samples", "new noise for every sample"
        )
    for number, name in enumerate(names):
        value = noises[name]
        if number < 3 and (
            abs(float(value.mean())) > _SURE / sqrt(COUNT) or abs(float(value.std()) - 1) > _SURE / sqrt(2 * COUNT)
        ):
            yield _dependent(f"Draws.{name}", f"N({float(value.mean()):.2g}, {float(value.std()):.2g}^2)", "N(0, 1)")
        pairs = {**{f"{name} and {other}": (value, noises[other]) for other in names[number + 1 :]},
                 f"{name} of neighbouring samples": (value[1:], value[:-1])}  # fmt: skip
        for pair, (one, other) in pairs.items():
            if abs(together := float((one * other).mean())) > _SURE / sqrt(len(one)):
                yield _dependent(f"Draws: {pair}", f"correlation {together:.2g}", "independent numbers")


def _structure(config: Config, facts: ModelFacts) -> Iterator[Finding]:
    """SEM514 inside one clip: every number of its own, along frames, channels, height and width."""
    side = facts.f * _LATENTS
    axes = facts.axes(b=1, t=_FRAMES, h=side, w=side)
    drawn = make_draws(
        range(_CLIPS), axes, seed=config.run.seed, objective=config.objective, conditioning=config.conditioning
    )
    for name in ("noise", "posterior_noise", "pixel_noise"):
        noise = getattr(drawn, name).double()
        sure = _SURE / sqrt(noise.numel())
        if abs(float(noise.mean())) > sure or abs(float(noise.std()) - 1) > sure:
            yield _dependent(f"Draws.{name}", f"N({float(noise.mean()):.2g}, {float(noise.std()):.2g}^2)", "N(0, 1)")
        for axis, along in zip(range(1, noise.dim()), _AXES[-(noise.dim() - 1) :], strict=True):
            together = float(
                (noise.narrow(axis, 1, noise.shape[axis] - 1) * noise.narrow(axis, 0, noise.shape[axis] - 1)).mean()
            )
            if abs(together) > 2 * sure:
                yield _dependent(
                    f"Draws.{name} of neighbours along the {along}",
                    f"correlation {together:.2g}",
                    "independent numbers",
                )


def _unit(values: Tensor) -> Tensor:
    values = values.double() - values.double().mean()
    return values / values.std().clamp_min(torch.finfo(torch.float32).tiny)


def _dependent(where: str, got: str, expected: str) -> Finding:
    why = "The mathematics of the objective holds for independent standard normal noise; the sampler starts from it."
    return Finding(
        "SEM514",
        "error",
        where,
        got,
        expected,
        why,
        "Draw each from the generator of its own sample, one after the other.",
    )
