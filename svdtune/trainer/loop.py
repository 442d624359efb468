"""The loop: micro-steps to an update, and around it logging, validation and checkpoints, each from its own module."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from svdtune.checkpoint.tensors import whole
from svdtune.contracts import VideoBatch, move
from svdtune.data.loader import make_loader
from svdtune.diffusion.draws import draws_for
from svdtune.errors import Diverged, PreflightError, Stopped
from svdtune.trainer import state, tracking
from svdtune.trainer.build import Session
from svdtune.trainer.metrics import StepReport, any_rank, reduce_step
from svdtune.trainer.progress import Progress, memory_gib
from svdtune.trainer.signals import StopWish
from svdtune.trainer.state import Position
from svdtune.trainer.step import train_step
from svdtune.trainer.validate import Validator, inference
from svdtune.trainer.watch import Seen, Watch

# fp16's loss scale starts too high and is halved at each overflow: a few skipped updates are how it is found.
MAX_SKIPPED = 20


@dataclass(frozen=True)
class Accumulated:
    """What the micro-steps of one update leave behind: losses, sigmas and sample numbers (clips,) of this rank, and names."""

    losses: Tensor
    sigmas: Tensor
    samples: Tensor
    noise: Tensor
    """(clips, 4): the first numbers of each clip's noise, to know it by."""
    names: tuple[str, ...]
    waited: float
    """Seconds without a clip from the loader."""


def run_loop(session: Session, position: Position, resolved: str, wish: StopWish, watch: Watch) -> Position:
    """Train from `position` to `train.steps`; `resolved` is the YAML that checkpoints carry.

    Raises Diverged (no update made), Stopped or PreflightError (asked for by a signal or by `watch`; checkpoint saved).
    """
    config = session.config
    progress = Progress(
        config.train.steps, session.clips_per_step, config.train.log_interval, session.accelerator.is_main_process
    )
    validator = Validator(session)
    if position.step == 0:
        wish.ask(_validate(session, validator, progress, watch, 0))
    batches = iter(loader_from(session, position))
    skipped = 0
    while position.step < config.train.steps:
        progress.begin()
        lr = float(session.schedule.get_last_lr()[0])
        accumulated = accumulate(session, batches)
        grad_norm, report = update(session, accumulated, stop=wish.name is not None)
        skipped = skipped + 1 if not math.isfinite(report.grad_norm) else 0
        _halt_if_diverged(session, position, accumulated, report, skipped, watch)
        position = Position(position.step + 1, position.samples + session.clips_per_step)
        seconds = _report(session, progress, position, report, lr)
        clips = accumulated.samples, accumulated.noise, accumulated.names
        wish.ask(watch.stepped(session, Seen(position.step, report, grad_norm, seconds, accumulated.waited, *clips)))
        last, stop = position.step == config.train.steps, report.stop
        if last or (position.step % config.validation.interval == 0 and not stop):
            wish.ask(_validate(session, validator, progress, watch, position.step))
            stop = any_rank(session.accelerator, wish.name is not None)
        if last or stop or position.step % config.checkpoint.interval == 0:
            _save(session, position, resolved)
        if stop and not last:
            raise (PreflightError if wish.refused else Stopped)(
                f"stopped by {wish.name or 'another rank'} after step {position.step}; the checkpoint is saved. "
                "Run the same command again to go on."
            )
    if session.accelerator.is_main_process:
        validator.sheet(position.step)
    return position


def loader_from(session: Session, position: Position) -> Iterator[VideoBatch]:
    """The batches of this rank from `position` on."""
    config, accelerator = session.config, session.accelerator
    return make_loader(
        config.data,
        session.catalog.train,
        seed=config.run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        batch_size=config.train.batch_size,
        first_sample=position.samples,
        last_sample=position.samples + (config.train.steps - position.step) * session.clips_per_step,
    )


def accumulate(session: Session, batches: Iterator[VideoBatch]) -> Accumulated:
    """The micro-steps of one update: afterwards the gradients are those of the mean loss over all clips of all ranks."""
    config, accelerator, parts = session.config, session.accelerator, session.parts
    losses, drawn, samples, names, waited = [], [], [], [], 0.0
    for micro in range(config.train.accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        if batch.rejected:
            session.folder.reject(batch.rejected)
        draws = draws_for(batch, parts.facts, config)
        batch, draws = move(batch, accelerator.device), move(draws, accelerator.device)
        last = micro == config.train.accumulation - 1
        with nullcontext() if last else session.unsynced():
            result = train_step(parts, batch, draws)
            accelerator.backward(result.loss / config.train.accumulation)
        losses.append(result.loss_per_clip.detach())
        drawn.append((draws.sigma, draws.noise.flatten(1)[:, :4]))
        samples.append(batch.sample)
        names.extend(batch.names)
    sigmas, noise = (torch.cat(values) for values in zip(*drawn, strict=True))
    return Accumulated(torch.cat(losses), sigmas, torch.cat(samples), noise, tuple(names), waited)


def update(session: Session, accumulated: Accumulated, *, stop: bool) -> tuple[float, StepReport]:
    """One optimizer step, if loss and gradient norm are finite on every rank. Returns this rank's gradient norm, and the report."""
    accelerator, optimizer, trained = session.accelerator, session.optimizer, list(session.trained.values())
    max_norm = session.config.train.clip_norm or math.inf
    grad_norm = torch.as_tensor(accelerator.clip_grad_norm_(trained, max_norm))
    grad_norm = whole(grad_norm).to(accelerator.device)  # of shards each rank has a part of it too
    report = reduce_step(accelerator, accumulated.losses, accumulated.sigmas, grad_norm, stop=stop)
    # With a loss scale, step() itself leaves the weights alone on overflow and lowers the scale.
    if math.isfinite(report.loss) and (math.isfinite(report.grad_norm) or accelerator.scaler is not None):
        optimizer.step()
        session.schedule.step()
        if session.ema is not None:
            session.ema.step(trained)
    optimizer.zero_grad(set_to_none=True)
    return float(grad_norm), report


def _halt_if_diverged(
    session: Session, position: Position, accumulated: Accumulated, report: StepReport, skipped: int, watch: Watch
) -> None:
    allowed = MAX_SKIPPED if session.accelerator.scaler is not None else 0
    if math.isfinite(report.loss) and skipped <= allowed:
        return
    mine = zip(accumulated.names, accumulated.sigmas.tolist(), accumulated.losses.tolist(), strict=True)
    clips = [f"{name} (sigma {sigma:.4g}, loss {loss:.4g})" for name, sigma, loss in mine]
    everywhere = gather_object(clips)
    bad = [line for line in everywhere if "loss nan" in line or "loss inf" in line] or everywhere
    began = watch.diverged(session, position)
    raise Diverged(
        f"step {position.step + 1}: loss {report.loss:.4g}, gradient norm {report.grad_norm:.4g}; no update was made from it. "
        f"{began}{' ' if began else ''}Clips of this step: {'; '.join(bad[:8])}. Checkpoints saved before are good. Lower train.lr, "
        "check these clips, or use train.precision=bf16."
    )


def _report(session: Session, progress: Progress, position: Position, report: StepReport, lr: float) -> float:
    """The seconds that the step took."""
    seconds = progress.end()
    progress.show(position.step, report, lr)
    line = {
        "step": position.step,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": lr,
        "samples": position.samples,
        "seconds": round(seconds, 4),
        "clips_per_second": round(progress.clips_per_second(), 4),
        "memory_gib": round(memory_gib(), 3),
        **{f"loss/sigma {band}": loss for band, loss in report.loss_by_sigma.items()},
    }
    _write(session, {key: value if math.isfinite(value) else None for key, value in line.items()}, position.step)
    if session.accelerator.is_main_process:
        session.folder.beat()
    return seconds


def _validate(session: Session, validator: Validator, progress: Progress, watch: Watch, step: int) -> str:
    """A reason to stop, or nothing."""
    videos: dict[str, Path] = {}
    with inference(session):
        losses = validator.held_out_loss()
        if losses:
            _write(session, {"step": step, **losses}, step)
            progress.say(f"step {step}: held-out loss {losses['held_out_loss']:.4f}")
        if session.accelerator.is_main_process:
            videos = validator.sample_videos(step)
        for video in videos.values():
            progress.say(f"step {step}: sample {video}")
    tracking.log_videos(session, list(videos.values()), step)
    reason = watch.sampled(session, step, videos)
    session.accelerator.wait_for_everyone()
    return reason


def _save(session: Session, position: Position, resolved: str) -> None:
    folder = state.save(session, position, resolved)
    if session.accelerator.is_main_process:
        session.folder.write_status(
            state="training", step=position.step, world_size=session.accelerator.num_processes, exit_code=None,
            reason=None, checkpoint=str(folder),
        )  # fmt: skip
    session.accelerator.wait_for_everyone()


def _write(session: Session, line: Mapping[str, float | None], step: int) -> None:
    if session.accelerator.is_main_process:
        session.folder.append_metrics(dict(line))
    tracking.log(session, {key: value for key, value in line.items() if value is not None}, step)
