"""SIGTERM, SIGUSR1 and, while it trains, SIGINT: noted by a thread, so that they are heard even in a C call that does not return.

Before and after the loop a signal ends the process at once. In it a signal is a wish, served at the next micro-step; a second
one ends at once, and so does a main thread that does not come to serve it.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ENDING = (signal.SIGTERM, signal.SIGUSR1)
NOTED = (*ENDING, signal.SIGINT)
EXIT_CODE = 143
GRACE = 20.0
"""Seconds from a signal until the process ends by itself; launchers kill after 30."""
ECHO = 2.0
"""Seconds in which a signal that comes again is the same one: launchers pass on what the whole group has got already."""
_LOOK = 0.2


@dataclass
class StopWish:
    """Set by a signal or by what watches the run; served by all ranks together."""

    name: str | None = None
    refused: bool = False
    """Asked for by what watches the run, not by a signal."""
    heard: float = math.inf
    """When the signal came, on the clock of time.monotonic."""
    grace: float = GRACE
    echo: float = ECHO
    patience: float = GRACE
    """Seconds until it must be served."""
    waited: float = -math.inf
    """When the last wait that does not count ended."""
    served: bool = False

    def ask(self, reason: str) -> None:
        """Stop before the next step for `reason`; an empty one asks nothing."""
        if reason and self.name is None:
            self.name, self.refused = reason, True

    def hear(self, name: str) -> bool:
        """A signal came; whether it is a second one."""
        again = time.monotonic() > self.heard + self.echo
        if self.heard == math.inf:
            self.name, self.refused, self.heard = name, False, time.monotonic()
        return again

    @property
    def overdue(self) -> bool:
        """Whether the main thread had its time."""
        return not self.served and time.monotonic() > max(self.heard, self.waited) + self.patience

    def allow(self, seconds: float) -> None:
        """A micro-step takes so long, and the one under way must be able to end."""
        self.patience = max(self.grace, 2 * seconds)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For a checkpoint, or for what the main process does: it may take long, and no clock ends the process meanwhile."""
        before, self.patience = self.patience, math.inf
        try:
            yield
        finally:
            self.waited, self.patience = time.monotonic(), before


@contextmanager
def ends_at_once(end: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile a signal ends the process: `end(name)` is called from a thread and does not return."""

    def attend(pipe: int) -> None:
        for number in _numbers(pipe):
            if number in ENDING:
                end(signal.Signals(number).name)

    with _attended(ENDING, attend):
        yield


@contextmanager
def listen(end: Callable[[str, str], None], *, grace: float = GRACE, echo: float = ECHO) -> Iterator[StopWish]:
    """Meanwhile a signal is a wish. `end(name, why)`, which does not return, is called when there is no more time for it."""
    wish = StopWish(grace=grace, patience=grace, echo=echo)

    def attend(pipe: int) -> None:
        for number in _numbers(pipe):
            if number in NOTED:
                name = signal.Signals(number).name
                if wish.hear(name):
                    end(name, f"ended by a second signal, {name}")
                os.write(2, f"\n{name}: saving a checkpoint after this micro-step; once more ends at once\n".encode())
            elif wish.overdue:
                seconds = time.monotonic() - wish.heard
                end(wish.name or "", f"not saved: {seconds:.0f} s after {wish.name} still in {_place()}")

    with _attended(NOTED, attend):
        yield wish
    if wish.heard < math.inf and not wish.served:  # it came after the last look: whoever is next in charge serves it
        signal.raise_signal(signal.Signals[wish.name or "SIGTERM"])


def leave(reason: str) -> None:
    """End the process now, from any thread."""
    try:
        os.write(2, f"\nerror: {reason}\n".encode())
    finally:
        os._exit(EXIT_CODE)


@contextmanager
def _attended(numbers: tuple[signal.Signals, ...], attend: Callable[[int], None]) -> Iterator[None]:
    """`attend(pipe)` in a thread, and handlers that make the C level write each signal's number into that pipe."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    thread = threading.Thread(target=attend, args=(ours,), name="signals", daemon=True)
    thread.start()
    pipe_before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe_before)
        os.close(theirs)
        thread.join()
        os.close(ours)


def _numbers(pipe: int) -> Iterator[int]:
    """Signal numbers as they come, and 0 now and then; ends with the pipe."""
    while True:
        ready, _, _ = select.select([pipe], [], [], _LOOK)
        if not ready:
            yield 0
        elif number := os.read(pipe, 1):
            yield number[0]
        else:
            return


def _place() -> str:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = traceback.extract_stack(frame)[-1]
    return f"{innermost.name} ({innermost.filename}:{innermost.lineno})"
