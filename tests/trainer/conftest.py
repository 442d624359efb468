"""Demo clips and a command line for short runs of the tiny base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
SHORT = ["train.precision=no", "data.num_frames=4", "data.height=32", "data.width=48", "data.workers=0", "run.threads=1",
         "train.log_interval=1", "train.warmup=0", "train.schedule=constant", "validation.samples=0", "validation.clips=0"]  # fmt: skip


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve H.264 demo clips."""
    from svdtune.data.demo import write_demo

    folder = tmp_path_factory.mktemp("clips")
    write_demo(folder, clips=12, motion="down", seed=0)
    return folder


@pytest.fixture
def command(clips: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`command("run-name", "train.steps=3", launcher=[...])`: arguments of a short run below tmp_path."""

    def make(name: str, *overrides: str, launcher: list[str] | None = None) -> list[str]:
        run = [f"run.dir={tmp_path}", f"run.name={name}", f"data.root={clips}", "preflight.enabled=false"]
        door = [sys.executable, *(launcher or []), "-m", "svdtune"]
        return [*door, "train", str(REPO / "configs/tiny.yaml"), *run, *SHORT, *overrides]

    return make


class Worker:
    """worker.py, started when it is needed and again after a run that ended it."""

    def __init__(self, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], place: str | None = None) -> tuple[int, str]:
        """Exit code and stderr of `python -m svdtune ARGUMENTS`; `place`: see signalled.py."""
        if self._process is None:
            command = [sys.executable, "-m", "tests.trainer.worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=REPO
            )
        assert self._process.stdin
        assert self._process.stdout
        request = {"arguments": arguments, "place": place, "out": str(self._out), "err": str(self._err)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
        return int(answer or self._ended), self._err.read_text()

    def close(self) -> None:
        """Let it end."""
        if self._process:
            self._process.communicate(timeout=60)
            self._ended, self._process = self._process.returncode, None


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Runs one after the other in one process, for tests that ask for no process of their own."""
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    made.close()


@pytest.fixture
def train(command: Callable[..., list[str]], tmp_path: Path, worker: Worker) -> Callable[..., Path]:
    """Run to the end, with a launcher in processes of its own; returns the run folder."""

    def run(name: str, *overrides: str, launcher: list[str] | None = None) -> Path:
        arguments = command(name, *overrides, launcher=launcher)
        if launcher:
            done = start(arguments)
            _, err = done.communicate(timeout=300)
            code = done.returncode
        else:
            code, err = worker.run(arguments[arguments.index("train") :])
        assert code == 0, err[-3000:]
        return tmp_path / name

    return run


def environment() -> dict[str, str]:
    """Of a short run."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command with its output kept."""
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=REPO, **options
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
