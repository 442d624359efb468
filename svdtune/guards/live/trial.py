"""Two updates of the real loop that are taken back: do gradients reach what learns, and nothing else, and does it move.

The session is as before afterwards, equal to the bit: weights, optimizer, schedule, averages, loss scale.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch

from svdtune.config.load import with_overrides
from svdtune.guards.findings import Finding
from svdtune.guards.live import learning
from svdtune.guards.live.learning import STEPS, Before, raw_optimizer
from svdtune.guards.live.saved import recomputed, saved
from svdtune.trainer import loop
from svdtune.trainer.build import Session
from svdtune.trainer.loop import Accumulated
from svdtune.trainer.state import Position


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
        trial.findings += recomputed(quiet, position)
        batches = iter(loop.loader_from(quiet, position))
        _full_rate(session)
        with learning.slopes(session) as slopes, learning.sums(session) as sums:
            first = loop.accumulate(quiet, batches)
        trial.findings += [*learning.scaled(session, slopes, first), *learning.added(session, sums)]
        reached = learning.reached(session)
        trial.findings += learning.strangers(session)
        after_backward(first)
        loop.update(quiet, first, stop=False)
        trial.findings += learning.left_over(session)
        _full_rate(session)
        clock = _Clock(session)
        second = loop.accumulate(quiet, batches)
        reached |= learning.reached(session)
        gradients = {name: parameter.grad for name, parameter in session.trained.items()}
        norm, _ = loop.update(quiet, second, stop=False)
        trial.measured = clock.read()
        trial.findings += [*learning.without(session, reached), *learning.held(session)]
        if isfinite(norm):
            trial.findings += [*learning.moved(session, before, gradients), *learning.averaged(session, before)]
        del gradients
        if session.accelerator.is_main_process:
            trial.findings += saved(session, position)
    return trial


def one_backward(session: Session, position: Position, after_backward: Callable[[Accumulated], None]) -> Trial:
    """For a resumed run, whose optimizer state would be costly to keep: the gradients of one step, and no update."""
    quiet = _quiet(session)
    accumulated = loop.accumulate(quiet, iter(loop.loader_from(quiet, position)))
    trial = Trial([*learning.strangers(session), *learning.held(session)])
    after_backward(accumulated)
    for parameter in session.trained.values():
        parameter.grad = None
    return trial


def _quiet(session: Session) -> Session:
    """The same run without worker processes, with a clip left for both updates, nothing dropped (a dropped token has no gradient)."""
    more = session.config.train.steps + STEPS
    return replace(
        session,
        config=with_overrides(session.config, ["data.workers=0", f"train.steps={more}", "conditioning.dropout=0"]),
    )


def _full_rate(session: Session) -> None:
    """The rate of the warmed-up run: with that of step 0, often zero, nothing would move."""
    for group in raw_optimizer(session).param_groups:
        group["lr"] = session.config.train.lr


@contextmanager
def restored(session: Session) -> Iterator[Before]:
    """Whatever happens inside is undone."""
    raw, schedule, ema, scaler = raw_optimizer(session), session.schedule, session.ema, session.accelerator.scaler
    weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in session.trained.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in raw.param_groups]
    states = {parameter: copy.deepcopy(values) for parameter, values in raw.state.items()}
    scheduled = {
        key: copy.copy(value)
        for key, value in vars(schedule).items()
        if key in ("last_epoch", "_step_count", "_last_lr")
    }
    averages = [average.detach().to("cpu", copy=True) for average in ema.shadow_params] if ema else []
    counters = {key: value for key, value in vars(ema).items() if isinstance(value, int | float | bool)} if ema else {}
    scale = scaler.state_dict() if scaler is not None else None
    try:
        yield Before(weights, averages)
    finally:
        with torch.no_grad():
            for name, parameter in session.trained.items():
                parameter.copy_(weights[name])
                parameter.grad = None
            for average, before in zip(ema.shadow_params if ema else [], averages, strict=True):
                average.copy_(before)
        raw.state.clear()
        raw.state.update(states)
        for group, values in zip(raw.param_groups, groups, strict=True):
            group.update(values)
        vars(schedule).update(scheduled)
        if ema:
            vars(ema).update(counters)
        if scaler is not None:
            scaler.load_state_dict(scale or {})


class _Clock:
    """Seconds and memory from here to `read`."""

    def __init__(self, session: Session) -> None:
        self.device = session.accelerator.device
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.started = time.perf_counter()

    def read(self) -> Measured:
        if self.device.type != "cuda":
            return Measured(time.perf_counter() - self.started, None, None)
        torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.started
        return Measured(
            seconds, torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        )


def _device_name(session: Session) -> str:
    device = session.accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
