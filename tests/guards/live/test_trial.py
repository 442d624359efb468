"""The trial under a loss scale, as fp16 has it: silent on a sound run, whatever scale it starts with, and the scale comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from svdtune.guards.live.prove import prove
from svdtune.guards.live.updates import rate
from svdtune.trainer import adamw
from svdtune.trainer.optimizer import make_optimizer, make_schedule
from svdtune.trainer.state import Position


@pytest.mark.parametrize("scale", [1024.0, 2.0**60])
def test_a_loss_scale_is_no_fault_and_comes_back(session, scale):
    made = session("train.ema=true", "train.accumulation=2")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = AcceleratedOptimizer(made.optimizer.optimizer, scaler=scaler)
    accelerator = made.accelerator
    accelerator.scaler, accelerator.native_amp, accelerator._optimizers = scaler, True, [optimizer]
    accelerator.state._mixed_precision = "fp16"
    weights = {name: parameter.detach().clone() for name, parameter in made.trained.items()}
    proof = prove(replace(made, optimizer=optimizer), Position())
    assert proof.findings == []
    assert [stage.status for stage in proof.stages] == ["ok", "ok"]
    assert scaler.get_scale() == scale
    assert all(torch.equal(parameter, weights[name]) for name, parameter in made.trained.items())


BF16 = (
    "train.precision=bf16",
    "memory.parameters=bf16",
    "adapt.method=temporal_attention",
    "train.lr=1e-5",
    "train.ema=true",
)


@pytest.mark.parametrize(
    "options", [("train.accumulation=2",), ("train.optimizer=adamw8bit", "memory.ema_on_cpu=true")]
)
def test_bfloat16_parameters_are_no_fault(session, options):
    assert prove(session(*BF16, *options), Position()).findings == []


def test_bfloat16_parameters_rounded_to_nearest_are_told(session, monkeypatch):
    """The optimizer is ours, and chance is taken out of it: at 1e-5 next to nothing moves."""
    monkeypatch.setattr(adamw, "round_by_chance", lambda x, _chance: x.to(torch.bfloat16))
    codes = {finding.code: finding for finding in prove(session(*BF16), Position()).findings}
    assert codes.keys() == {"NUM605"}
    assert "stay where they are in 2 updates at train.lr=1e-05" in codes["NUM605"].got


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (7, 0), (5, 5), (1, 0)])
def test_the_rate_written_a_second_time_is_that_of_training(small, schedule, steps, warmup):
    config = small(f"train.schedule={schedule}", f"train.steps={steps}", f"train.warmup={warmup}")
    train = config.train
    parameter = torch.nn.Parameter(torch.zeros(1))
    made = make_schedule(train, make_optimizer(config, [parameter], torch.device("cpu")))
    assert [rate(train, step) for step in range(steps)] == pytest.approx(
        [made.lr_lambdas[0](step) for step in range(steps)]
    )
