"""What goes wrong while a run trains: losses and gradients that jump, slow steps, an idle GPU, samples that fall apart.

Pure: it is told what happened and answers with findings; nothing is read, written or stopped here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from svdtune.guards.findings import Finding
from svdtune.guards.live.motion import Look, look_at

if TYPE_CHECKING:
    from svdtune.trainer.watch import Seen

_CALM = 100
"""Steps without a sign of it after which trouble is over: what comes then is told again."""

_HISTORY = 200
"""Steps that say what is usual."""
_ENOUGH = 50
"""Steps before anything is called unusual."""
_REFRESH = 10
"""Steps between two looks at the history: sorting it is the dear part."""
_LASTING = 16
"""Steps that a jump must last: of one step's loss nothing follows at batch 1."""
_HIGH = 1.5
"""Spreads (as standard deviations) that the mean of `_LASTING` steps may lie above the median: six of its own deviations."""
_EXTREME = 8.0
"""Spreads at which one step is enough."""
_CLIPPED = 4.0
"""Spreads that one step counts for at most, so that two wild ones do not look like a level."""

_WARM = 5
"""First steps, which choose kernels, fill caches and start workers."""
_PACE = 50
"""Steps whose times are looked at together."""
_STARVED = 0.5
"""Share of the time spent waiting for clips."""
_SLOWER = 1.5
"""Times the best pace: boost clocks that settle stay below it, and so do medians of `_PACE` times that vary by 30 %."""
_STALLED = 10.0
"""Times the best pace that one step may take."""

_COLLAPSED = 0.25
"""Share of the motion of training clips and of step 0: samples of one model differ by less, frozen ones are near 0."""
_STILL = 0.0005
"""Flow (share of the width per frame) below which training clips do not move: near what noise and compression give."""
_ALIKE = 0.1
"""How much lower the first-frame similarity of frozen samples may be than that of the clips; fast samples are far below."""
_COPIES = 1.0
"""Grey levels (of 255) by which copies of the first frame may differ from it: what compression does."""
_LEFT = 0.3
"""First-frame similarity that must be lost against clips and step 0."""
_FLAT = 0.1
"""Share of the clips' contrast."""
_NOISE = 0.5
"""Coherence that must be lost against the clips."""


@dataclass
class Episodes:
    """Tells trouble from its going on."""

    calm: int
    """Ticks without it that end it."""
    last: dict[str, int] = field(default_factory=dict)
    """Tick of the last sign of each code."""

    def opens(self, code: str, tick: int) -> bool:
        """There is a sign of `code` at `tick`; whether it is the first one."""
        before = self.last.get(code)
        self.last[code] = tick
        return before is None or tick - before > self.calm


@dataclass(frozen=True)
class Jumped:
    """Values are `times` the usual ones, over the last `steps` steps."""

    times: float
    steps: int


@dataclass
class History:
    """Logarithms of the last values of one quantity, and what is usual among them."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    added: int = 0
    centre: float = 0.0
    spread: float = 0.0

    def add(self, value: float) -> None:
        """Median and spread (MAD, as a standard deviation) follow every `_REFRESH` values."""
        self.values.append(value)
        self.added += 1
        if self.added >= _ENOUGH and self.added % _REFRESH == 0:
            self.centre = median(self.values)
            self.spread = 1.4826 * median(abs(value - self.centre) for value in self.values)


@dataclass
class Level:
    """Watches positive values of heavy spread, each compared with the past of its own kind (losses: of its noise levels)."""

    least: float
    """Factor below which a lasting rise is no jump, however steady the values were."""
    past: dict[str, History] = field(default_factory=dict)
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_LASTING))
    """Of the last steps: spreads above the median, and logarithm of the factor."""

    def step(self, values: Mapping[str, float]) -> Jumped | None:
        """One step's values, by kind."""
        logs = {kind: math.log(value) for kind, value in values.items() if math.isfinite(value) and value > 0}
        rises = [rise for kind, value in logs.items() if (rise := self._rise(kind, value))]
        for kind, value in logs.items():
            self.past.setdefault(kind, History()).add(value)
        if not rises:
            return None
        highest, times = max(rises)
        clipped = [max(-_CLIPPED, min(_CLIPPED, spreads)) for spreads, _ in rises]
        self.recent.append((_mean(clipped), _mean([factor for _, factor in rises])))
        if highest > _EXTREME:
            return Jumped(math.exp(times), 1)
        if len(self.recent) == _LASTING and _mean([spreads for spreads, _ in self.recent]) > _HIGH:
            return Jumped(math.exp(_mean([factor for _, factor in self.recent])), _LASTING)
        return None

    def _rise(self, kind: str, value: float) -> tuple[float, float] | None:
        usual = self.past.get(kind)
        if usual is None or usual.added < _ENOUGH:
            return None
        above = value - usual.centre
        return above / max(usual.spread, math.log(self.least) / _HIGH), above


@dataclass
class Pace:
    """Times of the last steps in seconds: with and without waiting for clips."""

    seen: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_PACE))
    waited: deque[float] = field(default_factory=lambda: deque(maxlen=_PACE))
    worked: deque[float] = field(default_factory=lambda: deque(maxlen=_PACE))
    best: float = math.inf
    """Lowest median of `_PACE` steps without waiting, so far."""

    def add(self, seconds: float, waited: float) -> bool:
        """Whether there are enough steps to judge."""
        self.seen += 1
        if self.seen <= _WARM:
            return False
        self.seconds.append(seconds)
        self.waited.append(waited)
        self.worked.append(max(0.0, seconds - waited))
        if len(self.worked) < _PACE:
            return False
        self.best = min(self.best, median(self.worked))
        return True


@dataclass
class Flight:
    """State of the watch over one run. Each trouble is told once, and again only after it was over."""

    loss: Level = field(default_factory=lambda: Level(least=2.0))
    gradient: Level = field(default_factory=lambda: Level(least=5.0))
    pace: Pace = field(default_factory=Pace)
    base: Mapping[str, Look] = field(default_factory=dict)
    """Samples of step 0, by name; empty in a run that was resumed, until it is given them."""
    calls: int = 0
    """Of `sampled`."""
    steps: Episodes = field(default_factory=lambda: Episodes(_CALM))
    samples: Episodes = field(default_factory=lambda: Episodes(1))

    def stepped(self, seen: Seen) -> list[Finding]:
        """What is new after an optimizer step: SEM540, SEM541, DAT340, ENV040."""
        found = []
        if jumped := self.loss.step(seen.report.loss_by_sigma):
            found.append(_loss_jumped(seen, jumped))
        if jumped := self.gradient.step({"": seen.grad_norm}):
            found.append(_gradient_jumped(seen, jumped))
        if self.pace.add(seen.seconds, seen.waited):
            found += [*_starved(seen, self.pace), *_slow(seen, self.pace)]
        return [finding for finding in found if self.steps.opens(finding.code, seen.step)]

    def sampled(self, step: int, videos: Mapping[str, np.ndarray], clips: Sequence[np.ndarray]) -> list[Finding]:
        """What is new in sample videos by name, against training clips: SEM542, SEM543, SEM544.

        All are uint8 (t, h, w, 3) of one size and frame rate. Videos of step 0 are remembered as what the base makes.
        """
        if not videos or not clips:
            return []
        self.calls += 1
        training, looks = [look_at(clip) for clip in clips], {name: look_at(video) for name, video in videos.items()}
        spoilt = {name: what for name, look in looks.items() if (what := _spoilt(look, training))}
        sound = {name: look for name, look in looks.items() if name not in spoilt}
        if step == 0:
            self.base = sound
        # The same pictures then and now; a sample of another picture says nothing.
        base = [self.base[name] for name in sound if name in self.base]
        found = [_fell_apart(step, spoilt)] if spoilt else []
        if sound:
            now = list(sound.values())
            found += [*_stopped(step, now, base, training), *_left(step, now, base, training)]
        return [finding for finding in found if self.samples.opens(finding.code, self.calls)]


def _loss_jumped(seen: Seen, jumped: Jumped) -> Finding:
    return Finding(
        "SEM540", "warning", "loss", f"{_over(seen, jumped)} (loss {seen.report.loss:.3g})",
        f"losses around the median of the last {_HISTORY} steps of the same noise levels",
        "Losses of single steps vary with noise level and clip; this one left the spread of its own noise levels, so the weights or the "
        "clips have changed.",
        "If it does not come back, go on from the checkpoint before it with a lower train.lr, a longer train.warmup or a smaller "
        "train.clip_norm; if it does, look at the clips of these steps.")  # fmt: skip


def _gradient_jumped(seen: Seen, jumped: Jumped) -> Finding:
    return Finding(
        "SEM541", "warning", "gradient norm", f"{_over(seen, jumped)} (norm {seen.grad_norm:.3g} before clipping)",
        f"norms around the median of the last {_HISTORY} steps",
        "Gradients grow before the loss does. Clipped, they still push the weights by the full step in a direction that one clip chose.",
        "Lower train.lr, lengthen train.warmup, set train.clip_norm=1; train.precision=bf16 instead of fp16.")  # fmt: skip


def _over(seen: Seen, jumped: Jumped) -> str:
    if jumped.steps == 1:
        return f"{jumped.times:.3g} times the usual in step {seen.step}"
    return f"{jumped.times:.3g} times the usual over {jumped.steps} steps, up to step {seen.step}"


def _starved(seen: Seen, pace: Pace) -> list[Finding]:
    seconds, waited = sum(pace.seconds), sum(pace.waited)
    if waited <= _STARVED * seconds:
        return []
    return [Finding(
        "DAT340", "warning", "data.workers",
        f"{waited / seconds:.0%} of the time of {_PACE} steps, up to step {seen.step}, was waiting for clips: {waited / _PACE:.3g} s of "
        f"{seconds / _PACE:.3g} s a step, {max(pace.waited):.3g} s at most",
        f"at most {_STARVED:.0%}; none where the loader keeps up",
        "The GPU is idle while no clip is ready.",
        "Raise data.workers while cores are free; leave data.decoder=auto; re-encode the files near data.height x "
        "data.width; put data.root on a local disk.")]  # fmt: skip


def _slow(seen: Seen, pace: Pace) -> list[Finding]:
    usual, last = median(pace.worked), pace.worked[-1]
    if last > _STALLED * pace.best:
        got = f"step {seen.step} took {last:.3g} s, {last / pace.best:.3g} times the best pace of this run"
    elif usual > _SLOWER * pace.best:
        got = f"{usual:.3g} s a step over {_PACE} steps, up to step {seen.step}: {usual / pace.best:.3g} times the best pace of this run"
    else:
        return []
    return [Finding(
        "ENV040", "warning", "seconds per step", f"{got} (waiting for clips left out)",
        f"about {pace.best:.3g} s; less than {_SLOWER:g} times that for {_PACE} steps, less than {_STALLED:g} times for one",
        "Every step computes the same, so the machine has become slower: a hot GPU that lowers its clock, a neighbour on the GPU or "
        "CPU, swapping, or GPU memory so full that it is freed and asked for again in each step.",
        "Look at clocks, temperature and processes with nvidia-smi, and at swap with free; where GPU memory is full, lower "
        "memory.vae_chunk or train.batch_size.")]  # fmt: skip


def _spoilt(look: Look, training: Sequence[Look]) -> str:
    if look.contrast < _FLAT * median(clip.contrast for clip in training):
        return f"one flat colour (contrast {look.contrast:.2g} of 255)"
    if look.coherence < median(clip.coherence for clip in training) - _NOISE:
        return f"noise (neighbouring frames or pixels correlate by {look.coherence:.2f})"
    return ""


def _fell_apart(step: int, spoilt: Mapping[str, str]) -> Finding:
    first = step == 0
    return Finding(
        "SEM544", "warning", ", ".join(spoilt),
        f"{'; '.join(f'{name} is {what}' for name, what in spoilt.items())} at step {step}",
        f"pictures: contrast above {_FLAT:.0%} of the training clips', and frames and pixels that go with their neighbours",
        "Nothing was trained yet: the base, its VAE or the sampler's settings are wrong." if first
        else "The weights have left what the VAE can show, or values became NaN or infinite on the way (they are written as black).",
        "Check model.pretrained and the first frames, and raise validation.inference_steps." if first
        else "Go on from the last checkpoint with good samples, with a lower train.lr.")  # fmt: skip


def _stopped(step: int, now: Sequence[Look], base: Sequence[Look], training: Sequence[Look]) -> list[Finding]:
    flow, clips = median(look.flow for look in now), median(clip.flow for clip in training)
    if clips < _STILL:
        return []
    others = [clips, *([median(look.flow for look in base)] if base else [])]
    change = median(look.change for look in now)
    kept = median(look.similarity for look in now) >= median(clip.similarity for clip in training) - _ALIKE
    copies = change < _COPIES and flow < _COLLAPSED * clips
    if not copies and (flow >= _COLLAPSED * min(others) or not kept):
        return []
    moved = (
        [f"{others[1]:.2%} at step 0", f"{clips:.2%} in training clips"] if base else [f"{clips:.2%} in training clips"]
    )
    got = f"median flow {flow:.2%} of the width per frame at step {step}; {', '.join(moved)}"
    return [Finding(
        "SEM542", "warning", "samples", f"{got}{'; all frames are copies of the first one' if copies else ''}",
        f"more than {_COLLAPSED:.0%} of the motion of training clips or of step 0",
        "The usual death of an SVD fine-tune: copying the first frame, which it is given, costs less loss than moving it.",
        "Go on from the last checkpoint that moved, with a lower train.lr; raise the mean of conditioning.noise_aug (a noisier first "
        "frame is harder to copy) or objective.p_mean; set data.motion_bucket to what the clips do; leave out clips that stand still.",
    )]  # fmt: skip


def _left(step: int, now: Sequence[Look], base: Sequence[Look], training: Sequence[Look]) -> list[Finding]:
    kept, clips = median(look.similarity for look in now), [clip.similarity for clip in training]
    usual = median(clips)
    spread = 1.4826 * median(abs(similarity - usual) for similarity in clips)
    before = median(look.similarity for look in base) if base else math.inf
    limit = min(usual - max(_LEFT, 3 * spread), before - _LEFT)
    if kept >= limit:
        return []
    then = f"{before:.2f} at step 0, " if base else ""
    return [Finding(
        "SEM543", "warning", "samples",
        f"last and first frame correlate by {kept:.2f} at step {step}; {then}{usual:.2f} in training clips",
        f"at least {limit:.2f}",
        "Samples should keep what their first frame shows as far as training clips do; colours and shapes now drift away from it.",
        "Go on from the last checkpoint with good samples, with a lower train.lr; lower the mean of conditioning.noise_aug and "
        "conditioning.dropout, so that the first frame is worth following.")]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
