"""Everything random of a step, as a function of (seed, global sample number) and of nothing else.

So a resumed run, another rank or another number of ranks draws the same numbers for the same sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor

from svdtune.config.schema import Conditioning, Config, Objective
from svdtune.contracts import Axes, Batch, Draws, ModelFacts, specs
from svdtune.diffusion.edm import log_normal

TENSORS = ("noise", "posterior_noise", "pixel_noise")


def make_draws(
    samples: Sequence[int], axes: Axes, *, seed: int, objective: Objective, conditioning: Conditioning
) -> Draws:
    """Draws of the clips with these global sample numbers, float32 on the CPU; `axes` gives t, h, w, c, z and f."""
    rows = [_draw_one(generator(seed, sample), axes, objective, conditioning) for sample in samples]
    return Draws(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def draws_for(batch: Batch, facts: ModelFacts, config: Config) -> Draws:
    """What training draws for the clips of `batch`."""
    return make_draws(
        batch.sample.tolist(),
        batch.axes(facts),
        seed=config.run.seed,
        objective=config.objective,
        conditioning=config.conditioning,
    )


def fixed_draws(samples: Sequence[int], sigma: float, axes: Axes, *, seed: int, conditioning: Conditioning) -> Draws:
    """For held-out loss: this sigma for every clip, nothing dropped, median noise augmentation, noise fixed by sample."""
    drawn = make_draws(samples, axes, seed=seed, objective=Objective(), conditioning=conditioning)
    ones = torch.ones_like(drawn.sigma)
    strength = float(np.exp(conditioning.noise_aug[0]))
    return replace(
        drawn, sigma=ones * sigma, noise_aug_strength=ones * strength, keep_image_embeds=ones, keep_image_latents=ones
    )


def generator(seed: int, *key: int) -> Generator:
    """A CPU generator that depends on the seed and the key alone."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _draw_one(g: Generator, axes: Axes, objective: Objective, conditioning: Conditioning) -> dict[str, Tensor]:
    # Scalars first: they stay the same when the clip size changes.
    sigma, strength = torch.randn(2, generator=g)
    keep = (torch.rand(2, generator=g) >= conditioning.dropout).float()
    shapes = {name: spec.shape({**axes, "b": 1})[1:] for name, spec in specs(Draws).items() if name in TENSORS}
    return {
        "sigma": log_normal(sigma, objective.p_mean, objective.p_std),
        "noise_aug_strength": log_normal(strength, *conditioning.noise_aug),
        "keep_image_embeds": keep[0],
        "keep_image_latents": keep[1],
        **{name: torch.randn(shape, generator=g) for name, shape in shapes.items()},
    }
