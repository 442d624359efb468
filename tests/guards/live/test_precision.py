"""What the step computes in, and the first value that is not finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdtune.contracts import move
from svdtune.diffusion.draws import draws_for
from svdtune.guards.live.observe import observe
from svdtune.guards.live.precision import check_precision, first_not_finite, not_finite
from svdtune.guards.live.prove import prove
from svdtune.trainer import loop
from svdtune.trainer.state import Position


@pytest.fixture
def step(session):
    """(parts, batch, draws) of the first step."""
    made = session()
    parts = replace(made.parts, unet=made.model.unet)
    batch = next(loop.loader_from(made, Position()))
    return parts, move(batch, torch.device("cpu")), draws_for(batch, parts.facts, made.config)


def codes(findings):
    return [(finding.code, finding.where) for finding in findings]


def test_the_step_as_it_is_gives_no_finding(step):
    assert list(check_precision(observe(*step), step[0])) == []


def test_a_network_that_does_not_compute_in_the_planned_type(step):
    parts, *rest = step
    found = list(check_precision(observe(parts, *rest), replace(parts, dtype=torch.bfloat16)))
    assert codes(found) == [("NUM604", "UNet")]
    assert found[0].got == "it computes in float32"
    assert "train.precision" in found[0].expected


def test_a_record_in_half_precision(step):
    seen = observe(*step)
    halved = replace(seen.result.prediction, target=seen.result.prediction.target.bfloat16())
    found = list(check_precision(replace(seen, result=replace(seen.result, prediction=halved)), step[0]))
    assert codes(found) == [("NUM603", "StepResult.prediction.target")]


def test_a_vae_in_half_precision(step):
    parts = step[0]
    seen = observe(*step)
    found = list(check_precision(replace(seen, dtypes={**seen.dtypes, "vae": torch.bfloat16}), parts))
    assert codes(found) == [("NUM602", "VAE")]
    assert found[0].got == "it encodes in bfloat16, float32"


def test_the_first_module_with_a_value_that_is_not_finite_is_named(step):
    parts, batch, draws = step
    assert first_not_finite(*step) is None
    layer = parts.unet.down_blocks[1].resnets[0].spatial_res_block.conv2
    with torch.no_grad():
        layer.bias[0] = float("inf")
    culprit = first_not_finite(*step)
    assert culprit is not None
    assert (culprit.module, culprit.kind) == ("unet.down_blocks.1.resnets.0.spatial_res_block.conv2", "output")
    assert "its input is finite" in str(culprit)
    noise = draws.noise.clone()
    noise[0, 0, 0, 0, 0] = float("nan")
    assert "Draws.noise" in str(first_not_finite(parts, batch, replace(draws, noise=noise)))


def test_a_gradient_that_is_not_finite_is_named(step):
    """The square root of zero: its value is finite, its slope is not."""
    parts, *_ = step
    parts.unet.conv_out.register_forward_hook(lambda _, __, output: output + (output * 0).clamp_min(0).sqrt())
    culprit = first_not_finite(*step)
    assert culprit is not None
    assert culprit.kind == "gradient"
    assert culprit.module.startswith("unet.")
    assert all(parameter.grad is None for parameter in parts.unet.parameters())


def test_a_weight_whose_gradient_alone_is_not_finite_is_named(step):
    """As oneDNN leaves it for two frames in bf16 on some CPUs: nothing that flows through the network shows it."""
    parts, *_ = step
    name, trained = next((name, one) for name, one in parts.unet.named_parameters() if one.requires_grad)
    trained.register_hook(lambda gradient: gradient * float("nan"))
    culprit = first_not_finite(*step)
    assert culprit is not None
    assert (culprit.module, culprit.kind) == (f"unet.{name}", "weight")
    found = not_finite(culprit)
    assert "its gradient, and all outputs and their gradients are finite" in found.got
    assert "train.precision=no" in found.fix
    assert all(parameter.grad is None for parameter in parts.unet.parameters())


def test_weights_with_nan_are_refused_by_the_module(session):
    made = session()
    with torch.no_grad():
        made.model.unet.mid_block.resnets[0].spatial_res_block.conv1.weight[0, 0, 0, 0] = float("nan")
    (found,) = prove(made, Position()).findings
    assert (found.code, found.where) == ("NUM606", "unet.mid_block.resnets.0.spatial_res_block.conv1")
    assert "Clips: " in found.why
