"""Recomputation changes memory alone: outputs and gradients of the UNet in float64, what is run again, and what is named."""

import weakref

import pytest
import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from svdtune.config.load import load_config
from svdtune.model import offload
from svdtune.model.load import load_model
from svdtune.model.offload import Offload, Parked
from svdtune.model.recompute import kept, recompute, recomputes
from tests.trainer.conftest import REPO

POLICIES = ["level0", "units", "nested", "diffusers"]


@pytest.fixture
def unet():
    return (
        load_model(load_config(REPO / "configs/tiny.yaml", []).model)
        .unet.to(torch.float64)
        .train()
        .requires_grad_(True)
    )


def output_and_gradients(unet):
    generator = torch.Generator().manual_seed(0)
    channels, width = unet.config["in_channels"], unet.config["cross_attention_dim"]
    made = unet(
        torch.randn(2, 3, channels, 8, 16, generator=generator, dtype=torch.float64),
        torch.tensor([0.3, -0.7], dtype=torch.float64),
        encoder_hidden_states=torch.randn(2, 1, width, generator=generator, dtype=torch.float64),
        added_time_ids=torch.tensor([[7.0, 127.0, 0.02], [5.0, 90.0, 0.0]], dtype=torch.float64),
    ).sample
    made.square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
    unet.zero_grad(set_to_none=True)
    return made.detach(), gradients


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_but_memory_changes(unet, policy):
    output, gradients = output_and_gradients(unet)
    names = list(unet.state_dict())
    recompute(unet, policy)
    again, those = output_and_gradients(unet)
    assert list(unet.state_dict()) == names
    assert torch.equal(again, output)
    assert (those - gradients).abs().max() <= 1e-12 * gradients.abs().max()


def inner(unet, kind):
    """Runs of the first layer norm or group norm inside each module of `kind`."""
    norms = {}
    for name, module in unet.named_modules():
        if isinstance(module, kind):
            first = next(n for n, m in module.named_modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm))
            norms[f"{name}.{first}"] = 0
    for name in norms:
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: norms.__setitem__(name, norms[name] + 1))
    output_and_gradients(unet)
    return norms


@pytest.mark.parametrize("kind", [TemporalBasicTransformerBlock, SpatioTemporalResBlock])
@pytest.mark.parametrize(("policy", "times"), [("none", {1}), ("units", {2}), ("nested", {2, 3})])
def test_every_unit_of_every_level_is_run_again(unet, kind, policy, times):
    recompute(unet, policy)
    counts = inner(unet, kind)
    assert counts
    assert set(counts.values()) <= times
    assert policy == "none" or min(counts.values()) >= 2


def test_diffusers_flag_leaves_the_temporal_blocks_out(unet):
    """Why the policies exist. When diffusers covers them this fails, and the option can go."""
    recompute(unet, "diffusers")
    assert set(inner(unet, TemporalBasicTransformerBlock).values()) == {1}


def test_level0_takes_the_highest_resolution_alone(unet):
    recompute(unet, "level0")
    counts = inner(unet, SpatioTemporalResBlock)
    again = {name for name, count in counts.items() if count == 2}
    last = len(unet.up_blocks) - 1
    assert again == {name for name in counts if name.startswith(("down_blocks.0.", f"up_blocks.{last}."))}


@pytest.mark.parametrize("policy", POLICIES)
def test_kept_switches_it_off_and_on_again(unet, policy):
    recompute(unet, policy)
    assert recomputes(unet)
    with kept(unet):
        off = inner(unet, SpatioTemporalResBlock)
    assert set(off.values()) == {1}
    assert 2 in inner(unet, SpatioTemporalResBlock).values()


def test_nothing_is_recomputed_without_gradients(unet):
    recompute(unet, "nested")
    with torch.no_grad():
        sample = torch.zeros(1, 2, unet.config["in_channels"], 8, 8, dtype=torch.float64)
        context = torch.zeros(1, 1, unet.config["cross_attention_dim"], dtype=torch.float64)
        made = unet(
            sample, 0.0, encoder_hidden_states=context, added_time_ids=torch.zeros(1, 3, dtype=torch.float64)
        ).sample
    assert made.grad_fn is None


OFFLOADED = ["level0", "units", "nested"]


def two_micro_steps(unet):
    """Output of the second, and gradients added up."""
    unet.zero_grad(set_to_none=True)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        channels, width = unet.config["in_channels"], unet.config["cross_attention_dim"]
        made = unet(
            torch.randn(2, 3, channels, 8, 16, generator=generator, dtype=torch.float64),
            0.3,
            encoder_hidden_states=torch.randn(2, 1, width, generator=generator, dtype=torch.float64),
            added_time_ids=torch.rand(2, 3, generator=generator, dtype=torch.float64),
        ).sample
        (made.square().sum() / 2).backward()
    return made.detach(), {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


@pytest.fixture
def parked(monkeypatch):
    """What is parked, in order, however small."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 50_000)  # embeddings and context stay
    made, start = [], Parked.__init__
    monkeypatch.setattr(Parked, "__init__", lambda self, *a: made.append(weakref.ref(self)) or start(self, *a))
    return made


def units(unet):
    return [m for m in unet.modules() if getattr(m.forward, "offload", None)]


@pytest.mark.parametrize("policy", OFFLOADED)
def test_offloaded_inputs_come_back_as_they_were(unet, policy, parked):
    recompute(unet, policy)
    output, gradients = two_micro_steps(unet)
    for module in unet.modules():
        vars(module).pop("forward", None)
    recompute(unet, policy, offload=True)
    again, those = two_micro_steps(unet)
    assert torch.equal(again, output)
    assert those.keys() == gradients.keys()
    assert all(torch.equal(those[name], gradient) for name, gradient in gradients.items())
    assert len(parked) == 2 * len(units(unet)) > 0  # one input of each unit in each micro-step
    assert not any(reference() for reference in parked)  # and nothing stays behind


def test_only_outer_units_are_offloaded(unet):
    recompute(unet, "nested", offload=True)
    kinds = {type(module) for module in units(unet)}
    assert kinds == {SpatioTemporalResBlock, TransformerSpatioTemporalModel}


def test_nothing_is_offloaded_where_all_is_kept(unet, parked):
    recompute(unet, "units", offload=True)
    with kept(unet):
        output_and_gradients(unet)
    assert parked == []


def test_the_device_forgets_and_the_next_unit_is_fetched_ahead(monkeypatch):
    """Of a chain of units at most one input is on its way out, and in the backward pass one on its way back."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    moved, inputs = Offload(), []
    order = []
    fetch, take = Parked.fetch, Parked.take
    monkeypatch.setattr(Parked, "fetch", lambda self: order.append(("fetch", self.number)) or fetch(self))
    monkeypatch.setattr(Parked, "take", lambda self: order.append(("take", self.number)) or take(self))
    start = Parked.__init__

    def numbered(self, tensor, *rest):
        self.number = len(inputs)
        inputs.append(StorageWeakRef(tensor.untyped_storage()))
        start(self, tensor, *rest)

    monkeypatch.setattr(Parked, "__init__", numbered)
    x = torch.ones(4, requires_grad=True) * 1
    for _ in range(3):
        with moved.around_a_unit():
            x = checkpoint(torch.sin, x, use_reentrant=False)
    assert [reference.expired() for reference in inputs] == [True, True, False]
    x.sum().backward()
    # `take` itself asks to fetch, and finds it there but for the last unit.
    assert [step for step in order if step[0] == "take"] == [("take", 2), ("take", 1), ("take", 0)]
    assert order.index(("fetch", 1)) < order.index(("take", 1))
    assert order.index(("fetch", 0)) < order.index(("take", 0))


def test_small_tensors_and_parameters_stay():
    moved = Offload()
    small, large = torch.zeros(4), torch.zeros(offload.LEAST_BYTES // 4)
    assert moved._pack(small) is small
    assert isinstance(moved._pack(large), Parked)
    assert isinstance(moved._pack(torch.nn.Parameter(large)), torch.nn.Parameter)


def test_strides_come_back():
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    parked = Parked(tensor, None, None)
    parked.leave()
    back = parked.take()
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()
