"""Whether an update is what the configuration says: clipped, stepped, decayed, ticked and averaged, number by number.

A few parameters are computed a second time from the formulas: AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), the
global norm, diffusers' EMA warm-up and its schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdtune.checkpoint.tensors import local
from svdtune.config.schema import Train
from svdtune.data.catalog import clip_name
from svdtune.guards.findings import Finding
from svdtune.guards.live.learning import local_gradients, watched
from svdtune.trainer.adamw import RoundingAdamW
from svdtune.trainer.build import Session
from svdtune.trainer.loop import Accumulated
from svdtune.trainer.state import Position, raw_optimizer
from svdtune.trainer.validate import inference

_OFF = 2e-3
"""Relative difference: fused kernels round, and the clip factor has an epsilon."""
_FIX = "Mend svdtune/trainer/loop.py:update, or svdtune/trainer/optimizer.py."


@dataclass(frozen=True)
class Start:
    """What an update begins with, of the watched parameters (of shards this rank's part), gradients without a loss scale."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norm: float
    """Of the gradients of all trained parameters together."""
    epoch: int
    """Of the schedule."""


def start(session: Session) -> Start:
    """Between the backward pass and the update."""
    scaler = session.accelerator.scaler
    scale = 1 / scaler.get_scale() if scaler is not None else 1.0
    gradients = {name: gradient for name, gradient in local_gradients(session).items() if gradient is not None}
    weights = {name: value for name, value in first_weights(session, watched(session)).items() if name in gradients}
    return Start(
        weights,
        {name: gradients[name].float() * scale for name in weights},
        _norm(session, list(gradients.values())) * scale,
        session.schedule.last_epoch,
    )


def check_update(session: Session, before: Start, norm: float, number: int) -> Iterator[Finding]:
    """After update `number` (1, 2) whose loop reported `norm`."""
    train = session.config.train
    if _apart(norm, before.norm, 4 * _eps(session)):
        yield _wrong(
            "the gradient norm",
            f"{norm:.4g}",
            f"{before.norm:.4g}, over all trained parameters",
            "By it they are scaled down.",
        )
    if (ticks := session.schedule.last_epoch - before.epoch) != 1:
        why = "The learning rate would stay, or run through its schedule too fast."
        yield _wrong("train.schedule", f"{ticks} ticks in an update", "one", why)
    raw = raw_optimizer(session)
    due = RoundingAdamW if session.config.memory.parameters == "bf16" else torch.optim.AdamW
    if type(raw) is not due:
        if train.optimizer == "adamw":
            yield _wrong("train.optimizer", type(raw).__name__, due.__name__, "Weight decay acts otherwise in it.")
        return
    clipped = min(1.0, train.clip_norm / (before.norm + 1e-6)) if train.clip_norm else 1.0
    for name in before.weights:
        if told := _adamw(session, before, name, clipped, number):
            yield told
            return


def _adamw(session: Session, before: Start, name: str, clipped: float, number: int) -> Finding | None:
    """One parameter against algorithm 2; the second moment of the first update is enough to know betas and clipping by."""
    train, found = session.config.train, raw_optimizer(session).state[session.trained[name]]
    if not found:
        return _wrong(name, "no optimizer state", "one step of AdamW", "It would never move.")
    state = {key: local(value).float() if isinstance(value, Tensor) else value for key, value in found.items()}
    if (steps := int(state["step"])) != number:
        return _wrong(
            name, f"{steps} optimizer steps after {number} updates", f"{number}", "Updates are left out or made twice."
        )
    (beta1, beta2), gradient = train.betas, before.gradients[name] * clipped
    if number == 1:
        for key, due in (("exp_avg", (1 - beta1) * gradient), ("exp_avg_sq", (1 - beta2) * gradient**2)):
            if _far(state[key], due):
                got = f"{key} of norm {float(state[key].norm()):.4g}"
                expected = f"{float(due.norm()):.4g}: gradient norm {before.norm:.4g}, train.clip_norm={train.clip_norm}, train.betas"
                return _wrong(name, got, expected, "Clipping or betas are not those of the configuration.")
    mean, square = state["exp_avg"] / (1 - beta1**number), state["exp_avg_sq"] / (1 - beta2**number)
    step = train.lr * mean / (square.sqrt() + 1e-8)
    due = before.weights[name].float() * (1 - train.lr * train.weight_decay) - step
    now = local(session.trained[name])
    size = float((step.abs() + train.lr * train.weight_decay * before.weights[name].abs()).max())
    rounding = float(torch.finfo(now.dtype).eps * before.weights[name].abs().max())
    if float((now - due).abs().max()) > 0.02 * size + 4 * rounding:
        got = f"a step of up to {float((now - before.weights[name]).abs().max()):.4g}"
        wanted = float((due - before.weights[name]).abs().max())
        expected = f"{wanted:.4g}: train.lr={train.lr:g}, train.weight_decay={train.weight_decay:g}"
        return _wrong(name, got, expected, "The update is not AdamW's.")
    return None


def check_schedule(session: Session) -> Iterator[Finding]:
    """The rate over the run: linear warm-up, then constant, cosine or linear to zero at train.steps."""
    schedule: Any = session.schedule
    train = session.config.train
    moments = sorted({0, 1, train.warmup // 2, train.warmup, (train.warmup + train.steps) // 2, train.steps - 1})
    for step in moments:
        got, due = float(schedule.lr_lambdas[0](step)), rate(train, step)
        if abs(got - due) > 1e-6:
            why = "Too low nothing is learned, too high it breaks."
            yield _wrong("train.schedule", f"{got:.4g} of train.lr at step {step}", f"{due:.4g}", why)
            return


def rate(train: Train, step: int) -> float:
    """Share of train.lr at `step`, counted from 0."""
    if step < train.warmup:
        return step / max(1, train.warmup)
    if train.schedule == "constant":
        return 1.0
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done)


def check_averages(session: Session, first: dict[str, Tensor]) -> Iterator[Finding]:
    """After the second update: average = d * p1 + (1 - d) * p2 with d = min(ema_decay, 2 / 11); the first one copies."""
    if session.ema is None:
        return
    decay = min(session.config.train.ema_decay, 2 / 11)
    averages = dict(zip(session.trained, session.ema.shadow_params, strict=True))
    for name, p1 in first.items():
        now, average = local(session.trained[name]).float(), local(averages[name]).to(p1.device)
        due = decay * p1.float() + (1 - decay) * now
        if _far(average, due, at_least=float((now - p1).abs().max())):
            got = f"an average that is off by up to {float((average - due).abs().max()):.2g}"
            why = "The averages are what is sampled and exported."
            yield _wrong(f"train.ema ({name})", got, f"decay {decay:.3g} after two updates", why)
            return


def check_micro_steps(session: Session, position: Position, accumulated: Accumulated) -> Iterator[Finding]:
    """Every micro-step has the samples that are due, and noise of its own."""
    train, accelerator = session.config.train, session.accelerator
    b, world, rank = train.batch_size, accelerator.num_processes, accelerator.process_index
    due = [position.samples + (k * world + rank) * b + i for k in range(train.accumulation) for i in range(b)]
    if (got := accumulated.samples.tolist()) != due:
        why = "Clips would be seen twice in an update, or never."
        yield _wrong("Accumulated.samples", f"{got[:8]}", f"{due[:8]}: {train.accumulation} micro-steps of {b}", why)
    held_out = {clip_name(index, session.config.data) for index in session.catalog.held_out}
    if strange := sorted(held_out & set(accumulated.names)):
        yield _wrong(
            "session.catalog",
            f"{strange[0]} is trained on",
            "training files alone",
            "It is held out: its loss would say nothing.",
        )
    if (alike := len(accumulated.noise) - len(torch.unique(accumulated.noise, dim=0))) > 0:
        why = "Shared noise makes the gradients of an update alike."
        yield _wrong(
            "Accumulated.noise", f"{alike} clips with the noise of another", "noise of its own for each clip", why
        )


def check_inference(session: Session) -> list[Finding]:
    """Sampling with the averages leaves the weights and the mode of training as they were."""
    weights = first_weights(session, watched(session))
    with inference(session):
        pass
    same = all(torch.equal(local(session.trained[name]), value) for name, value in weights.items())
    if same and session.model.unet.training:
        return []
    got = "the UNet stays in eval mode" if same else "the weights of training are replaced by their averages"
    return [
        _wrong("validation", got, "the weights and the mode from before", "Every validation would change the training.")
    ]


def check_lora(session: Session) -> Iterator[Finding]:
    """LoRA's contribution is scaled by alpha / rank."""
    adapt = session.config.adapt
    due = (adapt.alpha or adapt.rank) / adapt.rank
    for name, module in session.model.unet.named_modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and any(abs(value - due) > 1e-6 for value in scaling.values()):
            got = f"scaled by {next(iter(scaling.values())):g}"
            yield _wrong(
                name,
                got,
                f"{due:g} = adapt.alpha / adapt.rank",
                "The rate would mean another step; exports carry alpha and rank.",
            )
            return


def _apart(one: float, other: float, rounding: float) -> bool:
    return math.isfinite(other) and abs(one - other) > max(_OFF, rounding) * abs(other) + 1e-12


def _eps(session: Session) -> float:
    """Spacing of gradients near one; torch keeps their norm in their own type."""
    return torch.finfo(next(iter(session.trained.values())).dtype).eps


def _far(one: Tensor, other: Tensor, at_least: float = 0.0) -> bool:
    largest = float(other.abs().max())
    rounding = 4 * torch.finfo(torch.float32).eps * largest
    return float((one.float() - other.float()).abs().max()) > 0.02 * (at_least or largest) + rounding


def _wrong(where: str, got: str, expected: str, why: str) -> Finding:
    return Finding("SEM569", "error", where, got, expected, why, _FIX)


def first_weights(session: Session, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of some trained parameters; of shards what this rank has of them, if anything."""
    held = {name: local(session.trained[name]) for name in names}
    return {name: value.clone() for name, value in held.items() if value.numel()}


def _norm(session: Session, gradients: Sequence[Tensor]) -> float:
    norms = [gradient.float().norm() for gradient in gradients] or [torch.zeros((), device=session.accelerator.device)]
    square: Any = torch.stack(norms).square().sum()
    if session.sharding:  # each rank has a part
        square = session.accelerator.reduce(square, reduction="sum")
    return float(square) ** 0.5
