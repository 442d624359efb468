"""What a person sees of sampling, on stderr: a bar of steps on a terminal, one line for each finished video elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Progress:
    """Counts the videos of one command."""

    total: int
    made: int = 0

    @contextmanager
    def video(self, what: str, steps: int, path: Path) -> Iterator[Callable[[], None]]:
        """Around the making of the next video; gives what is to be called after each sampler step."""
        self.made += 1
        title = f"video {self.made}/{self.total} {what}"
        if sys.stderr.isatty():
            with _bar(title, steps) as advance:
                yield advance
            return
        started = time.perf_counter()
        yield lambda: None
        say(f"{title}: {time.perf_counter() - started:.1f} s -> {path}")


def say(text: str) -> None:
    """A line that is no result."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _bar(title: str, steps: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # stdout holds paths alone, and belongs to whoever reads them.
    with Bar(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda: bar.advance(task)
