"""Before training begins there is nothing to save: a signal ends the process at once, and status.json says so. No torch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

from svdtune import launch
from svdtune.config.schema import Config
from svdtune.errors import UsageError
from svdtune.trainer.run_folder import RunFolder
from svdtune.trainer.signals import ends_at_once, leave
from svdtune.trainer.status import Status


@contextmanager
def early(config: Config) -> Iterator[None]:
    """While nobody holds the run folder yet: the checks, and the wait for the other ranks."""

    def end(name: str) -> None:
        try:
            if launch.rank() == 0:
                _tell(config, name)
        finally:
            leave(f"stopped by {name} before training began. Run the same command again to start.")

    with ends_at_once(end):
        _start_tracker()
        yield


def _start_tracker() -> None:
    """multiprocessing's helper keeps blocked what is blocked when it starts; a SIGUSR1 to the whole group would kill it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell(config: Config, name: str) -> None:
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    try:
        with folder.lock():
            status = Status(folder)
            status.starting(config, launch.world_size())
            status.end(name)
    except UsageError:
        return  # another process trains in it, and the status is that one's
