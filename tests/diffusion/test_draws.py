"""Randomness is a function of (seed, global sample number)."""

import math

import pytest
import torch

from svdtune.config.schema import Conditioning, Objective
from svdtune.contracts import ModelFacts, require, specs
from svdtune.contracts.svd import Draws
from svdtune.diffusion.draws import fixed_draws, make_draws

FACTS = ModelFacts(c=3, z=4, f=8, d=16, m=3, num_frames=5, clip_size=224, scaling_factor=0.2)
AXES = FACTS.axes(b=3, t=5, h=16, w=24)


def draws(samples, seed=0, axes=AXES, objective=None, conditioning=None):
    return make_draws(
        samples, axes, seed=seed, objective=objective or Objective(), conditioning=conditioning or Conditioning()
    )


def test_draws_keep_the_contract():
    require(draws([4, 9, 2]), AXES)


def test_a_sample_draws_the_same_in_any_batch_and_another_seed_differs():
    together, alone, other = draws([4, 9, 2]), draws([9]), draws([9], seed=1)
    for name in specs(Draws):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name)), name
    assert not torch.equal(alone.noise, other.noise)
    assert not torch.equal(alone.sigma, other.sigma)


def test_scalars_do_not_depend_on_the_clip_size():
    small, large = draws([7]), draws([7], axes=FACTS.axes(b=1, t=9, h=32, w=40))
    assert torch.equal(small.sigma, large.sigma)
    assert torch.equal(small.noise_aug_strength, large.noise_aug_strength)


def test_noises_are_independent_of_each_other_and_between_samples():
    drawn = draws(list(range(40)))
    flat = [drawn.noise.flatten(), drawn.posterior_noise.flatten(), torch.roll(drawn.noise, 1, 0).flatten()]
    correlation = torch.corrcoef(torch.stack(flat)) - torch.eye(3)
    assert correlation.abs().max() < 0.05
    pixel = drawn.pixel_noise
    pairs = [pixel.flatten(), torch.roll(pixel, 1, 0).flatten(), torch.roll(pixel, 2, 0).flatten()]
    assert (torch.corrcoef(torch.stack(pairs)) - torch.eye(3)).abs().max() < 0.05
    shared = min(pixel[0].numel(), drawn.noise[0].numel())
    across = [pixel.flatten(1)[:, :shared].flatten(), drawn.noise.flatten(1)[:, :shared].flatten()]
    assert abs(float(torch.corrcoef(torch.stack(across))[0, 1])) < 0.05


def test_sigma_is_log_normal_and_dropout_is_independent():
    tiny = FACTS.axes(b=1, t=1, h=8, w=8)
    drawn = draws(list(range(4000)), axes=tiny, conditioning=Conditioning(dropout=0.3))
    log_sigma, log_strength = drawn.sigma.log(), drawn.noise_aug_strength.log()
    assert float(log_sigma.mean()) == pytest.approx(1.0, abs=0.08)
    assert float(log_sigma.std()) == pytest.approx(1.6, abs=0.06)
    assert float(log_strength.mean()) == pytest.approx(-3.0, abs=0.03)
    assert float(log_strength.std()) == pytest.approx(0.5, abs=0.02)
    no_token, no_latent = drawn.keep_image_embeds == 0, drawn.keep_image_latents == 0
    assert float(no_token.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(no_latent.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float((no_token & no_latent).float().mean()) == pytest.approx(0.09, abs=0.02)


def test_fixed_draws_fix_what_validation_fixes():
    a = fixed_draws([5, 6], 2.0, AXES, seed=0, conditioning=Conditioning())
    b = fixed_draws([5, 6], 10.0, AXES, seed=0, conditioning=Conditioning())
    assert a.sigma.tolist() == [2.0, 2.0]
    assert torch.equal(a.noise, b.noise)
    assert a.keep_image_embeds.tolist() == a.keep_image_latents.tolist() == [1.0, 1.0]
    assert float(a.noise_aug_strength[0]) == pytest.approx(math.exp(-3))
