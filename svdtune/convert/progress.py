"""A bar over the bytes that are written and read back, on a terminal; nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """`with Progress("writing x", total_bytes, sys.stderr) as progress: progress.told(bytes)`."""

    def __init__(self, what: str, total: int, stream: TextIO) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=Console(file=stream), transient=True, disable=not stream.isatty())
        self._task = self._bars.add_task(what, total=total)

    def told(self, num_bytes: int) -> None:
        """So many bytes more are done."""
        self._bars.advance(self._task, num_bytes)

    def say(self, what: str) -> None:
        """What is done now."""
        self._bars.update(self._task, description=what)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
