"""status.json follows what happens: launchers turn every exit code into 1, so the truth is kept here. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from svdtune.config.schema import Config
from svdtune.errors import Diverged, Stopped, SvdtuneError
from svdtune.trainer.run_folder import RunFolder, State, now
from svdtune.trainer.signals import EXIT_CODE, leave

_INTERRUPTED = 130


@dataclass
class Status:
    """What one process of a run tells of it. Endings are told by any rank, and the first one stands."""

    folder: RunFolder
    rank: int = 0
    when: str = "before training began"
    """What a signal interrupts where no checkpoint is due."""

    def starting(self, config: Config, world_size: int) -> None:
        """Forgets what an earlier process told."""
        self.folder.write_status(
            state="starting", step=None, steps=config.train.steps, exit_code=None, reason=None, signal=None, checkpoint=None,
            checkpoint_seconds=None, world_size=world_size, pid=os.getpid(), host=socket.gethostname(), started=now(),
        )  # fmt: skip
        self.folder.beat()

    def ended(self, state: State, code: int, reason: str | None, **facts: Any) -> None:
        """The last word."""
        reason = f"rank {self.rank}: {reason}" if self.rank else reason
        self.folder.write_status(state=state, exit_code=code, reason=reason, **facts)

    def end(self, name: str, why: str = "") -> None:
        """End the process for signal `name`; called from the thread that heard it."""
        why = why or f"stopped by {name} {self.when}"
        newest = max((path.parent for path in self.folder.checkpoints.glob("step-*/MANIFEST.json")), default=None)
        saved = f"The newest checkpoint is {newest}" if newest else "There is no checkpoint yet"
        why = f"{why}. {saved}. Run the same command again to go on."
        try:
            self.ended("stopped", EXIT_CODE, why, signal=name, checkpoint=newest and str(newest))
        finally:
            leave(why)


@contextmanager
def told(status: Status) -> Iterator[None]:
    """However it ends, status.json says so."""
    try:
        yield
    except SvdtuneError as error:
        tell(status, error)
        raise
    except KeyboardInterrupt:
        status.ended("stopped", _INTERRUPTED, f"interrupted {status.when}", signal="SIGINT")
        raise
    except BaseException as error:
        status.ended("failed", 1, f"{type(error).__name__}: {error}")
        raise
    if status.rank == 0:
        status.ended("done", 0, None)


def tell(status: Status, error: SvdtuneError) -> None:
    """What ends the run. Ranks end for the same reason; those that fail alone are heard too."""
    states: dict[type, State] = {Diverged: "diverged", Stopped: "stopped"}
    state = states.get(type(error), "failed")
    if status.rank == 0 or state == "failed":
        status.ended(state, error.exit_code, str(error), signal=getattr(error, "signal", None))
