"""Which parameters learn: exactly the named set, never a dead one, and LoRA starts equal to the base."""

import pytest
import torch

from svdtune.config.schema import Adapt, Model
from svdtune.errors import ConfigError
from svdtune.model.adapt import DEAD, adapt
from svdtune.model.facts import SHIPPED
from svdtune.model.load import fake_model, load_model
from svdtune.model.source import read_configs


@pytest.fixture
def unet(svd_folder):
    return load_model(Model(pretrained=str(svd_folder), variant=None)).unet


@pytest.fixture
def full_size():
    return fake_model(read_configs(SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"])).unet


def inputs(b=2, t=3, h=8, w=12):
    g = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(b, t, 8, h, w, generator=g),
        "timestep": torch.tensor([0.1, -0.7])[:b],
        "encoder_hidden_states": torch.randn(b, 1, 24, generator=g),
        "added_time_ids": torch.tensor([[6.0, 127, 0.02], [9, 30, 0.1]])[:b],
    }


@pytest.mark.parametrize(
    ("method", "millions"),
    [("full", 1474.2), ("temporal", 655.5 - 25.2), ("temporal_attention", 397.6 - 25.2), ("spatial", 868.8 - 25.2)],
)
def test_full_size_trained_sets(full_size, method, millions):
    trained = adapt(full_size, Adapt(method=method), dtype=torch.bfloat16, seed=0)
    assert sum(p.numel() for p in trained.values()) / 1e6 == pytest.approx(millions, abs=1.0)


def test_temporal_and_spatial_share_nothing_and_make_up_full(full_size):
    sets = {
        m: set(adapt(full_size, Adapt(method=m), dtype=torch.float32, seed=0)) for m in ("full", "temporal", "spatial")
    }
    assert not sets["temporal"] & sets["spatial"]
    assert sets["temporal"] | sets["spatial"] == sets["full"]
    assert sum(name.endswith("mix_factor") for name in sets["temporal"]) == 38


def test_lora_targets_all_attention_but_the_dead_layers(full_size):
    trained = adapt(full_size, Adapt(rank=16), dtype=torch.bfloat16, seed=0)
    owners = {name.split(".lora_")[0] for name in trained}
    blocks = [
        n
        for n, m in full_size.named_modules()
        if type(m).__name__ in ("BasicTransformerBlock", "TemporalBasicTransformerBlock")
    ]
    assert len(blocks) == 32
    assert owners == {
        f"{b}.{t}"
        for b in blocks
        for t in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_v", "attn2.to_out.0")
    }


@pytest.mark.parametrize("method", ["full", "temporal", "temporal_attention", "spatial", "lora"])
def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one(unet, method):
    """With LoRA's B at zero A has a zero gradient at first, so move B before asking."""
    trained = adapt(unet, Adapt(method=method, rank=2), dtype=torch.float32, seed=0)
    for name, parameter in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    unet(**inputs()).sample.square().mean().backward()
    # A gradient that is zero but for rounding (1e-11 against 1e-4 elsewhere) is a dead parameter.
    dead = [name for name, p in trained.items() if p.grad is None or float(p.grad.abs().max()) < 1e-9]
    assert dead == []
    assert all(p.grad is None for name, p in unet.named_parameters() if name not in trained)


def test_dead_parameters_really_are_dead(unet):
    """The reason for DEAD: with one context token no gradient reaches attn2.to_q, attn2.to_k and norm2."""
    unet.double().requires_grad_(True)
    unet(**{k: v.double() for k, v in inputs().items()}).sample.square().mean().backward()
    largest = {name: float(p.grad.abs().max()) for name, p in unet.named_parameters()}
    assert max(v for name, v in largest.items() if DEAD.search(name)) < 1e-15
    assert min(v for name, v in largest.items() if not DEAD.search(name)) > 1e-12


def test_lora_starts_equal_to_the_base_and_its_seed_decides_alone(svd_folder):
    def adapted(seed, noise):
        unet = load_model(Model(pretrained=str(svd_folder), variant=None)).unet
        torch.manual_seed(noise)
        before = unet(**inputs()).sample
        state = torch.get_rng_state()
        trained = adapt(unet, Adapt(rank=4), dtype=torch.float32, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(unet(**inputs()).sample, before, rtol=0, atol=1e-6)
        return trained

    first, same, other = adapted(0, 1), adapted(0, 2), adapted(3, 1)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("method", ["lora", "temporal"])
def test_trained_parameters_are_float32_and_frozen_ones_take_the_compute_dtype(unet, method):
    trained = adapt(unet, Adapt(method=method), dtype=torch.bfloat16, seed=0)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in unet.named_parameters() if n not in trained} == {torch.bfloat16}


def test_dora_and_alpha_arrive(unet):
    trained = adapt(unet, Adapt(rank=2, alpha=8, dora=True), dtype=torch.float32, seed=0)
    assert any("lora_magnitude_vector" in name for name in trained)
    assert unet.peft_config["default"].lora_alpha == 8


def test_chosen_targets(unet):
    trained = adapt(unet, Adapt(targets=["attn1.to_q"]), dtype=torch.float32, seed=0)
    assert trained
    assert all("attn1.to_q.lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("attn1.to_query", r"adapt\.targets: 'attn1\.to_query' is the ending of no .* Did you mean 'attn1\.to_"),
        ("attn2.to_q", r"adapt\.targets: 'attn2\.to_q' matches only dead layers .*one token.*use attn2\.to_v"),
    ],
)
def test_targets_that_train_nothing_are_refused(unet, target, sentence):
    with pytest.raises(ConfigError, match=sentence):
        adapt(unet, Adapt(targets=["attn1.to_v", target]), dtype=torch.float32, seed=0)
