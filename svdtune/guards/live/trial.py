"""Two updates of the real loop that are taken back: do gradients reach what learns, and nothing else, and does it move.

The session is as before afterwards, equal to the bit: weights, optimizer, schedule, averages, loss scale.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch

from svdtune.checkpoint.tensors import local
from svdtune.contracts import Batch
from svdtune.guards.findings import Finding
from svdtune.guards.live import learning, updates
from svdtune.guards.live.learning import STEPS, Before
from svdtune.guards.live.observe import aside
from svdtune.guards.live.precision import culprit_of, not_finite
from svdtune.guards.live.saved import recomputed, saved
from svdtune.trainer import loop
from svdtune.trainer.build import Session
from svdtune.trainer.loop import Accumulated
from svdtune.trainer.state import Position, raw_optimizer

_SCALE = 256.0


@dataclass(frozen=True)
class Measured:
    """What the two updates took on this device."""

    seconds: float
    """The second update; the first one warms up."""
    peak: int | None
    """Bytes allocated at the most; None on a CPU."""
    reserved: int | None

    def as_json(self, session: Session, position: Position) -> dict[str, Any]:
        """What preflight.json shows as `measured`."""
        hours = self.seconds * (session.config.train.steps - position.step) / 3600
        gib = {"peak_gib": self.peak, "reserved_gib": self.reserved}
        shown = {name: round(value / 2**30, 3) for name, value in gib.items() if value is not None}
        return {
            "device": _device_name(session),
            "seconds_per_step": round(self.seconds, 4),
            "hours": round(hours, 3),
            **shown,
        }


@dataclass
class Trial:
    """What is found on the way."""

    findings: list[Finding] = field(default_factory=list)
    measured: Measured | None = None


def make_trial(session: Session, position: Position, after_backward: Callable[[Accumulated], None]) -> Trial:
    """Both updates. `after_backward` is called once, where the gradients of the first are there."""
    trial, quiet = Trial(), _quiet(session)
    with restored(session) as before:
        trial.findings += [*recomputed(quiet, position), *updates.check_schedule(session), *updates.check_lora(session)]
        batches = iter(loop.loader_from(quiet, position))
        _full_rate(session)
        _calm(session)
        first, found = _watched_backward(quiet, position, batches)
        trial.findings += found
        in_first = learning.reached(session)
        after_backward(first)
        if not _update(trial, quiet, first, 1):
            trial.findings += [not_finite(culprit_of(quiet, position))]
            return trial
        trial.findings += learning.left_over(session)
        after_first = updates.first_weights(session, learning.watched(session))
        _full_rate(session)
        clock = _Clock(session)
        second = loop.accumulate(quiet, batches)
        in_second, gradients = learning.reached(session), learning.local_gradients(session)
        in_both, reached = in_first & in_second, in_first | in_second
        finite = _update(trial, quiet, second, 2)
        trial.measured = clock.read(second.waited)
        if not finite:
            after_one = Position(position.step + 1, position.samples + session.clips_per_step)
            trial.findings += [not_finite(culprit_of(quiet, after_one))]
            return trial
        trial.findings += [*learning.without(session, reached), *learning.held(session)]
        trial.findings += [*learning.moved(session, before, gradients, in_both), *learning.averaged(session, before)]
        trial.findings += [*updates.check_averages(session, after_first), *updates.check_inference(session)]
        del gradients
        if session.accelerator.is_main_process or session.sharding:
            trial.findings += saved(session, position)
    return trial


def one_backward(session: Session, position: Position, after_backward: Callable[[Accumulated], None]) -> Trial:
    """For a resumed run, whose optimizer state would be costly to keep: the gradients of one step, and no update."""
    quiet = _quiet(session)
    try:
        accumulated, found = _watched_backward(quiet, position, iter(loop.loader_from(quiet, position)))
        after_backward(accumulated)
        return Trial([*found, *learning.held(session), *updates.check_schedule(session), *updates.check_lora(session)])
    finally:
        for parameter in session.trained.values():
            parameter.grad = None


def _watched_backward(
    session: Session, position: Position, batches: Iterator[Batch]
) -> tuple[Accumulated, list[Finding]]:
    """The micro-steps of one update, and what their gradients are like."""
    with learning.slopes(session) as slopes, learning.sums(session) as sums:
        accumulated = loop.accumulate(session, batches)
    found = [
        *learning.scaled(session, slopes, accumulated),
        *learning.added(session, sums),
        *learning.strangers(session),
    ]
    return accumulated, [*found, *updates.check_micro_steps(session, position, accumulated)]


def _update(trial: Trial, session: Session, accumulated: Accumulated, number: int) -> bool:
    """The real update, checked; whether loss and gradients were finite on every rank."""
    start = updates.start(session)
    norm, report = loop.update(session, accumulated)
    if not (isfinite(report.loss) and isfinite(report.grad_norm)):
        return False
    trial.findings += updates.check_update(session, start, norm, number)
    return True


def _calm(session: Session) -> None:
    """A small loss scale: fp16's own start is too high and finds its place by leaving updates out, which is no fault."""
    scaler = session.accelerator.scaler
    if scaler is not None:
        scaler.scale(torch.zeros(1, device=session.accelerator.device))  # made at its first use
        scaler.update(_SCALE)


def _quiet(session: Session) -> Session:
    """The same run without worker processes, with a clip left for both updates, nothing dropped (a dropped token has no gradient)."""
    return aside(session, f"train.steps={session.config.train.steps + STEPS}", "conditioning.dropout=0")


def _full_rate(session: Session) -> None:
    """The rate of the warmed-up run: with that of step 0, often zero, nothing would move."""
    for group in raw_optimizer(session).param_groups:
        group["lr"] = session.config.train.lr


@contextmanager
def restored(session: Session) -> Iterator[Before]:
    """Whatever happens inside is undone."""
    raw, schedule, ema, scaler = raw_optimizer(session), session.schedule, session.ema, session.accelerator.scaler
    weights = {name: local(parameter).to("cpu", copy=True) for name, parameter in session.trained.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in raw.param_groups]
    states = {parameter: copy.deepcopy(values) for parameter, values in raw.state.items()}
    scheduled = {
        key: copy.copy(value)
        for key, value in vars(schedule).items()
        if key in ("last_epoch", "_step_count", "_last_lr")
    }
    averages = [local(average).to("cpu", copy=True) for average in ema.shadow_params] if ema else []
    counters = {key: value for key, value in vars(ema).items() if isinstance(value, int | float | bool)} if ema else {}
    scale = scaler.state_dict() if scaler is not None else None
    try:
        yield Before(weights, averages)
    finally:
        with torch.no_grad():
            for name, parameter in session.trained.items():
                local(parameter).copy_(weights[name])
                parameter.grad = None
            for average, before in zip(ema.shadow_params if ema else [], averages, strict=True):
                local(average).copy_(before)
        raw.state.clear()
        raw.state.update(states)
        for group, values in zip(raw.param_groups, groups, strict=True):
            group.update(values)
        vars(schedule).update(scheduled)
        if ema:
            vars(ema).update(counters)
        if scaler is not None:
            scaler.load_state_dict(scale or {})
            scaler._per_optimizer_states.clear()  # an update that was left out keeps it from unscaling again


class _Clock:
    """Seconds and memory from here to `read`."""

    def __init__(self, session: Session) -> None:
        self.device = session.accelerator.device
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.started = time.perf_counter()

    def read(self, waited: float) -> Measured:
        """Without the seconds that the clips took: in training workers read them meanwhile."""
        if self.device.type != "cuda":
            return Measured(time.perf_counter() - self.started - waited, None, None)
        torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.started - waited
        return Measured(
            seconds, torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        )


def _device_name(session: Session) -> str:
    device = session.accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
