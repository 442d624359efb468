"""The real step, watched: its records, and what its networks were really given and gave back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from svdtune.config.load import with_overrides
from svdtune.contracts import Batch, Draws, Encoded, StepResult, VideoBatch
from svdtune.trainer import loop
from svdtune.trainer.build import Session
from svdtune.trainer.state import Position
from svdtune.trainer.step import Parts, denoise, train_step

NAMES = ("sample", "timestep", "encoder_hidden_states", "added_time_ids")


@dataclass
class Heard:
    """Arguments and answers of the networks in the order of their calls; tensors as they were, on their device."""

    vae_pixels: list[Tensor] = field(default_factory=list)
    """(n, c, h, w) each: what the VAE's encoder was given."""
    vae_moments: list[Tensor] = field(default_factory=list)
    """(n, 2*z, h/f, w/f) each: mean and log variance as the VAE gave them."""
    clip_pixels: list[Tensor] = field(default_factory=list)
    """(b, c, size, size): what the CLIP tower was given."""
    image_embeds: list[Tensor] = field(default_factory=list)
    """(b, d): its projected embedding."""
    unet: list[dict[str, Tensor]] = field(default_factory=list)
    """The UNet's arguments by name."""


@dataclass(frozen=True)
class Observed:
    """One step of training."""

    batch: Batch
    draws: Draws
    result: StepResult
    heard: Heard
    slope_of_loss: Tensor
    """d loss / d F, shaped like the prediction."""
    dtypes: dict[str, torch.dtype]
    """What the first layer of each network computed in: `unet`, `vae`, `image_encoder`."""


def observe(parts: Parts, batch: Batch, draws: Draws) -> Observed:
    """Run `train_step` once without keeping the UNet's activations; its answer is the leaf that the loss is differentiated by.

    `parts.unet` is the unwrapped network.
    """
    heard, dtypes = Heard(), {}
    with _listening(parts, heard, dtypes), _leaf(parts.unet) as leaf:
        result = train_step(parts, batch, draws)
    slope = torch.autograd.grad(result.loss, leaf, allow_unused=True)[0] if result.loss.requires_grad else None
    return Observed(batch, draws, result, heard, torch.zeros_like(leaf[0]) if slope is None else slope, dtypes)


def aside(session: Session, *overrides: str) -> Session:
    """The same run with other options, its clips read in this process: for steps beside those of training."""
    return replace(session, config=with_overrides(session.config, ["data.workers=0", *overrides]))


def single_clips(session: Session, count: int) -> list[VideoBatch]:
    """The run's first clips, decoded, one in each batch, however few its own steps would read; none where the videos are elsewhere."""
    if not session.catalog.train:
        return []
    alone = aside(
        session, "data.latents=null", "train.batch_size=1", f"train.steps={session.config.train.steps + count}"
    )
    return [batch for batch in islice(loop.loader_from(alone, Position()), count) if isinstance(batch, VideoBatch)]


def condition(parts: Parts, encoded: Encoded, batch: Batch, draws: Draws) -> StepResult:
    """The real `denoise` around a network that answers zeros: for what does not depend on the UNet."""

    def silent(sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (sample[:, :, : sample.shape[2] // 2] * 0,)

    return denoise(replace(parts, unet=silent), encoded, batch, draws)


@contextmanager
def hooks() -> Iterator[Callable[[Any], None]]:
    """Takes handles of hooks and removes them at the end."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _listening(parts: Parts, heard: Heard, dtypes: dict[str, torch.dtype]) -> Iterator[None]:
    def vae_in(_: nn.Module, args: Any) -> None:
        heard.vae_pixels.append(args[0].detach())

    def vae_out(_: nn.Module, __: Any, output: Tensor) -> None:
        heard.vae_moments.append(output.detach())

    def clip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        heard.clip_pixels.append((args[0] if args else kwargs["pixel_values"]).detach())
        heard.image_embeds.append(output.image_embeds.detach())

    def unet(_: nn.Module, args: Any, kwargs: Any) -> None:
        heard.unet.append({**dict(zip(NAMES, args, strict=False)), **{n: v for n, v in kwargs.items() if n in NAMES}})

    def computed_in(name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            dtypes.setdefault(name, output.dtype)

        return note

    with hooks() as add:
        add(parts.vae.encoder.register_forward_pre_hook(vae_in))
        add(parts.vae.quant_conv.register_forward_hook(vae_out))
        add(parts.image_encoder.register_forward_hook(clip, with_kwargs=True))
        add(parts.unet.register_forward_pre_hook(unet, prepend=True, with_kwargs=True))
        for name, network in (("unet", parts.unet), ("vae", parts.vae.encoder), ("image_encoder", parts.image_encoder)):
            first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
            add(first.register_forward_hook(computed_in(name)))
        yield


@contextmanager
def _leaf(unet: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts the UNet runs without gradients and its answer is a fresh leaf, put into the list."""
    made: list[Tensor] = []

    def before(*_: Any) -> None:
        torch.set_grad_enabled(False)

    def after(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        torch.set_grad_enabled(True)
        # float32, as accelerate leaves it to be: a gradient by a bf16 leaf would be rounded.
        made.append(output[0].detach().float().requires_grad_())
        return (made[-1], *output[1:])

    with torch.enable_grad(), hooks() as add:
        add(unet.register_forward_pre_hook(before))
        add(unet.register_forward_hook(after))
        yield made
