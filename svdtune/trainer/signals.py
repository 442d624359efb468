"""SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an orderly end; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopWish:
    """Set by a signal handler or by what watches the run, read once per optimizer step."""

    name: str | None = None
    refused: bool = False
    """Asked for by what watches the run, not by a signal."""

    def ask(self, reason: str) -> None:
        """Stop after the next step for `reason`; an empty one asks nothing."""
        if reason and self.name is None:
            self.name, self.refused = reason, True


@contextmanager
def listen() -> Iterator[StopWish]:
    """Handlers for the time of the loop; the previous ones are put back afterwards."""
    wish = StopWish()

    def note(number: int, _frame: FrameType | None) -> None:
        wish.name, wish.refused = signal.Signals(number).name, False
        signal.signal(number, signal.SIG_DFL)
        os.write(2, f"\n{wish.name}: saving a checkpoint after this step; once more ends at once\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
