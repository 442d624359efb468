"""Moving averages that lie in the machine's memory (memory.ema_on_cpu): 4 bytes a trained number less on the GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class HostAverages(EMAModel):
    """diffusers' EMAModel with `shadow_params` on the CPU, pinned where there is a GPU.

    They are computed where the parameters are, one at a time, so that they equal those kept there: on a GPU each goes up and comes
    back, which a CPU's own arithmetic would take several times as long for. `step` waits until they are back, for whoever reads
    them next.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__((), decay=decay)
        self.shadow_params = [_on_host(parameter.detach()) for parameter in parameters]

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """As diffusers: average -= (1 - decay) * (average - parameter)."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for average, parameter in zip(self.shadow_params, parameters, strict=True):
            there = average.to(parameter.device, non_blocking=True)
            there.sub_((1 - self.cur_decay_value) * (there - parameter))
            if there is not average:
                average.copy_(there, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def _on_host(parameter: Tensor) -> Tensor:
    held = parameter.to("cpu", torch.float32, copy=True)
    return held.pin_memory() if parameter.is_cuda else held
