"""What the step computes in, and where a number first stopped being one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from svdtune.contracts import Batch, Draws, move
from svdtune.diffusion.draws import draws_for
from svdtune.guards.findings import Finding
from svdtune.guards.live.observe import Observed, aside, hooks
from svdtune.model.regions import uncompiled
from svdtune.trainer import loop
from svdtune.trainer.build import Session
from svdtune.trainer.sharding import gathered
from svdtune.trainer.state import Position
from svdtune.trainer.step import Parts, train_step

_RECORDS = (
    "encoded.latents",
    "unet_input.timestep",
    "unet_input.added_time_ids",
    "prediction.model_output",
    "prediction.target",
    "loss_per_clip",
    "loss",
)


def check_precision(seen: Observed, parts: Parts) -> Iterator[Finding]:
    """NUM602: the VAE. NUM603: the path of the loss. NUM604: the UNet's compute type."""
    vae = {_short(seen.dtypes["vae"]), *(_short(parameter.dtype) for parameter in parts.vae.encoder.parameters())}
    if vae != {"float32"}:
        yield Finding("NUM602", "error", "VAE", f"it encodes in {', '.join(sorted(vae))}", "float32",
                      "In fp16 SVD's VAE overflows to NaN on bright pictures, in bf16 its latents are off by more than 1 %.",
                      "Leave the VAE in float32 and switch autocast off around it "
                      "(svdtune/diffusion/conditioning.py:posterior does).")  # fmt: skip
    for name in _RECORDS:
        record: Any = seen.result
        for part in name.split("."):
            record = getattr(record, part)
        if record.dtype != torch.float32:
            yield Finding("NUM603", "error", f"StepResult.{name}", _short(record.dtype), "float32",
                          "sigma runs over six decades: its square is infinite in fp16, and the loss is off by percents in bf16.",
                          "Compute sigma, the scalings, v and the loss in float32, whatever the UNet's type.")  # fmt: skip
    if seen.dtypes["unet"] != parts.dtype:
        yield Finding("NUM604", "error", "UNet", f"it computes in {_short(seen.dtypes['unet'])}",
            f"{_short(parts.dtype)}, from train.precision",
                      "Memory and speed are planned for that type; in float32 a step takes about twice of both.",
                      "Look for an autocast that is switched off, or an input that is cast, around the UNet "
                      "(svdtune/trainer/step.py:predict).")  # fmt: skip


_WHAT = {
    "output": "its output",
    "gradient": "the gradient of its output",
    "weight": "its gradient, and all outputs and their gradients are finite",
}


@dataclass(frozen=True)
class Culprit:
    """Where values first stopped being finite."""

    module: str
    """Path of the module, `unet.mid_block.resnets.0`, of the parameter, or a record."""
    kind: str
    """`output` (forward), `gradient` (backward) or `weight`: the gradient of a parameter, where those of all outputs are finite."""
    given: str
    """How large what it was given is."""

    def __str__(self) -> str:
        return f"The first value that is not finite is in {self.module}: {_WHAT[self.kind]}{self.given}."


def culprit_of(session: Session, position: Position) -> Culprit | None:
    """The first value that is not finite in the update after `position`, whose clips are read again; this rank's.

    Called on every rank.
    """
    with gathered(session.model.unet, session.sharding):
        return _culprit_of(session, position)


def _culprit_of(session: Session, position: Position) -> Culprit | None:
    parts, device = replace(session.parts, unet=session.model.unet), session.accelerator.device
    scaler = session.accelerator.scaler
    batches = loop.loader_from(aside(session), position)
    for batch in islice(batches, session.config.train.accumulation):
        draws = move(draws_for(batch, parts.facts, session.config), device)
        scale = scaler.get_scale() if scaler is not None else 1.0
        if culprit := first_not_finite(parts, move(batch, device), draws, scale):
            return culprit
    return None


def first_not_finite(parts: Parts, batch: Batch, draws: Draws, scale: float = 1.0) -> Culprit | None:
    """Run the step once more, forward and backward, each module watched; None when all is finite now.

    `parts.unet` is the unwrapped network; `scale` multiplies the loss. Gradients that this leaves are removed.
    """
    for record in (batch, draws):
        for name, value in vars(record).items():
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                return Culprit(f"{type(record).__name__}.{name}", "output", ", before any network")
    found: list[Culprit] = []
    with hooks() as add, uncompiled(parts.unet):
        for part in ("vae", "image_encoder", "unet"):
            for name, module in getattr(parts, part).named_modules():
                add(module.register_forward_hook(_watch(f"{part}.{name}" if name else part, found)))
        result = train_step(parts, batch, draws)
        if not found and not bool(result.loss.isfinite()):
            found.append(Culprit("the loss", "output", ", and every network's output is finite"))
        (result.loss * scale).backward()
    for name, parameter in parts.unet.named_parameters():
        if not found and parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            found.append(Culprit(f"unet.{name}", "weight", ""))
        parameter.grad = None
    return found[0] if found else None


def not_finite(culprit: Culprit | None, clips: Sequence[str] = ()) -> Finding:
    """NUM606: the module where it began, or that it is not found again."""
    where, got = (
        (culprit.module, str(culprit)) if culprit else ("StepResult.loss", "loss or gradient norm is not finite")
    )
    why = "No update can be made from it, and training would stop there."
    why += f" Clips: {', '.join(clips)}." if clips else ""
    fix = "Weights with infinite or NaN entries: copy the base again. Overflow in fp16: train.precision=bf16."
    if culprit and culprit.kind == "weight":
        # oneDNN 3.12 leaves it unwritten for bf16 convolutions over two frames on CPUs without AVX512_BF16.
        fix = ("Overflow in fp16: train.precision=bf16. Else its kernel fails on this device: train.precision=no takes another one, "
               "and more frames may (data.num_frames).")  # fmt: skip
    return Finding("NUM606", "error", where, got, "finite numbers", why, fix)


def _watch(name: str, found: list[Culprit]) -> Any:
    def after(_: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if not found and not bool(tensor.isfinite().all()):
                found.append(Culprit(name, "output", _given(args)))
            if tensor.requires_grad:
                tensor.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        if not found and not bool(gradient.isfinite().all()):
            found.append(Culprit(name, "gradient", ""))

    return after


def _given(args: Any) -> str:
    largest = [float(tensor.detach().abs().max()) for tensor in _tensors(args) if tensor.is_floating_point()]
    return f" (its input is finite, up to {max(largest):.3g})" if largest and all(map(_finite, largest)) else ""


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _tensors(value: Any) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    parts = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
