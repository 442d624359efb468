"""The loop: micro-steps to an update, and around it logging, validation and checkpoints, each from its own module."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from svdtune.checkpoint.tensors import whole
from svdtune.contracts import Batch, move
from svdtune.data.latents import read_index
from svdtune.data.loader import make_loader
from svdtune.diffusion.draws import draws_for
from svdtune.errors import Diverged, Refused, Stopped
from svdtune.trainer import state, tracking
from svdtune.trainer.agreement import Agreement, Halt, agree
from svdtune.trainer.build import PATIENCE, Session
from svdtune.trainer.metrics import StepReport, reduce_step
from svdtune.trainer.progress import Progress, memory_gib
from svdtune.trainer.signals import StopWish
from svdtune.trainer.state import Position
from svdtune.trainer.step import train_step
from svdtune.trainer.validate import Validator, inference
from svdtune.trainer.watch import Seen, Watch

# fp16's loss scale starts too high and is halved at each overflow: a few skipped updates are how it is found.
MAX_SKIPPED = 20
_STATUS_SECONDS = 10
"""Between two writings of the step into status.json, each of which waits for the disk."""


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


@dataclass
class Run:
    """What the loop moves on."""

    session: Session
    resolved: str
    """The YAML that checkpoints carry."""
    watch: Watch
    position: Position
    progress: Progress
    agreement: Agreement
    validator: Validator
    saved: int
    """The step of the newest checkpoint; 0 before the first."""
    skipped: int = 0
    """Updates left out one after another, by fp16's loss scale."""
    told: float = -math.inf
    """When status.json was last told the step."""


def run_loop(session: Session, position: Position, resolved: str, wish: StopWish, watch: Watch) -> Position:
    """Train from `position` to `train.steps`; `resolved` is the YAML that checkpoints carry.

    Raises Diverged (no update made), Stopped or Refused (asked for by a signal or by `watch`; checkpoint saved).
    """
    config = session.config
    progress = Progress(
        config.train.steps, session.clips_per_step, config.train.log_interval, session.accelerator.is_main_process
    )
    agreement = agree(wish, session.accelerator.num_processes, PATIENCE)
    run = Run(
        session, resolved, watch, position, progress, agreement, Validator(session, agreement), saved=position.step
    )
    try:
        _train(run)
    except Halt as halt:
        # Its frames keep the loader, whose workers are told to end only while their queues are whole: not by the collector.
        halted = halt.with_traceback(None)
    else:
        if session.accelerator.is_main_process:
            run.validator.sheet(run.position.step)
        return run.position
    session.optimizer.zero_grad(set_to_none=True)  # the resumed run makes those micro-steps again
    if run.position.step != run.saved:
        _save(run)
    _tell_step(run)
    said = _where_it_stopped(halted.name, position, run.position)
    raise Refused(said) if halted.refused else Stopped(said, halted.name)


def _train(run: Run) -> None:
    session, train = run.session, run.session.config.train
    if run.position.step == 0:
        _validate(run)
    batches = iter(loader_from(session, run.position))
    while run.position.step < train.steps:
        run.progress.begin()
        lr = float(session.schedule.get_last_lr()[0])
        accumulated = accumulate(session, batches, run.agreement.check)
        grad_norm, report = update(session, accumulated)
        run.skipped = run.skipped + 1 if not math.isfinite(report.grad_norm) else 0
        _halt_if_diverged(session, run.position, accumulated, report, run.skipped, run.watch)
        run.position = Position(run.position.step + 1, run.position.samples + session.clips_per_step)
        seconds = _report(run, report, lr)
        clips = accumulated.samples, accumulated.noise, accumulated.names
        seen = Seen(run.position.step, report, grad_norm, seconds, accumulated.waited, *clips)
        refused = run.watch.stepped(session, seen)
        _after_update(run, refused)
    run.agreement.check()


def _after_update(run: Run, refused: str) -> None:
    config, step = run.session.config, run.position.step
    last = step == config.train.steps
    if not last:
        run.agreement.wish.ask(refused)
    if last or step % config.validation.interval == 0:
        _validate(run)
    if last or step % config.checkpoint.interval == 0:
        _save(run)


def _where_it_stopped(name: str, start: Position, end: Position) -> str:
    if end.step > start.step:
        return f"stopped by {name} after step {end.step}; the checkpoint is saved. Run the same command again to go on."
    if end.step:
        where = f"at step {end.step}, from which it was resumed: that checkpoint is the newest"
        return f"stopped by {name} {where}. Run the same command again to go on."
    return f"stopped by {name} before the first update: there is nothing to save. Run the same command again to start."


def loader_from(session: Session, position: Position) -> Iterator[Batch]:
    """The batches of this rank from `position` on."""
    config, accelerator = session.config, session.accelerator
    return make_loader(
        config.data,
        read_index(config) if config.data.latents else session.catalog.train,
        seed=config.run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        batch_size=config.train.batch_size,
        first_sample=position.samples,
        last_sample=position.samples + (config.train.steps - position.step) * session.clips_per_step,
    )


def _go_on() -> None:
    """Nobody is asked whether to stop."""


def accumulate(session: Session, batches: Iterator[Batch], before_each: Callable[[], None] = _go_on) -> Accumulated:
    """The micro-steps of one update: afterwards the gradients are those of the mean loss over all clips of all ranks.

    What `before_each` raises before a micro-step passes through.
    """
    config, accelerator, parts = session.config, session.accelerator, session.parts
    losses, drawn, samples, names, waited = [], [], [], [], 0.0
    for micro in range(config.train.accumulation):
        before_each()
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


def update(session: Session, accumulated: Accumulated) -> tuple[float, StepReport]:
    """One optimizer step, if loss and gradient norm are finite on every rank. Returns this rank's gradient norm, and the report."""
    accelerator, optimizer, trained = session.accelerator, session.optimizer, list(session.trained.values())
    max_norm = session.config.train.clip_norm or math.inf
    grad_norm = torch.as_tensor(accelerator.clip_grad_norm_(trained, max_norm))
    grad_norm = whole(grad_norm).to(accelerator.device)  # of shards each rank has a part of it too
    own_norm, report = reduce_step(accelerator, accumulated.losses, accumulated.sigmas, grad_norm)
    # With a loss scale, step() itself leaves the weights alone on overflow and lowers the scale.
    if math.isfinite(report.loss) and (math.isfinite(report.grad_norm) or accelerator.scaler is not None):
        optimizer.step()
        session.schedule.step()
        if session.ema is not None:
            session.ema.step(trained)
    optimizer.zero_grad(set_to_none=True)
    return own_norm, report


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


def _report(run: Run, report: StepReport, lr: float) -> float:
    """The seconds that the step took."""
    session, progress, position = run.session, run.progress, run.position
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
    run.agreement.wish.allow(seconds / session.config.train.accumulation)
    if session.accelerator.is_main_process:
        session.folder.beat()
        if time.monotonic() > run.told + _STATUS_SECONDS:
            _tell_step(run)
    return seconds


def _validate(run: Run) -> None:
    """Raises Halt on every rank when one wants to stop."""
    session, step = run.session, run.position.step
    with inference(session):
        losses = run.validator.held_out_loss()
        if losses:
            _write(session, {"step": step, **losses}, step)
            run.progress.say(f"step {step}: held-out loss {losses['held_out_loss']:.4f}")
        videos = _sample(run)
    if videos is not None:
        _show(run, videos)
    with nullcontext() if session.accelerator.is_main_process else run.agreement.wish.waiting():
        session.accelerator.wait_for_everyone()
    run.agreement.check()


def _sample(run: Run) -> dict[str, Path] | None:
    """What the main process sampled, nothing on other ranks; None where a signal cut it short: the ranks agree on that afterwards."""
    if not run.session.accelerator.is_main_process:
        return {}
    try:
        return run.validator.sample_videos(run.position.step)
    except Halt:
        return None


def _show(run: Run, videos: dict[str, Path]) -> None:
    session, step = run.session, run.position.step
    for video in videos.values():
        run.progress.say(f"step {step}: sample {video}")
    tracking.log_videos(session, list(videos.values()), step)
    refused = run.watch.sampled(session, step, videos)
    if step < session.config.train.steps:
        run.agreement.wish.ask(refused)


def _save(run: Run) -> None:
    session, position, began = run.session, run.position, time.monotonic()
    main = session.accelerator.is_main_process
    with run.agreement.wish.waiting():
        if main:
            session.folder.beat()
        folder = state.save(session, position, run.resolved)  # on every rank: each may hold a part
        if main:
            seconds = round(time.monotonic() - began, 3)
            session.folder.write_status(checkpoint=str(folder), checkpoint_seconds=seconds)
            session.folder.beat()
        session.accelerator.wait_for_everyone()
    run.saved = position.step
    _tell_step(run)


def _tell_step(run: Run) -> None:
    run.told = time.monotonic()
    if run.session.accelerator.is_main_process:
        run.session.folder.write_status(step=run.position.step)


def _write(session: Session, line: Mapping[str, float | None], step: int) -> None:
    if session.accelerator.is_main_process:
        session.folder.append_metrics(dict(line))
    tracking.log(session, {key: value for key, value in line.items() if value is not None}, step)
