"""`train_step` never waits for the device: no value read back, nothing copied from the host.

Shown without a GPU on the meta device, where a tensor has no value to read and a host tensor among an operator's inputs
is a copy that a GPU would wait for; on a GPU by torch's own debug mode.
"""

from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svdtune.config.load import load_config
from svdtune.contracts import Draws, VideoBatch, move, specs
from svdtune.model.adapt import adapt
from svdtune.model.load import fake_model, known_configs, load_model
from svdtune.trainer.build import clip_pixels, prepare_networks
from svdtune.trainer.step import Parts, train_step
from tests.trainer.conftest import REPO


class HostTensors(TorchDispatchMode):
    """Notes every operator that a host tensor enters or leaves."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.seen.append(str(func))
        return out


def parts_of(model, config):
    adapt(model.unet, config.adapt, dtype=torch.float32, seed=0)
    return Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, torch.float32, 4)


def record(kind, axes, device):
    fields = specs(kind).items()
    return kind(**{n: torch.ones(s.shape(axes), dtype=getattr(torch, s.dtype), device=device) for n, s in fields})


def test_no_host_tensor_enters_the_step(monkeypatch):
    config = load_config(REPO / "configs/tiny.yaml", ["adapt.method=lora"])
    model = fake_model(known_configs(config.model))
    parts = parts_of(model, config)
    for network in (model.unet, model.vae, model.image_encoder):
        for module in network.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer.to("meta"), persistent=False)
    monkeypatch.setattr(torch, "autocast", lambda *_a, **_k: nullcontext())  # meta has no autocast
    axes = model.facts.axes(b=2, t=8, h=64, w=96)
    batch, draws = record(VideoBatch, axes, "meta"), record(Draws, axes, "meta")
    with HostTensors() as host:
        result = train_step(parts, batch, draws)
        result.loss.backward()
    assert result.loss.device.type == "meta"
    assert host.seen == []


def test_the_watch_sees_a_host_tensor():
    with HostTensors() as host:
        torch.ones(2, device="meta") * torch.ones(2).to("meta")
    assert host.seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_does_not_synchronise_on_a_gpu():
    config = load_config(REPO / "configs/tiny.yaml", ["adapt.method=lora"])
    model = load_model(config.model)
    parts = parts_of(model, config)
    device = torch.device("cuda")
    for network in (model.unet, model.vae, model.image_encoder):
        network.to(device)
    axes = model.facts.axes(b=2, t=8, h=64, w=96)
    batch, draws = (move(record(kind, axes, "cpu"), device) for kind in (VideoBatch, Draws))
    train_step(parts, batch, draws).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(parts, batch, draws).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bf16_gradients(attention, device):
    """Loss and gradients of one step of the tiny base in bf16; draws and clip are fixed."""
    config = load_config(REPO / "configs/tiny.yaml", ["train.precision=bf16", f"memory.attention={attention}"])
    model = load_model(config.model)
    trained = prepare_networks(model, config, on_accelerator=False)
    for network in (model.unet, model.vae, model.image_encoder):
        network.to(device)
    parts = Parts(model.unet, model.vae, model.image_encoder, clip_pixels(model), model.facts, torch.bfloat16, 4)
    generator = torch.Generator().manual_seed(0)
    axes = model.facts.axes(b=2, t=8, h=64, w=96)
    batch, draws = record(VideoBatch, axes, "cpu"), record(Draws, axes, "cpu")
    batch = replace(batch, pixels=torch.rand(batch.pixels.shape, generator=generator) * 2 - 1)
    draws = replace(draws, noise=torch.randn(draws.noise.shape, generator=generator))
    loss = train_step(parts, move(batch, device), move(draws, device)).loss
    loss.backward()
    return float(loss.detach()), torch.cat([parameter.grad.float().flatten().cpu() for parameter in trained.values()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["auto", "flash", "cudnn", "xformers"])
def test_each_attention_equals_plain_products_within_bf16(kernel):
    if kernel == "xformers" and not find_spec("xformers"):
        pytest.skip("needs xformers")
    plain, other = (bf16_gradients(attention, torch.device("cuda")) for attention in ("math", kernel))
    distance = (plain[1] - other[1]).norm() / plain[1].norm()
    print(f"loss {plain[0]:.6f} and {other[0]:.6f}, gradients apart by {distance:.2e} of their norm")
    assert other[0] == pytest.approx(plain[0], rel=1e-2)
    assert not torch.equal(plain[1], other[1])  # it was another kernel
    assert distance < 2e-2
