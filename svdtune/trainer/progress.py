"""The line a person watches: rewritten in place on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field

import torch

from svdtune.trainer.metrics import StepReport


@dataclass
class Progress:
    """Speed since this process started; `shown` is False on every rank but the first."""

    total: int
    clips_per_step: int
    interval: int
    shown: bool
    started: float = field(default_factory=time.perf_counter)
    done: int = 0

    def clips_per_second(self) -> float:
        """Mean over this process's steps so far, validation and saving included."""
        return self.done * self.clips_per_step / max(time.perf_counter() - self.started, 1e-9)

    def update(self, step: int, report: StepReport, lr: float) -> None:
        """Show optimizer step `step` (counted from 1)."""
        self.done += 1
        terminal = sys.stderr.isatty()
        if not self.shown or not (terminal or step % self.interval == 0 or step in (1, self.total)):
            return
        rate = self.clips_per_second()
        line = (
            f"step {step}/{self.total}  loss {report.loss:.4f}  lr {lr:.2e}  {rate:.2f} clips/s  "
            f"ETA {_clock((self.total - step) * self.clips_per_step / rate)}  {memory_gib():.1f} GiB"
        )
        print(f"\r\x1b[2K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own above the progress line."""
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
