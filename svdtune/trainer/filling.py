"""How far `svdtune cache` is: a bar on a terminal, one line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_SECONDS = 30.0
"""Between two lines where there is no terminal."""


class Filling:
    """`with Filling("clips to encode", shown=True) as filling: filling.begin(10, 12); filling.advance(1)`."""

    def __init__(self, what: str, *, shown: bool) -> None:
        self._what, self._shown = what, shown
        self._bar: Any = None
        self._total = self._done = 0
        self._started = self._told = time.monotonic()

    def begin(self, todo: int, asked: int) -> None:
        """So many of the clips asked for are not there yet."""
        self._total, self._started = todo, time.monotonic()
        self._told = self._started
        if not self._shown:
            return
        print(f"{todo} of {asked} clips are to be encoded", file=sys.stderr, flush=True)
        if todo and sys.stderr.isatty():
            self._bar = _bar(self._what, todo)
            self._bar.start()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif self._shown and time.monotonic() > self._told + _SECONDS:
            self._told = time.monotonic()
            rate = self._done / (self._told - self._started)
            left = (self._total - self._done) / rate
            print(
                f"encoded {self._done}/{self._total}  {rate:.2f} clips/s  {left / 60:.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Filling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(what: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
    bar.add_task(what, total=total)
    return bar
