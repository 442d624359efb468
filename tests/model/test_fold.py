"""The folded cross-attention is the unfolded one: outputs and gradients in float64, with every method and every recomputation."""

from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from svdtune.config.load import load_config
from svdtune.config.schema import Adapt
from svdtune.errors import ContractError
from svdtune.model.adapt import DEAD, adapt
from svdtune.model.fold import fold
from svdtune.model.load import fake_model, known_configs, load_model
from svdtune.model.recompute import recompute
from tests.trainer.conftest import REPO

POLICIES = ["none", "level0", "units", "nested", "diffusers"]
PAIRS = [*((method, policy) for method in ("full", "lora") for policy in POLICIES), ("dora", "none")]
ADAPTS = {"full": Adapt("full"), "lora": Adapt(rank=2), "dora": Adapt(rank=2, dora=True)}


def adapted(method):
    """The tiny base in float64; adapters that act."""
    unet = load_model(load_config(REPO / "configs/tiny.yaml", []).model).unet
    adapt(unet, ADAPTS[method], dtype=torch.float32, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return unet.to(torch.float64).train()


def inputs(unet, tokens=1):
    generator = torch.Generator().manual_seed(0)
    channels, width = unet.config["in_channels"], unet.config["cross_attention_dim"]
    sample = torch.randn(2, 3, channels, 8, 16, generator=generator, dtype=torch.float64)
    context = torch.randn(2, tokens, width, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[7.0, 127.0, 0.02], [5.0, 90.0, 0.0]], dtype=torch.float64)
    timestep = torch.tensor([0.3, -0.7], dtype=torch.float64)
    return (sample, timestep), {"encoder_hidden_states": context, "added_time_ids": ids}


def output_and_gradients(unet):
    arguments, keywords = inputs(unet)
    made = unet(*arguments, **keywords).sample
    made.square().sum().backward()
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}
    unet.zero_grad(set_to_none=True)
    return made.detach(), gradients


@cache
def unfolded(method):
    return output_and_gradients(adapted(method))


def assert_equal(got, expected):
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("method", "policy"), PAIRS)
def test_output_and_gradients_are_the_unfolded_networks(method, policy):
    output, gradients = unfolded(method)
    unet = adapted(method)
    names = list(unet.state_dict())
    fold(unet)
    recompute(unet, policy)
    assert list(unet.state_dict()) == names
    again, those = output_and_gradients(unet)
    assert_equal(again, output)
    assert those.keys() == gradients.keys()
    assert any("attn2.to_v" in name for name in those)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (those[name] - gradient).norm() <= 1e-12 * gradient.norm(), name
    arguments, keywords = inputs(unet)
    with torch.no_grad():
        assert_equal(unet(*arguments, **keywords).sample, output)


def test_dead_values_do_not_move_in_a_step():
    """Neither by a gradient nor by weight decay, which the usual script lets shrink them."""
    unet = adapted("full")
    fold(unet)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    arguments, keywords = inputs(unet)
    unet(*arguments, **keywords).sample.square().mean().backward()
    optimizer.step()
    still = {name for name, p in unet.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if DEAD.search(name)}
    assert still


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dead_layers_are_not_computed(method):
    unet = adapted(method)
    fold(unet)
    for name, parameter in unet.named_parameters():
        if DEAD.search(name):
            parameter.data = parameter.data.new_empty(0)  # whatever computes with it fails
    arguments, keywords = inputs(unet)
    assert unet(*arguments, **keywords).sample.isfinite().all()


def test_more_tokens_are_refused():
    unet = adapted("full")
    fold(unet)
    arguments, keywords = inputs(unet, tokens=3)
    with pytest.raises(
        ContractError,
        match=r"encoder_hidden_states: got 3 tokens at down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn2, "
        r"expected 1 token\. .* Give the projected image embedding",
    ) as raised:
        unet(*arguments, **keywords)
    assert len(raised.value.mismatches) == 1


def test_it_saves_three_percent_of_the_full_networks_forward_pass():
    """SVD-XT at 14 frames of 320 x 512, counted on shapes."""
    counted = []
    for folded in (False, True):
        unet = fake_model(known_configs(load_config(REPO / "configs/svd_xt_full.yaml").model)).unet
        if folded:
            fold(unet)
        sample = torch.empty(1, 14, 8, 40, 64, device="meta")
        context, ids = torch.empty(1, 1, 1024, device="meta"), torch.empty(1, 3, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(sample, torch.empty(1, device="meta"), encoder_hidden_states=context, added_time_ids=ids)
        counted.append(counter.get_total_flops())
    unfolded, folded = counted
    print(f"forward {unfolded / 1e12:.3f} TFLOP, folded {folded / 1e12:.3f}")
    assert 0.03 < 1 - folded / unfolded < 0.10
