"""Averages in the machine's memory are those on the device, and averages of bfloat16 parameters move."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from svdtune.checkpoint.state import load_ema, save_ema
from svdtune.config.schema import Train
from svdtune.trainer.averages import HostAverages
from svdtune.trainer.optimizer import make_ema

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def parameters(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 5), (), (4,))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def walk(moving, averages, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in moving:
            parameter.data += (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter)
        averages.step(moving)


def same(one, other):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.shadow_params, other.shadow_params, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_on_the_host_they_are_those_of_the_device_to_the_bit(dtype, device):
    train, made = Train(ema=True, ema_decay=0.7), {}
    for on_cpu in (False, True):
        moving = parameters(dtype, device)
        made[on_cpu] = make_ema(train, moving, on_cpu=on_cpu)
        walk(moving, made[on_cpu], 40)
    assert type(made[False]) is EMAModel
    assert type(made[True]) is HostAverages
    assert same(made[True], made[False])
    assert made[True].cur_decay_value == made[False].cur_decay_value == 0.7
    assert made[True].optimization_step == made[False].optimization_step == 40
    for average in made[True].shadow_params:
        assert (average.dtype, average.device.type, average.is_pinned()) == (torch.float32, "cpu", device == "cuda")


def test_averages_of_bfloat16_parameters_are_float32_and_move():
    """A ten-thousandth of the way is less than bfloat16's spacing: kept in it, the average would stay where it began."""
    moving = parameters(torch.bfloat16)
    ema = make_ema(Train(ema=True, ema_decay=0.9999), moving)
    ema.optimization_step = 10**6
    before = [average.clone() for average in ema.shadow_params]
    for parameter in moving:
        parameter.data += 0.1 * parameter.data.abs()
    ema.step(moving)
    for old, average, parameter in zip(before, ema.shadow_params, moving, strict=True):
        torch.testing.assert_close(average, old + 1e-4 * (parameter.detach().float() - old), rtol=1e-6, atol=0)
        assert not bool((average == old).any())


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_with_them_and_saving_them_is_as_before(tmp_path, device):
    moving = parameters(torch.bfloat16, device)
    named = {str(i): parameter for i, parameter in enumerate(moving)}
    ema = make_ema(Train(ema=True), moving, on_cpu=True)
    walk(moving, ema, 3)
    trained = [parameter.detach().clone() for parameter in moving]
    ema.store(moving)
    ema.copy_to(moving)
    assert all(torch.equal(p.cpu(), a.bfloat16()) for p, a in zip(moving, ema.shadow_params, strict=True))
    ema.restore(moving)
    assert all(torch.equal(p, old) for p, old in zip(moving, trained, strict=True))

    save_ema(tmp_path, ema, named)
    loaded = make_ema(Train(ema=True), moving, on_cpu=True)
    held = [average.data_ptr() for average in loaded.shadow_params]
    load_ema(tmp_path, loaded, named)
    assert same(loaded, ema)
    assert [average.data_ptr() for average in loaded.shadow_params] == held  # the pinned memory that it has
    before = [parameter.detach().clone() for parameter in moving]
    walk(moving, ema, 2)
    for parameter, old in zip(moving, before, strict=True):
        parameter.data.copy_(old)
    walk(moving, loaded, 2)
    assert same(loaded, ema)
