"""One whole step of training under the recorder: what lies on the device before it, the step itself, the optimizer, a sample video.

The optimizer's state is there from the start: the recorded step is like every step after the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from svdtune.config.schema import Config
from svdtune.engine import BLOCKS, sharding
from svdtune.guards.plan_ops import Cost
from svdtune.guards.plan_record import Peak, Recorder
from svdtune.guards.plan_replay import Allocator, Full
from svdtune.guards.plan_sample import held, once, sampled
from svdtune.launch import world_size
from svdtune.trainer.adamw import CHUNK
from svdtune.trainer.build import for_samples_alone
from svdtune.trainer.optimizer import make_optimizer, state_bytes
from svdtune.trainer.step import Parts

BLAS = 2 * 2**25
"""cuBLAS keeps 32 MiB for each of the two threads that multiply: that of the forward and that of the backward pass."""
_REPEATS = 3
"""Steps that the allocator is put through: from the second on it has the blocks that it will keep."""
_APART = 10**9
"""Between the numbers of one step's storages and the next's."""


@dataclass(frozen=True)
class Recording:
    """What one process has on its device, phase by phase."""

    weights: int
    """Bytes of the networks."""
    optimizer: int
    """Bytes of the optimizer's state and the moving average."""
    trained_parameters: int
    gradients: int
    """Bytes of all gradients together."""
    unet: int
    """Bytes of the UNet's parameters, of which FSDP2 divides what is not..."""
    gathered: int
    """...whole at once: what is in no block, and two blocks."""
    peaks: Mapping[str, Peak]
    """The most bytes alive in encode, forward, backward, recompute, optimizer and sample; weights and all else included."""
    costs: Mapping[str, Cost]
    events: Sequence[tuple[int, int]]
    steady: int
    """The first event of the step itself."""
    more: int = 0
    """Bytes held besides what the events have, or less."""

    def with_optimizer(self, size: int) -> Recording:
        """The same step with so many bytes of optimizer state and average: they are there throughout, and nothing else changes."""
        more = size - self.optimizer
        peaks = {phase: Peak(peak.bytes + more, peak.where) for phase, peak in self.peaks.items()}
        return replace(self, optimizer=size, peaks=peaks, more=self.more + more)

    @cached_property
    def top(self) -> tuple[str, Peak]:
        """The phase with the highest peak."""
        return max(self.peaks.items(), key=lambda item: item[1].bytes)

    @cached_property
    def reserved(self) -> int:
        """Bytes that the caching allocator takes from a card that is large enough."""
        allocator = Allocator()
        self._replay(allocator)
        return allocator.most + self.more

    def fits(self, capacity: int) -> bool:
        """Whether the allocator gets along with `capacity` bytes."""
        try:
            self._replay(Allocator(capacity - self.more))
        except Full:
            return False
        return True

    def _replay(self, allocator: Allocator) -> None:
        held, step = self.events[: self.steady], self.events[self.steady :]
        old = {number for number, _ in held}
        allocator.run(held)
        for repeat in range(_REPEATS):
            # What was there before the step stays; what the step makes has another name each time.
            allocator.run((number if number in old else number + repeat * _APART, size) for number, size in step)


class Rehearsed:
    """The recorder of one step; `before` and `after` go around it, all within `cuda_rules`."""

    def __init__(self, config: Config, parts: Parts, trained: Mapping[str, nn.Parameter], *, gpu: bool = True) -> None:
        self.config, self.trained, self.gpu = config, dict(trained), gpu
        self.parts = replace(parts, vae_chunk=config.memory.vae_chunk)
        self.later = for_samples_alone(parts, config)
        self.recorder = Recorder({"unet": parts.unet, "vae": parts.vae, "image_encoder": parts.image_encoder}, gpu=gpu)
        self.count = sum(parameter.numel() for parameter in self.trained.values())
        self.optimizing: Any = None
        self.held: list[Tensor] = []

    def before(self) -> None:
        """Weights, the optimizer's state, the average, DDP's buckets, and gradients of the micro-steps before."""
        with self.recorder.watching():
            self._before()

    def _before(self) -> None:
        recorder, parts = self.recorder, self.parts
        recorder.phase = "start"
        self._hold(BLAS if self.gpu else 0)
        networks = [part for part in (parts.unet, *parts.vae.children(), parts.image_encoder) if part not in self.later]
        self.weights = recorder.hold(tensor for network in networks for tensor in held(network))
        already = recorder.live
        self._learning()
        self.optimizer = recorder.live - already
        parameters = list(self.trained.values())
        if world_size() > 1 and not sharding():
            self.held += [torch.empty_like(parameter) for parameter in parameters]  # DDP's buckets
        if self.config.train.accumulation > 1:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        self.steady = len(recorder.events)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, the step runs: encoders, then the UNet, then backwards; every chunk of the encoder of one size runs once."""
        self.recorder.phase = "encode"
        reached: set[nn.Parameter] = set()
        with ExitStack() as undo:
            hooks = [self.parts.unet.register_forward_pre_hook(lambda *_: setattr(self.recorder, "phase", "forward"))]
            hooks += [
                p.register_post_accumulate_grad_hook(reached.add) for p in self.trained.values() if p.grad is not None
            ]
            for hook in hooks:
                undo.callback(hook.remove)
            undo.enter_context(self.recorder.watching())
            undo.enter_context(once(self.parts.vae, self.recorder))
            yield
        for parameter in self.trained.values():
            if parameter not in reached and len(hooks) > 1:
                parameter.grad = None  # not the step's

    def after(self) -> Recording:
        """The optimizer's step and a sample video; then the account."""
        recorder, parameters = self.recorder, list(self.trained.values())
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        recorder.phase = "optimizer"
        with recorder.watching():
            self._move()
        validation = self.config.validation
        if validation.images or validation.samples:
            recorder.phase = "sample"
            with recorder.watching():
                recorder.hold(tensor for part in self.later for tensor in held(part))
            recorder.repeat(sampled(self.config, self.parts))
        peaks = {phase: peak for phase, peak in recorder.peaks.items() if phase not in ("", "start")}
        unet = self.parts.unet
        whole = sum(parameter.nbytes for parameter in unet.parameters())
        return Recording(
            self.weights,
            self.optimizer,
            self.count,
            gradients,
            whole,
            gathered(unet),
            peaks,
            recorder.costs,
            recorder.events,
            self.steady,
        )

    def _learning(self) -> None:
        """What the optimizer keeps. Of bf16 parameters, whose optimizer is ours, as many move as it takes at once; others only count."""
        config, count = self.config, self.count
        self.moving = _largest(self.trained.values()) if config.memory.parameters == "bf16" else []
        averages = 4 * count if config.train.ema and not config.memory.ema_on_cpu else 0
        standing = count - sum(parameter.numel() for parameter in self.moving)
        self._hold(int(standing * state_bytes(config)), averages)
        if self.moving:
            self.optimizing = make_optimizer(config, self.moving, torch.device("cpu"))
            for parameter in self.moving:
                parameter.grad = torch.empty_like(parameter)
            self.optimizing.step()
            for parameter in self.moving:
                parameter.grad = None

    def _hold(self, *sizes: int) -> None:
        self.held += [torch.empty(size, dtype=torch.uint8) for size in sizes if size]

    def _move(self) -> None:
        spent = self.recorder.spent()
        if self.moving:
            self.optimizing.step()
            spent.scale(self.count / sum(parameter.numel() for parameter in self.moving))
        else:
            # Reads parameters, gradients and state, writes parameters and state; fused, it makes nothing in between.
            moved = 3 * sum(p.nbytes for p in self.trained.values()) + 2 * int(self.count * state_bytes(self.config))
            spent.add(Cost(bytes=moved, seconds=moved / self.recorder.card.bandwidth, kernels=1))
        for parameter in self.trained.values():
            parameter.grad = None


def gathered(unet: nn.Module) -> int:
    """What is whole at once: all that is in no block, and two blocks, of which one computes and the next is on its way."""
    blocks = [module for module in unet.modules() if type(module).__name__ in BLOCKS]
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
    rest = sum(parameter.nbytes for parameter in unet.parameters()) - sum(sizes)
    return rest + sum(sorted(sizes)[-2:])


def _largest(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The largest, two chunks of them."""
    found: list[nn.Parameter] = []
    for parameter in sorted(parameters, key=lambda one: -one.numel()):
        if sum(one.numel() for one in found) > 2 * CHUNK:
            break
        found.append(parameter)
    return found
