"""The line a person watches: rewritten in place on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from svdtune.trainer.metrics import StepReport


@dataclass
class Progress:
    """Speed of the last steps of this process; `shown` is False on every rank but the first."""

    total: int
    clips_per_step: int
    interval: int
    shown: bool
    started: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def begin(self) -> None:
        """An optimizer step starts; what happened before it (validation, saving) does not count."""
        self.started = time.perf_counter()

    def end(self) -> float:
        """The optimizer step is done; its seconds."""
        self.recent.append(time.perf_counter() - self.started)
        return self.recent[-1]

    def clips_per_second(self) -> float:
        """Mean over the last 20 steps."""
        return self.clips_per_step * len(self.recent) / sum(self.recent)

    def show(self, step: int, report: StepReport, lr: float) -> None:
        """Show optimizer step `step` (counted from 1), made with rate `lr`."""
        terminal = sys.stderr.isatty()
        if not self.shown or not (terminal or step % self.interval == 0 or step in (1, self.total)):
            return
        rate = self.clips_per_second()
        line = (
            f"step {step}/{self.total}  loss {report.loss:.4f}  lr {lr:.2e}  {rate:.2f} clips/s  "
            f"ETA {_clock((self.total - step) * self.clips_per_step / rate)}  {memory_gib():.1f} GiB"
        )
        end = "" if terminal and step < self.total else "\n"
        print(f"\r\x1b[2K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, in the place of the progress line on a terminal."""
        if self.shown:
            print(f"\r\x1b[2K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def memory_gib() -> float:
    """Peak so far: allocated on the GPU where there is one, resident in this process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
