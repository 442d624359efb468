"""One whole step of training under the recorder: what lies on the device before it, the step itself, the optimizer, a sample video.

The optimizer moves once before anything counts, so that its state is there: the recorded step is like every step after the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import StableVideoDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from svdtune.config.schema import Config
from svdtune.engine import sharding
from svdtune.guards.memory import state_bytes
from svdtune.guards.plan_ops import Cost
from svdtune.guards.plan_record import Peak, Recorder
from svdtune.guards.plan_replay import Allocator, Full
from svdtune.launch import world_size
from svdtune.trainer.optimizer import make_learning
from svdtune.trainer.step import Parts

BLAS = 2 * 2**25
"""cuBLAS keeps 32 MiB for each of the two threads that multiply: that of the forward and that of the backward pass."""
_REPEATS = 3
"""Steps that the allocator is put through: from the second on it has the blocks that it will keep."""


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
    peaks: Mapping[str, Peak]
    """The most bytes alive in encode, forward, backward, recompute, optimizer and sample; weights and all else included."""
    costs: Mapping[str, Cost]
    events: Sequence[tuple[int, int]]
    steady: int
    """The first event of the step itself."""

    @cached_property
    def top(self) -> tuple[str, Peak]:
        """The phase with the highest peak."""
        return max(self.peaks.items(), key=lambda item: item[1].bytes)

    @cached_property
    def reserved(self) -> int:
        """Bytes that the caching allocator takes from a card that is large enough."""
        allocator = Allocator()
        self._replay(allocator)
        return allocator.most

    def fits(self, capacity: int) -> bool:
        """Whether the allocator gets along with `capacity` bytes."""
        try:
            self._replay(Allocator(capacity))
        except Full:
            return False
        return True

    def _replay(self, allocator: Allocator) -> None:
        held, step = self.events[: self.steady], self.events[self.steady :]
        old = {number for number, _ in held}
        allocator.run(held)
        for repeat in range(_REPEATS):
            # What was there before the step stays; what the step makes has another name each time.
            allocator.run((number if number in old else (number, repeat), size) for number, size in step)


class Rehearsed:
    """The recorder of one step; `before` and `after` go around it, all within its `watching()` and `cuda_rules`."""

    def __init__(self, config: Config, parts: Parts, trained: Mapping[str, nn.Parameter]) -> None:
        self.config, self.trained = config, dict(trained)
        self.parts = replace(parts, vae_chunk=config.memory.vae_chunk)
        self.recorder = Recorder({"unet": parts.unet, "vae": parts.vae, "image_encoder": parts.image_encoder})
        self.learning: Any = None
        self.held: list[Tensor] = []

    def before(self) -> None:
        """Weights, the optimizer's state, the average, DDP's buckets, and gradients of the micro-steps before."""
        recorder, parts = self.recorder, self.parts
        recorder.phase = "start"
        self.held.append(torch.empty(BLAS, dtype=torch.uint8))
        networks = (parts.unet, parts.vae, parts.image_encoder)
        self.weights = recorder.hold(t for network in networks for t in (*network.parameters(), *network.buffers()))
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
        hook = self.parts.unet.register_forward_pre_hook(lambda *_: setattr(self.recorder, "phase", "forward"))
        try:
            with _once(self.parts.vae, self.recorder):
                yield
        finally:
            hook.remove()

    def after(self) -> Recording:
        """The optimizer's step and a sample video; then the account."""
        recorder, parameters = self.recorder, list(self.trained.values())
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        recorder.phase = "optimizer"
        torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip_norm or float("inf"))
        self._move()
        if self.config.validation.images or self.config.validation.samples:
            recorder.phase = "sample"
            self._sample()
        peaks = {phase: peak for phase, peak in recorder.peaks.items() if phase not in ("", "start")}
        count = sum(parameter.numel() for parameter in parameters)
        return Recording(self.weights, self.optimizer, count, gradients, peaks, recorder.costs, recorder.events, self.steady)

    def _learning(self) -> None:
        parameters = list(self.trained.values())
        if self.config.train.optimizer == "adamw8bit":  # bitsandbytes needs a GPU
            size = state_bytes(self.config)
            self.held += [torch.empty(int(size * p.numel()), dtype=torch.uint8) for p in parameters]
            return
        self.learning = make_learning(self.config.train, self.trained, torch.device("cpu"))
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        self._move()

    def _move(self) -> None:
        if self.learning is not None:
            self.learning.optimizer.step()
            if self.learning.ema is not None:
                self.learning.ema.step(self.trained.values())
        for parameter in self.trained.values():
            parameter.grad = None

    @torch.no_grad()
    def _sample(self) -> None:
        """One call of the UNet as the sampler makes it, with guidance two clips at once, and the decoding of a video."""
        config, facts, parts = self.config, self.parts.facts, self.parts
        b = 2 if config.validation.guidance[1] > 1 else 1
        axes = facts.axes(b=b, t=config.data.num_frames, h=config.data.height, w=config.data.width)
        t, z, h, w = axes["t"], axes["z"], axes["h"] // facts.f, axes["w"] // facts.f
        noisy, token, ids = torch.empty(b, t, 2 * z, h, w), torch.empty(b, 1, facts.d), torch.empty(b, facts.m)
        with torch.autocast("cpu", dtype=parts.dtype, enabled=parts.dtype != torch.float32):
            parts.unet(noisy, torch.empty(()), encoder_hidden_states=token, added_time_ids=ids, return_dict=False)[0].float()
        holder: Any = SimpleNamespace(vae=parts.vae)
        latents, chunk = torch.empty(1, t, z, h, w), config.memory.vae_chunk
        with _once(parts.vae, self.recorder):
            StableVideoDiffusionPipeline.decode_latents(holder, latents, t, chunk)


@contextmanager
def _once(vae: Any, recorder: Recorder) -> Iterator[None]:
    """Chunks of one size are alike: the first is encoded or decoded, the others only have its results' sizes and its cost."""
    seen: dict[Any, tuple[Any, Cost]] = {}

    def alike(function: Any, again: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            key = (again, tensor.shape, tuple(kwargs.items()))
            if key in seen:
                result, cost = seen[key]
                recorder.spent().add(cost)
                return again(torch.empty(*result))
            before = replace(recorder.spent())
            out = function(tensor, *args, **kwargs)
            made = out.latent_dist.parameters if again is _encoded else out.sample
            seen[key] = tuple(made.shape), recorder.spent().since(before)
            return out

        return call

    with patch.object(vae, "encode", alike(vae.encode, _encoded)), patch.object(vae, "decode", alike(vae.decode, _decoded)):
        yield


def _encoded(moments: Tensor) -> Any:
    return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments))


def _decoded(sample: Tensor) -> Any:
    return SimpleNamespace(sample=sample)
