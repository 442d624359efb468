"""What a step of a configuration costs, without weights and without a GPU: FLOPs, bytes, seconds at the least.

    from svdtune.guards.cost import step_cost
    cost = step_cost(config)                     # about 10 s at full size, on a CPU
    cost.flops, cost.model_flops, cost.seconds   # of one micro-step and the optimizer's step, encoders included

`StepCost.of("forward", "backward")` sums phases: encode, forward, backward, recompute, optimizer, sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svdtune.config.schema import Config
from svdtune.guards.plan_ops import Cost

STEP = ("encode", "forward", "backward", "recompute", "optimizer")


@dataclass(frozen=True)
class StepCost:
    """One micro-step and one optimizer step, on one process."""

    phases: Mapping[str, Cost]

    def of(self, *phases: str) -> Cost:
        """The sum over phases; one that did not run costs nothing."""
        total = Cost()
        for phase in phases:
            total.add(self.phases.get(phase, Cost()))
        return total

    @property
    def flops(self) -> int:
        """As executed: with encoders, with what is computed again."""
        return self.of(*STEP).flops

    @property
    def model_flops(self) -> int:
        """Of the UNet, forwards and backwards, each product once: what model-FLOPs utilisation counts."""
        return self.of("forward", "backward").model_flops

    @property
    def seconds(self) -> float:
        """The eager roofline: each operator as fast as arithmetic and memory of an H100 allow, none overlapping another."""
        return self.of(*STEP).seconds


def step_cost(config: Config) -> StepCost:
    """Record the step of `config`, and account for it. Raises what building or running the step raises."""
    from svdtune.guards.plan_pass import record

    return StepCost(record(config).costs)
