"""A function over many files in child processes that can hang or crash without taking this process along."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from svdtune.errors import DataError

T = TypeVar("T")


def map_files(
    function: Callable[[Path], T], paths: Sequence[Path], *, processes: int, seconds: float
) -> list[T | DataError]:
    """`function(path)` for each path, in order; the DataError it raised, or one that says it hung or crashed."""
    results: list[T | DataError] = [DataError(f"{path}: not read") for path in paths]
    todo = deque(range(len(paths)))
    children = [_Child(function) for _ in range(min(processes, len(paths)))]
    try:
        while True:
            for child in children:
                if child.job is None and todo:
                    child.give(todo.popleft(), paths, seconds)
            busy = [child for child in children if child.job is not None]
            if not busy:
                return results
            nearest = min(child.deadline for child in busy) - time.monotonic()
            ready = wait([child.pipe for child in busy], timeout=max(0.0, nearest))
            for child in busy:
                job = child.job
                assert job is not None
                if child.pipe in ready:
                    results[job] = child.take(paths)
                elif time.monotonic() > child.deadline:
                    results[job] = DataError(f"{paths[job]}: reading it takes over {seconds:g} s; remove it")
                    child.restart()
    finally:
        for child in children:
            child.stop()


class _Child:
    """One process, and the file it works on."""

    def __init__(self, function: Callable[[Path], object]) -> None:
        self._function = function
        self._start()

    def _start(self) -> None:
        # spawn: this process may hold threads or CUDA, which a fork would break.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.job: int | None = None
        self.deadline = 0.0

    def give(self, job: int, paths: Sequence[Path], seconds: float) -> None:
        self.job, self.deadline = job, time.monotonic() + seconds
        try:
            self.pipe.send(paths[job])
        except BrokenPipeError:
            return  # it died between two files; `take` sees the end of the pipe

    def take(self, paths: Sequence[Path]) -> Any:
        assert self.job is not None
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            answer = DataError(f"{paths[self.job]}: crashes the program that reads it; remove it")
            self.restart()
        self.job = None
        return answer

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(function: Callable[[Path], object], pipe: Connection) -> None:
    """Runs in the child until it is killed or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group, and the parent says it
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(path))
        except DataError as error:
            pipe.send(error)
