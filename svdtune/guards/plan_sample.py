"""A sample video under the recorder, and the VAE's chunks, of which those of one size are alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import StableVideoDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from svdtune.config.schema import Config
from svdtune.guards.plan_ops import Cost
from svdtune.guards.plan_record import Record, Recorder
from svdtune.trainer.step import Parts


def held(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from network.parameters()
    yield from network.buffers()


_SAMPLED: dict[str, Record] = {}


def sampled(config: Config, parts: Parts) -> Record:
    """What a sample video makes, beside the weights; the same for runs that differ in how they train."""
    facts, data = parts.facts, config.data
    b = 2 if config.validation.guidance[1] > 1 else 1
    axes = facts.axes(b=b, t=data.num_frames, h=data.height, w=data.width)
    key = repr((axes, parts.unet.config, parts.vae.config, config.adapt, config.train.precision, config.memory.parameters,
                config.memory.vae_chunk, config.memory.attention))  # fmt: skip
    if key not in _SAMPLED:
        recorder = Recorder({"unet": parts.unet, "vae": parts.vae})
        recorder.phase = "sample"
        recorder.pass_over(*held(parts.unet), *held(parts.vae))
        with recorder.watching(), torch.no_grad():
            _sample(parts, axes, config.memory.vae_chunk, recorder)
        _SAMPLED[key] = recorder.record()
    return _SAMPLED[key]


def _sample(parts: Parts, axes: Mapping[str, int], chunk: int, recorder: Recorder) -> None:
    """One call of the UNet as the sampler makes it, with guidance two clips at once, and the decoding of a video."""
    facts = parts.facts
    b, t, z, h, w = axes["b"], axes["t"], axes["z"], axes["h"] // facts.f, axes["w"] // facts.f
    noisy, token, ids = torch.empty(b, t, 2 * z, h, w), torch.empty(b, 1, facts.d), torch.empty(b, facts.m)
    with torch.autocast("cpu", dtype=parts.dtype, enabled=parts.dtype != torch.float32):
        parts.unet(noisy, torch.empty(()), encoder_hidden_states=token, added_time_ids=ids, return_dict=False)[
            0
        ].float()
    holder: Any = SimpleNamespace(vae=parts.vae)
    with once(parts.vae, recorder):
        StableVideoDiffusionPipeline.decode_latents(holder, torch.empty(1, t, z, h, w), t, chunk)


@contextmanager
def once(vae: Any, recorder: Recorder) -> Iterator[None]:
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

    with (
        patch.object(vae, "encode", alike(vae.encode, _encoded)),
        patch.object(vae, "decode", alike(vae.decode, _decoded)),
    ):
        yield


def _encoded(moments: Tensor) -> Any:
    return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments))


def _decoded(sample: Tensor) -> Any:
    return SimpleNamespace(sample=sample)
