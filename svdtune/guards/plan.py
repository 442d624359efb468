"""Which settings fit a device, and which of those is fastest: rows over the options of `memory`, each from a recorded step.

A step is recorded once for each way to compute; optimizer state and averages are there throughout and are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from svdtune.config.load import with_overrides
from svdtune.config.schema import Config
from svdtune.engine import sharding
from svdtune.errors import SvdtuneError
from svdtune.guards.cost import StepCost
from svdtune.guards.memory import CONTEXT, GIB, Estimate, estimate
from svdtune.guards.plan_ops import H100
from svdtune.guards.plan_pass import record
from svdtune.guards.plan_step import Recording
from svdtune.launch import world_size
from svdtune.trainer.optimizer import state_bytes

_LEVELS = (("none", False), ("level0", False), ("units", False), ("units", True), ("nested", False), ("nested", True))
"""What is recomputed, and whether the inputs of it wait in the machine's memory: from the fastest to what needs least."""
_ROUNDED = "memory.parameters=bf16"
_EIGHT = "train.optimizer=adamw8bit"
Changes = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A set of changes to the configuration, and what comes of it."""

    changes: Changes
    needed: Estimate
    cost: StepCost
    seconds: float
    """Of one micro-step and the optimizer's step, at the least, on an H100."""
    clips: int
    """Of that micro-step."""
    fits: bool | None
    """None: no device was named."""
    exact: bool = True
    """Whether training computes the same numbers as with the configuration as it is, but for rounding."""
    keeps: bool = True
    """Whether the same clips are learned in the same way; other rows are shown and never picked."""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """One row of `--json`."""
        return {
            "changes": list(self.changes),
            **self.needed.as_json(),
            "seconds_at_least": round(self.seconds, 4),
            "seconds_a_clip": round(self.seconds / self.clips, 4),
            "tflops": round(self.cost.flops / 1e12, 2),
            "model_tflops": round(self.cost.model_flops / 1e12, 2),
            "fits": self.fits,
            "exact": self.exact,
            "note": self.note,
        }


@dataclass
class Planner:
    """Rows for one configuration and a device of `capacity` bytes; what was recorded is kept."""

    config: Config
    capacity: int | None = None
    factor: float = 1.0
    """What a prediction was too low by, once measured."""
    _recorded: dict[str, Recording] = field(default_factory=dict)

    def row(self, *changes: str, note: str = "", keeps: bool = True) -> Row:
        """The configuration with `changes`. Raises ConfigError for one that the configuration refuses."""
        config = with_overrides(self.config, list(changes)) if changes else self.config
        recording = self._of(config)
        needed, cost = self._needed(recording), StepCost(recording.costs)
        exact = config.memory.parameters == self.config.memory.parameters and (
            config.train.optimizer == self.config.train.optimizer
        )
        state = 2 * int(recording.trained_parameters * state_bytes(config)) / H100.bandwidth
        seconds = cost.seconds + (state if config.memory.parameters == "fp32" else 0.0)
        return Row(changes, needed, cost, seconds, config.train.batch_size, self._fits(needed), exact, keeps, note)

    def exact(self) -> Iterator[Changes]:
        """Settings of `memory` that change no number, from the fastest to the one that needs least."""
        memory, ema = self.config.memory, self.config.train.ema
        change: Changes = ()
        for level, offload in _LEVELS:
            own = memory.checkpointing == level or (memory.checkpointing == "auto" and level == "units")
            change = () if own else (f"memory.checkpointing={level}",)
            change += () if offload == memory.offload else (f"memory.offload={str(offload).lower()}",)
            yield change
            if ema and not memory.ema_on_cpu:
                yield (*change, "memory.ema_on_cpu=true")
        if memory.vae_chunk > 1:  # where encoder or decoder is the peak
            yield (*change, *(("memory.ema_on_cpu=true",) if ema else ()), "memory.vae_chunk=1")

    def one_by_one(self) -> Iterator[Changes]:
        """One clip at a time, with as many clips per update."""
        train = self.config.train
        if train.batch_size > 1:
            split = "train.batch_size=1", f"train.accumulation={train.accumulation * train.batch_size}"
            yield from ((*changes, *split) for changes in self.exact())

    def rounded(self) -> Iterator[Changes]:
        """The same with bf16 parameters, where that is a change."""
        if self.config.memory.parameters == "fp32":
            for changes in self.exact():
                yield (*changes, _ROUNDED)

    def eight(self) -> Iterator[Changes]:
        """And with 8-bit states, which are no option of `memory`: shown by `svdtune plan`, never picked by memory.plan=auto."""
        if self.config.train.optimizer == "adamw" and not sharding():
            rounded = list(self.rounded()) or list(self.exact())
            yield from ((*changes, _EIGHT) for changes in rounded)

    def pick(self, *, beyond: bool = False, below: int | None = None) -> Row | None:
        """The fastest that fits: one that changes no number if there is one; None where nothing fits or no device is named.

        `beyond`: with options of `train` too, which memory.plan=auto leaves alone. `below`: only with a peak of fewer bytes.
        """
        if self.capacity is None:
            return None
        groups = [
            self.exact(),
            *([self.one_by_one()] if beyond else []),
            self.rounded(),
            *([self.eight()] if beyond else []),
        ]
        for group in groups:
            for changes in group:
                row = self.tried(changes)
                if row and row.fits and (below is None or row.needed.peak < below):
                    return row
        return None

    def tried(self, changes: Changes, **said: Any) -> Row | None:
        """The row, or None where the configuration refuses the changes."""
        try:
            return self.row(*changes, **said)
        except SvdtuneError:
            return None

    def _of(self, config: Config) -> Recording:
        """Recorded without average, with 32-bit state; both are added."""
        train = replace(
            config.train,
            ema=False,
            optimizer="adamw" if config.train.optimizer == "adamw8bit" else config.train.optimizer,
        )
        alone = replace(config, train=train)
        key = repr((alone.model, alone.conditioning.bridge, alone.adapt, alone.memory.checkpointing, alone.memory.offload,
                    alone.memory.parameters, alone.memory.attention, alone.memory.vae_chunk, train.batch_size, train.accumulation > 1,
                    train.precision, alone.data.num_frames, alone.data.height, alone.data.width, bool(alone.data.latents)))  # fmt: skip
        if key not in self._recorded:
            self._recorded[key] = record(alone)
        recording = self._recorded[key]
        averages = 4 if config.train.ema and not config.memory.ema_on_cpu else 0
        return recording.with_optimizer(int(recording.trained_parameters * (state_bytes(config) + averages)))

    def _needed(self, recording: Recording) -> Estimate:
        return estimate(recording, shards=world_size() if sharding() else 1)

    def _fits(self, needed: Estimate) -> bool | None:
        if self.capacity is None:
            return None
        return needed.fits(int((self.capacity - CONTEXT) / self.factor) + CONTEXT)


def with_plan(config: Config, capacity: int | None) -> tuple[Config, str]:
    """The configuration that `memory.plan=auto` trains with on a device of `capacity` bytes, and one line that says so."""
    if capacity is None:
        return config, "memory.plan=auto: no GPU is visible, the settings of memory stay as they are"
    planner = Planner(config, capacity)
    row = planner.pick()
    size = f"{capacity / GIB:.1f} GiB"
    if row is None:
        return (
            config,
            f"memory.plan=auto: nothing of memory makes this run fit into {size}; the settings stay as they are",
        )
    planned = with_overrides(config, list(row.changes)) if row.changes else config
    picked = " ".join(row.changes) or "the settings as they are"
    rounded = "" if row.exact else ", which rounds by chance: nothing exact fits"
    return planned, f"memory.plan=auto: {picked}{rounded}; {told(row.needed)} of {size}"


def planned(config: Config, given: int | None = None) -> tuple[Config, str]:
    """`config` with what memory.plan=auto means on this machine (or a device of `given` bytes), and what to tell of it."""
    if config.memory.plan is None:
        return config, ""
    return with_plan(config, _smallest() if given is None else given)


def _smallest() -> int | None:
    """Of this machine's GPUs, so that its processes pick alike."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties: list[Any] = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return min(one.total_memory for one in properties)


def told(needed: Estimate) -> str:
    """`about 12.3 GiB allocated, 14.0 GiB reserved`."""
    return f"about {needed.peak / GIB:.1f} GiB allocated, {needed.reserved / GIB:.1f} GiB reserved"


def sizes(config: Config) -> Sequence[tuple[Changes, str]]:
    """Other clips than the configuration's, to compare: shown, never picked."""
    data, batch = config.data, config.train.batch_size
    found: list[tuple[Changes, str]] = [((f"train.batch_size={2 * batch}",), "more clips at a time")]
    if data.num_frames > 14:
        found.append((("data.num_frames=14",), "other clips"))
    half = tuple(f"data.{key}={max(16, getattr(data, key) * 5 // 9 // 64 * 64)}" for key in ("height", "width"))
    found.append((half, "other clips"))
    return found
