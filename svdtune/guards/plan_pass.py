"""The step of a configuration, recorded: what `svdtune plan` runs for each of its rows."""

from __future__ import annotations

from contextlib import nullcontext

from svdtune.config.schema import Config
from svdtune.contracts import Draws
from svdtune.guards.plan_rules import cuda_rules
from svdtune.guards.plan_step import Recording, Rehearsed
from svdtune.guards.shapes import batch_of, fake_record, stage, user_axes
from svdtune.model.load import fake_model, known_configs
from svdtune.trainer.step import train_step


def record(config: Config, *, gpu: bool = True) -> Recording:
    """One step on fake tensors, by the GPU's rules or, to compare with a real run, by this machine's. Raises what running it raises."""
    model = fake_model(known_configs(config.model), bridge=config.conditioning.bridge is not None)
    with stage(config, model) as built:
        rehearsed = Rehearsed(config, built.parts, built.trained, gpu=gpu)
        axes = user_axes(config, built.parts.facts)
        with cuda_rules() if gpu else nullcontext():
            rehearsed.before()
            with rehearsed.step():
                batch, draws = fake_record(batch_of(config), axes), fake_record(Draws, axes)
                train_step(rehearsed.parts, batch, draws).loss.backward()
            return rehearsed.after()
