"""The numbers of the recipe against the original implementation and against diffusers' sampler."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from svdtune.diffusion import edm
from svdtune.model.facts import PACKAGE

GOLDEN = json.loads((Path(__file__).parents[1] / "assets" / "edm_golden.json").read_text())
SIGMA = torch.tensor(GOLDEN["sigma"], dtype=torch.float64)


@pytest.mark.parametrize("name", ["c_skip", "c_out", "c_in", "c_noise"])
def test_scalings_equal_the_original(name):
    torch.testing.assert_close(
        getattr(edm.scalings(SIGMA), name), torch.tensor(GOLDEN[name], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ["c_skip", "c_out", "c_in", "c_noise"])
def test_scalings_in_float32_are_good_to_1e_6(name):
    got = getattr(edm.scalings(SIGMA.float()), name).double()
    torch.testing.assert_close(got, torch.tensor(GOLDEN[name], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def toy(dtype):
    values = {key: torch.tensor(value, dtype=dtype) for key, value in GOLDEN["toy"].items() if key != "shape"}
    shape = GOLDEN["toy"]["shape"]
    return {key: v.reshape(shape) if v.numel() > shape[0] else v for key, v in values.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_denoised_and_loss_equal_the_original(dtype, tolerance):
    t = toy(dtype)
    noisy = edm.add_noise(t["x0"], t["noise"], t["sigma"])
    denoised = edm.denoised(t["F"], noisy, t["sigma"])
    # float32 holds x = x0 + 257 n to about 1e-5; D inherits the relative error of x, not of x0.
    scale = noisy.abs().max() if dtype == torch.float32 else 1
    torch.testing.assert_close(denoised, t["denoised"], rtol=tolerance, atol=float(tolerance * scale))
    loss = edm.v_loss(t["F"], edm.v_target(t["x0"], t["noise"], t["sigma"]))
    torch.testing.assert_close(loss, t["loss_per_clip"], rtol=tolerance, atol=tolerance)


def test_v_form_equals_d_form():
    """mean[(1 + s^2) / s^2 (D - x0)^2] as published, against what we compute, over the sampler's whole range."""
    g = torch.Generator().manual_seed(0)
    x0, noise, answer = (torch.randn(len(SIGMA), 3, 4, 5, 6, generator=g, dtype=torch.float64) for _ in range(3))
    denoised = edm.denoised(answer, edm.add_noise(x0, noise, SIGMA), SIGMA)
    d_form = ((1 + SIGMA**2) / SIGMA**2) * ((denoised - x0) ** 2).flatten(1).mean(1)
    v_form = edm.v_loss(answer, edm.v_target(x0, noise, SIGMA))
    torch.testing.assert_close(v_form, d_form, rtol=1e-9, atol=0)


def test_perfect_answer_gives_back_the_latents():
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(len(SIGMA), 2, 4, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    target = edm.v_target(x0, noise, SIGMA)
    torch.testing.assert_close(edm.denoised(target, edm.add_noise(x0, noise, SIGMA), SIGMA), x0, rtol=0, atol=1e-9)


def test_denoised_equals_the_schedulers_pred_original_sample():
    """diffusers' Euler sampler must read the same clean latents from the same UNet output, at every Karras sigma it visits."""
    scheduler = EulerDiscreteScheduler.from_config(
        json.loads((PACKAGE / "facts/svd-xt/scheduler/scheduler_config.json").read_text())
    )
    scheduler.set_timesteps(25)
    g = torch.Generator().manual_seed(0)
    compared = 0
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        s = sigma.reshape(1)
        noisy = edm.add_noise(torch.randn(1, 2, 4, 3, 5, generator=g), torch.randn(1, 2, 4, 3, 5, generator=g), s)
        answer = torch.randn(1, 2, 4, 3, 5, generator=g)
        torch.testing.assert_close(timestep.reshape(1), edm.scalings(s).c_noise, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            scheduler.scale_model_input(noisy, timestep),
            edm.append_dims(edm.scalings(s).c_in, noisy) * noisy,
            rtol=1e-5,
            atol=1e-5,
        )
        theirs = scheduler.step(answer, timestep, noisy).pred_original_sample
        ours = edm.denoised(answer, noisy, s)
        assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5
        compared += 1
    assert compared == 25


def test_loss_is_finite_at_both_ends_in_float32():
    sigma = torch.tensor([1e-4, 0.002, 700.0, 1e5])
    x0, noise, answer = (torch.randn(4, 2, 4, 3, 5) for _ in range(3))
    assert edm.v_loss(answer, edm.v_target(x0, noise, sigma)).isfinite().all()
